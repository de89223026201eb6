"""Which experts take part: found by name, reference, file or folder, and checked before any long work."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from t2.adapters.controls import control_expert
from t2.adapters.expert import Expert, check_expert, distinct, load_expert, of_file, of_weights
from t2.adapters.targets import layer_of
from t2.adapters.transfer import resample, unchanged
from t2.core.digests import sha256_file
from t2.core.errors import ArgumentError, NotFoundError, StorageError, UnavailableError
from t2.core.manifest import BaseModelRef
from t2.core.references import is_name, parse_reference
from t2.core.settings import experts_dir, registry_url
from t2.harness.args import Settings
from t2.harness.catalogue import find_files, known_experts, shipped_experts
from t2.harness.defaults import default_classifier, default_experts
from t2.harness.registry import fetch, unknown

_log = logging.getLogger(__name__)
_WITH_CLASSIFIER = ("classifier", "auto")


def read_experts(names: Sequence[str], adapt: str = "expert", where: str | None = None) -> list[Expert]:
    """Read named experts, before a model is loaded.

    A name means what is in ``T2_EXPERTS_DIR`` or comes with t2, else a file or folder that exists, else an expert of
    the registry; one with ``@`` means the registry.

    Args:
        names: what ``experts=`` joins.
        adapt: the strategy; ``classifier`` and ``auto`` take one expert of kind classifier among them.
        where: the registry; None is the one in use. It is opened for what it alone has.

    Raises:
        ArgumentError: named twice, or of a kind that the strategy has no use for.
        NotFoundError: there is no such expert; the message names the nearest.
        UnavailableError: a reference needs the registry, which cannot be reached.
        ExpertFileError: a file is truncated, breaks the profile, or holds values that are not finite.
    """
    found = [expert for name in names for expert in _found(name, where)]
    names, experts = [name for name, _ in found], [expert for _, expert in found]
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


def value_of(expert: Expert) -> str | None:
    """What ``experts=`` takes for an expert that was found by default: its name on this machine, else its version."""
    for name, path in known_experts().items():
        if sha256_file(path) == expert.digest:
            return name
    return expert.reference


def read_values(names: Sequence[str], where: str | None = None) -> list[tuple[str, Expert]]:
    """Read named experts and classifiers, each with a value of ``experts=`` that means it alone.

    A folder of many becomes its files, an alias the version that it points to now.

    Raises:
        T2Error: as :func:`read_experts`.
    """
    read_experts(names, "auto", where)
    values: list[str] = []
    experts: list[Expert] = []
    for name in names:
        found = _found(name, where)
        files = find_files(name) if len(found) > 1 else []
        values += [str(path) for _, path in files] or [_pinned(name, expert) for _, expert in found]
        experts += [expert for _, expert in found]
    return list(zip(values, distinct(experts), strict=True))


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
    classifier = named[0] if named else default_classifier(base, settings.registry)
    if classifier is not None:
        return fit_expert(classifier, settings.transfer, base, ranks)
    if settings.adapt == "classifier":
        raise ArgumentError(
            f"adapt=classifier: no classifier for {base.id} (fingerprint {base.fingerprint[:12]}) in the registry "
            f"{settings.registry or registry_url()} or in {experts_dir()}; "
            "train one with t2 train --kind classifier --task t2_domains, name one with experts=, or use adapt=prompt"
        )
    return None


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
    experts = [expert for expert in read or () if expert.manifest.kind != "classifier"] or default_experts(
        base, settings.registry
    )
    experts = [fit_expert(expert, settings.transfer, base, ranks) for expert in experts]
    if settings.layers is not None:
        experts = [_keep_layers(expert, settings.layers, ranks) for expert in experts]
    return [control_expert(expert, settings.control, settings.control_seed) for expert in experts]


def fit_expert(expert: Expert, transfer: str, base: BaseModelRef, ranks: Mapping[str, int]) -> Expert:
    """An expert as it is to act on a base model, by the value of ``transfer``.

    Raises:
        ExpertMismatchError: it belongs to another base model, and cannot be transferred that way.
    """
    of_base = expert.manifest.base.fingerprint in (base.fingerprint, getattr(ranks, "untied", None))
    if of_base or transfer != "resample":
        expert = of_weights(expert, base, ranks)
    own = base.model_copy(update={"fingerprint": expert.manifest.base.fingerprint})
    match transfer:
        case "resample":
            fitted = resample(expert, base, ranks)
            if fitted.transferred is not None and fitted.transferred.left_out:
                _log.warning(
                    "expert %s of %s: %s does not have %s, which are left out",
                    *(expert.name, expert.manifest.base.id, base.id, ", ".join(fitted.transferred.left_out)),
                )
            return fitted
        case "strict":
            check_expert(expert, own, ranks)
            return unchanged(expert, base)
        case _:
            check_expert(expert, base, ranks)
    return expert


def _keep_layers(expert: Expert, layers: Sequence[int], ranks: Mapping[str, int]) -> Expert:
    known = {layer for layer in map(layer_of, ranks) if layer is not None}
    missing = sorted(set(layers) - known)
    if missing:
        raise ArgumentError(f"layers: the model has no layer {missing[0]}, its layers are 0 to {max(known)}")
    z = {name: vector for name, vector in expert.z.items() if layer_of(name) in layers}
    if not z:
        raise ArgumentError(f"layers: expert {expert.name} moves nothing in the layers {'+'.join(map(str, layers))}")
    return replace(expert, z=z)


def _found(name: str, where: str | None) -> list[tuple[str, Expert]]:
    """The experts that a part of ``experts=`` means, each by what to call it."""
    if "@" in name and not Path(name).expanduser().exists():
        return [(name, _fetched(name, where))]
    try:
        files = find_files(name)
    except ArgumentError:
        # A folder without experts is in nobody's way.
        if not is_name(name):
            raise
        with contextlib.suppress(NotFoundError):
            return [(name, _fetched(name, where))]
        raise
    if files:
        return [(label, _from_file(label, path)) for label, path in files]
    if not is_name(name):
        raise unknown(name, where)
    try:
        return [(name, _fetched(name, where))]
    except NotFoundError as error:
        raise unknown(name, where) from error
    except (StorageError, UnavailableError) as error:
        if "/" in name:
            raise
        raise unknown(name, where) from error  # more likely a slip of the pen than an expert there


def read_content(digest: str, where: str | None = None) -> Expert:
    """The expert with a digest: of this machine, else of the cache or the registry.

    Raises:
        NotFoundError: there is none.
        UnavailableError: the registry cannot be reached.
    """
    for path in known_experts().values():
        if sha256_file(path) == digest:
            return load_expert(path)
    return _fetched(f"@sha256:{digest}", where)


def _pinned(name: str, expert: Expert) -> str:
    local = name in known_experts() or Path(name).expanduser().exists()
    return name if local or expert.reference is None else expert.reference


def _from_file(name: str, path: Path) -> Expert:
    expert = load_expert(path)
    shipped = name in shipped_experts()
    return replace(expert, reference=f"{name}@sha256:{expert.digest}") if shipped else expert


def _fetched(name: str, where: str | None) -> Expert:
    found = fetch(parse_reference(name), where)
    return replace(of_file(found.file), reference=found.reference)
