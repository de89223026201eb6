"""Which experts take part: found by name, file or folder, and checked before any long work."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from t2.adapters.controls import control_expert
from t2.adapters.expert import Expert, check_expert, load_expert
from t2.adapters.targets import layer_of
from t2.core.errors import ArgumentError, ExpertError, ExpertFileError, ExpertMismatchError, nearest
from t2.core.expertfile import unfinished
from t2.core.manifest import BaseModelRef
from t2.core.settings import experts_dir
from t2.harness.args import Settings
from t2.harness.shipped import PREFIX, demo_dir

_WITH_CLASSIFIER = ("classifier", "auto")
FILE_NAME = "expert.safetensors"
"""What an expert's file is called inside a folder of its own."""

_log = logging.getLogger(__name__)


def known_experts() -> dict[str, Path]:
    """Every expert that can be named, with its file: the user's in ``T2_EXPERTS_DIR``, then the demo experts."""
    return _listed(experts_dir(), "") | _listed(demo_dir(), PREFIX)


def find_expert(name: str) -> Path:
    """The file that a name, file or folder of ``experts=`` means.

    Raises:
        ArgumentError: there is no such expert.
    """
    known = known_experts()
    if name in known:
        return known[name]
    path = Path(name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / FILE_NAME).is_file():
            return path / FILE_NAME
        files = sorted(path.glob("*.safetensors"))
        if len(files) == 1:
            return files[0]
        raise ArgumentError(f"experts: the folder {path} holds {len(files)} .safetensors files; name one of them")
    if "@" in name:
        raise ArgumentError(f"experts: {name}: versions and aliases need a registry, which this version of t2 has not")
    raise ArgumentError(f"experts: {name} is neither an expert in {experts_dir()} nor a file{nearest(name, known)}")


def read_experts(names: Sequence[str], adapt: str = "expert") -> list[Expert]:
    """Read named experts' files, before a model is loaded.

    Args:
        names: what ``experts=`` joins.
        adapt: the strategy; ``classifier`` and ``auto`` take one expert of kind classifier among them.

    Raises:
        ArgumentError: unknown, named twice, or of a kind that the strategy has no use for.
        ExpertFileError: a file is truncated, breaks the profile, or holds values that are not finite.
    """
    found = [file for name in names for file in _files(name)]
    names, experts = [name for name, _ in found], [load_expert(path) for _, path in found]
    for name, expert in zip(names, experts, strict=True):
        if sum(other.digest == expert.digest for other in experts) > 1:
            raise ArgumentError(f"experts: {name} is the same file as another of the experts")
    classifiers = [name for name, e in zip(names, experts, strict=True) if e.manifest.kind == "classifier"]
    if classifiers and adapt not in _WITH_CLASSIFIER:
        raise ArgumentError(
            f"experts: {classifiers[0]} is a classifier, which names domains and answers nothing; it is for "
            "adapt=classifier"
        )
    if len(classifiers) > 1:
        raise ArgumentError(f"experts: {' and '.join(classifiers)} are classifiers; adapt={adapt} asks one, name one")
    return distinct(experts)


def default_experts(base: BaseModelRef) -> list[Expert]:
    """The experts of kind ``expert`` for a base, one per domain: the user's before the demo's, then by name.

    Raises:
        ArgumentError: there are none.
    """
    chosen: dict[str, Expert] = {}
    known = known_experts()
    for name, path in known.items():
        try:
            expert = load_expert(path)
        except ExpertFileError as error:
            _log.warning("experts: passed over: %s", error)
            continue
        if expert.manifest.kind == "expert" and expert.manifest.base.fingerprint == base.fingerprint:
            chosen.setdefault(expert.domain or name, expert)
    if not chosen:
        raise ArgumentError(
            f"no expert for {base.id} (fingerprint {base.fingerprint[:12]}) among the {len(known)} in {experts_dir()} "
            "and the demo experts; train one with t2 train, or name one with experts="
        )
    return distinct(list(chosen.values()))


def default_classifier(base: BaseModelRef) -> Expert | None:
    """The classifier for a base: the user's before the demo's, then by name; None where there is none."""
    for path in known_experts().values():
        try:
            expert = load_expert(path)
        except ExpertFileError:
            continue  # the experts' default has said so
        if expert.manifest.kind == "classifier" and expert.manifest.base.fingerprint == base.fingerprint:
            return expert
    return None


