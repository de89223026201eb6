"""Experts that were not trained: imported, extracted or mixed, and written where ``experts=`` finds them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t2.adapters.expert import Expert, Z, distinct, save_expert
from t2.adapters.strategies.mixing import mixture, rows_of
from t2.core.errors import ArgumentError
from t2.core.manifest import BaseModelRef, Manifest, Parent, pack_hashes, unpack_hashes
from t2.core.record import AdaptationRecord
from t2.core.settings import experts_dir
from t2.harness.args import Settings, parse_args
from t2.harness.catalogue import FILE_NAME
from t2.harness.experts import prepare_experts, read_content, read_experts

if TYPE_CHECKING:
    from t2.api.model import Model

Named = str | Path | Expert
"""An expert: by name, file or folder, or itself."""

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,99}")


@dataclass(frozen=True)
class SavedExpert:
    """An expert that was written.

    Attributes:
        path: its file.
        digest: hex SHA-256 of the file, the expert's identity.
        note: what there is to say of how it was made, in one sentence; may be empty.
    """

    path: Path
    digest: str
    note: str = ""


def place(name: str, folder: str | Path | None, overwrite: bool) -> Path:
    """Where an expert of a name goes, checked before any long work.

    Raises:
        ArgumentError: the name is not one, or taken.
    """
    if not _NAME.fullmatch(name):
        raise ArgumentError(
            f"name={name} must be letters, digits, _ and -, begin with a letter, and be at most 100 long"
        )
    path = (Path(folder).expanduser() if folder is not None else experts_dir()).absolute() / name / FILE_NAME
    if path.exists() and not overwrite:
        raise ArgumentError(f"expert {name} exists in {path.parent}; give another name, or overwrite to replace it")
    return path


def write(path: Path, z: Z, note: str = "", **manifest: Any) -> SavedExpert:
    """Write an expert's file; the rank of each matrix follows from z.

    Raises:
        ExpertFileError: the expert would break the strict profile.
        StorageError: the file cannot be written.
    """
    targets = {name: len(vector) for name, vector in z.items()}
    return SavedExpert(path, save_expert(path, Manifest(targets=targets, **manifest), z), note)


def read_named(experts: str | Named | Sequence[Named], adapt: str = "expert", where: str | None = None) -> list[Expert]:
    """Read experts given by name, reference, file, folder or themselves; a text may join names by ``+``.

    Args:
        experts: what is given.
        adapt: the strategy; ``classifier`` and ``auto`` take one expert of kind classifier among them.
        where: the registry that references mean; None is the one in use.

    Raises:
        ArgumentError: one is named twice, or of a kind that the strategy has no use for.
        NotFoundError: there is no such expert.
        ExpertFileError: a file breaks the strict profile.
    """
    if isinstance(experts, str):
        given: list[Named] = [part.strip() for part in experts.split("+")]
    else:
        given = [experts] if isinstance(experts, (Path, Expert)) else list(experts)
    if not given:
        raise ArgumentError("experts: the list is empty; name one or more")
    found: list[Expert] = []
    for expert in given:
        found += [expert] if isinstance(expert, Expert) else read_experts([str(expert)], adapt, where)
    for expert in found:
        if sum(expert.digest == other.digest for other in found) > 1:
            raise ArgumentError(f"experts: {expert.name} is given twice")
    return distinct(found)


def mixed(
    experts: str | Named | Sequence[Named],
    alpha: Sequence[float] | str | None,
    options: Mapping[str, Any],
    model: Model | None,
) -> tuple[list[Expert], Settings, dict[str, float], Z, BaseModelRef]:
    """A fixed mixture: its experts, settings, coefficients, vectors and base.

    Args:
        experts: what to mix.
        alpha: a coefficient for each; None is their mean.
        options: ``space``, ``normalise``, ``rescale``, ``layers``, ``rank`` and ``transfer``.
        model: the base model; None takes the experts' word for it.

    Raises:
        ArgumentError: an option or α does not fit, or ``rescale`` or ``transfer=resample`` is wanted without a model.
        ExpertMismatchError: the experts are of several base models.
    """
    read = read_named(experts)
    names = [expert.name for expert in read]
    settings = parse_args({"adapt": "mix", "experts": names, "alpha": alpha, **options})
    if model is None and settings.rescale != "none":
        raise ArgumentError("rescale=nuclear needs the singular values of the base model; give the model")
    _check_resample(settings, model)
    base = read[0].manifest.base if model is None else model.base
    ranks = model.engine.ranks() if model is not None else {k: r for e in read for k, r in e.manifest.targets.items()}
    prepared = prepare_experts(settings, read, base, ranks)
    row = settings.alpha if settings.alpha is not None else (1 / len(prepared),) * len(prepared)
    choice = mixture(prepared, [row], settings.options(), model.engine.bases if model is not None else lambda names: {})
    assert choice.z is not None
    return prepared, settings, choice.alpha, choice.z, base


def mix(
    name: str,
    experts: str | Named | Sequence[Named],
    alpha: Sequence[float] | str | None = None,
    *,
    space: str = "paper",
    normalise: str = "none",
    rescale: str = "none",
    layers: str | None = None,
    rank: int | None = None,
    transfer: str = "none",
    model: Model | None = None,
    domain: str | None = None,
    folder: str | Path | None = None,
    overwrite: bool = False,
) -> SavedExpert:
    """Write a fixed mixture of experts as an expert of kind ``mixture``, with its parents and their α.

    Args:
        name: the mixture's name.
        experts: what to mix: names joined by ``+``, or a list of names, files, folders and experts.
        alpha: a coefficient for each; None is their mean.
        space, normalise, rescale, layers, rank, transfer: as the model_args of the same names.
        model: the base model, which only ``rescale="nuclear"`` and ``transfer="resample"`` need.
        domain: what it is for.
        folder: where experts lie; None is ``T2_EXPERTS_DIR``.
        overwrite: replace an expert of that name.

    Raises:
        ArgumentError: the name is taken, or an option does not fit.
        ExpertError: an expert cannot be read, or they belong to several base models.
        StorageError: the file cannot be written.
    """
    path = place(name, folder, overwrite)
    options = {
        "space": space,
        "normalise": normalise,
        "rescale": rescale,
        "layers": layers,
        "rank": rank,
        "transfer": transfer,
    }
    used, settings, coefficients, z, base = mixed(experts, alpha, options, model)
    training = {key: value for key, value in settings.bearing().items() if key in (*options, "alpha")}
    return write_mixture(path, name, base, used, coefficients, z, method="mix", training=training, domain=domain)


_OF_MIXTURE = ("per", "space", "normalise", "rescale", "layers", "rank", "control", "control_seed", "transfer")
"""Settings of an adaptation that its mixture depends on."""


def mix_record(
    record: AdaptationRecord,
    name: str,
    *,
    model: Model | None = None,
    domain: str | None = None,
    folder: str | Path | None = None,
    overwrite: bool = False,
) -> SavedExpert:
    """Write the mixture that an adaptation has found as an expert of kind ``mixture``, by its record.

    Its experts are found again by digest, on this machine or in the registry in use.

    Args:
        record: of an adaptation with one mixture.
        name: the mixture's name.
        model: the base model, which only a record with ``rescale=nuclear`` or ``transfer=resample`` needs.
        domain: what it is for.
        folder: where experts lie; None is ``T2_EXPERTS_DIR``.
        overwrite: replace an expert of that name.

    Raises:
        ArgumentError: the name is taken, prompts had mixtures of their own, or the base model stayed.
        NotFoundError: an expert is nowhere to be found.
        StorageError: the file cannot be written.
    """
    path = place(name, folder, overwrite)
    used = [one.alpha for one in record.mixtures]
    if len(used) != 1:
        raise ArgumentError(
            f"the record of {record.task} names {len(used)} mixtures, each for some prompts, so there is no one to keep"
        )
    if not used[0]:
        raise ArgumentError(f"the base model stayed on {record.task} ({record.note}), so there is no mixture to keep")
    settings = parse_args(
        {"adapt": record.strategy, **{key: value for key, value in record.settings.items() if key in _OF_MIXTURE}}
    )
    if model is None and settings.rescale != "none":
        raise ArgumentError(
            "the record has rescale=nuclear, which needs the singular values of the base model; give the model"
        )
    _check_resample(settings, model)
    read = [
        replace(expert, manifest=expert.manifest.model_copy(update={"name": ref.name}))
        for ref in record.experts
        for expert in [read_content(ref.digest)]
    ]
    base = record.base.base if model is None else model.base
    ranks = model.engine.ranks() if model is not None else {k: r for e in read for k, r in e.manifest.targets.items()}
    prepared = prepare_experts(settings, read, base, ranks)
    options = settings.options()
    taking_part, rows, of_base = rows_of(prepared, used[0], options)
    choice = mixture(taking_part, rows, options, model.engine.bases if model is not None else lambda names: {}, of_base)
    assert choice.z is not None
    return write_mixture(
        path,
        name,
        base,
        prepared,
        choice.alpha,
        choice.z,
        method=record.strategy,
        training={"record": record.digest(), "control": record.control, "settings": record.settings},
        domain=domain,
        task=record.task,
        docs=record.adaptation_docs,
    )


def _check_resample(settings: Settings, model: Model | None) -> None:
    if settings.transfer == "resample" and model is None:
        raise ArgumentError("transfer=resample needs the matrices of the base model; give the model")


def write_mixture(
    path: Path,
    name: str,
    base: BaseModelRef,
    experts: Sequence[Expert],
    alpha: Mapping[str, float],
    z: Z,
    *,
    method: str,
    training: Mapping[str, Any],
    domain: str | None = None,
    task: str | None = None,
    docs: Collection[str] = (),
) -> SavedExpert:
    """Write a mixture; its documents are those it was found on (by their marks) and those of its parents."""
    parents = []
    seen = set(docs)
    for expert in experts:
        own = [value for key, value in alpha.items() if key == expert.name or key.startswith(f"{expert.name}@")]
        if any(own):
            parents.append(Parent(digest=expert.digest, alpha=sum(own) / len(own)))
            seen.update(unpack_hashes(expert.manifest.training_docs))
    return write(
        path,
        z,
        kind="mixture",
        name=name,
        base=base,
        task=task,
        domain=domain,
        method=method,
        training={**training, "alpha": dict(alpha)},
        training_docs=pack_hashes(seen),
        parents=tuple(parents),
    )