def prepare_classifier(
    settings: Settings, read: Sequence[Expert] | None, base: BaseModelRef, ranks: Mapping[str, int]
) -> Expert | None:
    """The classifier that takes part; None where the strategy asks none, or ``auto`` finds none.

    Neither ``control`` nor ``layers`` touches it: they ask what the experts do that it sends prompts to.

    Args:
        settings: the parsed model_args.
        read: what :func:`read_experts` returned; without a classifier among it, the default one.
        base: the model as loaded.
        ranks: the rank of each of its adaptable matrices.

    Raises:
        ArgumentError: ``adapt=classifier`` has none.
        ExpertMismatchError: it belongs to another base model.
    """
    if settings.adapt not in _WITH_CLASSIFIER:
        return None
    named = [expert for expert in read or () if expert.manifest.kind == "classifier"]
    classifier = named[0] if named else default_classifier(base)
    if classifier is not None:
        _check(classifier, settings, base, ranks)
    elif settings.adapt == "classifier":
        raise ArgumentError(
            f"adapt=classifier: no classifier for {base.id} (fingerprint {base.fingerprint[:12]}) in {experts_dir()}; "
            "train one with t2 train --kind classifier --task t2_domains, name one with experts=, or use adapt=prompt"
        )
    return classifier


def prepare_experts(
    settings: Settings, read: Sequence[Expert] | None, base: BaseModelRef, ranks: Mapping[str, int]
) -> list[Expert]:
    """Check experts against the loaded base, keep the wanted layers, and apply the control.

    Args:
        settings: the parsed model_args.
        read: what :func:`read_experts` returned, classifiers left aside; without any, the defaults.
        base: the model as loaded.
        ranks: the rank of each of its adaptable matrices.

    Raises:
        ArgumentError: no experts, or layers that the model does not have or the experts do not move.
        ExpertMismatchError: an expert belongs to another base model.
    """
    experts = [expert for expert in read or () if expert.manifest.kind != "classifier"] or default_experts(base)
    for expert in experts:
        _check(expert, settings, base, ranks)
    if settings.layers is not None:
        experts = [_keep_layers(expert, settings.layers, ranks) for expert in experts]
    return [control_expert(expert, settings.control, settings.control_seed) for expert in experts]


def _check(expert: Expert, settings: Settings, base: BaseModelRef, ranks: Mapping[str, int]) -> None:
    try:
        check_expert(expert, base, ranks)
    except ExpertMismatchError:
        if settings.transfer != "strict":
            raise
        check_expert(expert, base.model_copy(update={"fingerprint": expert.manifest.base.fingerprint}), ranks)


def _keep_layers(expert: Expert, layers: Sequence[int], ranks: Mapping[str, int]) -> Expert:
    known = {layer for layer in map(layer_of, ranks) if layer is not None}
    missing = sorted(set(layers) - known)
    if missing:
        raise ArgumentError(f"layers: the model has no layer {missing[0]}, its layers are 0 to {max(known)}")
    z = {name: vector for name, vector in expert.z.items() if layer_of(name) in layers}
    if not z:
        raise ArgumentError(f"layers: expert {expert.name} moves nothing in the layers {'+'.join(map(str, layers))}")
    return Expert(expert.manifest, z, expert.digest)


def _files(name: str) -> list[tuple[str, Path]]:
    """The files that a part of ``experts=`` means, each by what to call it; a folder of several stands for them all."""
    if not name.strip():
        raise ArgumentError("experts: a name is empty; give names, files or folders joined by +")
    path = Path(name).expanduser()
    if path.is_dir() and not (path / FILE_NAME).is_file():
        inside = _listed(path, f"{name.rstrip('/')}/")
        if len(inside) > 1 and name not in known_experts():
            return list(inside.items())
    return [(name, find_expert(name))]


def distinct(experts: list[Expert]) -> list[Expert]:
    """Experts of the same name get a part of their digest appended, so that a record tells them apart."""
    names = [expert.name for expert in experts]
    return [
        Expert(e.manifest.model_copy(update={"name": f"{e.name}-{e.digest[:8]}"}), e.z, e.digest)
        if names.count(e.name) > 1
        else e
        for e in experts
    ]


def _listed(folder: Path, prefix: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    try:
        if not folder.is_dir():
            return found
        for path in sorted(folder.rglob("*.safetensors")):
            if unfinished(path):
                continue
            if path.name == FILE_NAME:
                name = path.parent.relative_to(folder).as_posix()
            elif path.parent == folder:
                name = path.stem
            else:
                continue
            found.setdefault(prefix + name, path)
    except OSError as error:
        raise ExpertError(f"cannot list the experts in {folder}: {error.strerror or error}") from error
    return found
