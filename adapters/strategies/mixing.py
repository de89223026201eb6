"""From coefficients to the effective z of a mixture, under the options of a job."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from t2.adapters.basis import Basis
from t2.adapters.expert import Expert, Z, keep_leading, mix, rescale_nuclear
from t2.adapters.strategies.base import Choice, Job, Options
from t2.adapters.targets import layer_of


def groups_of(job: Job) -> list[str]:
    """The groups of matrices that have an α of their own under ``per``: one, one per layer, or one per matrix."""
    return list(_grouped(job.experts, job.options))


def single(job: Job, index: int) -> list[tuple[float, ...]]:
    """Coefficients that choose one expert alone, for every group."""
    row = tuple(1.0 if i == index else 0.0 for i in range(len(job.experts)))
    return [row] * len(groups_of(job))


BASE = "(base)"
"""The base model's coefficient among those of the experts; no expert that is trained can have this name."""


def choose(job: Job, alpha: Sequence[Sequence[float]], base: float = 0.0) -> Choice:
    """The mixture of a job's experts with the given coefficients.

    Args:
        alpha: for each group of :func:`groups_of` K coefficients; one row serves all groups.
        base: the coefficient of the base model, z = 1.

    Raises:
        ArgumentError: the coefficients give no mixture under the options ``normalise`` and ``rescale``.
    """
    return mixture(job.experts, alpha, job.options, job.engine.bases, base)


def mixture(
    experts: Sequence[Expert],
    alpha: Sequence[Sequence[float]],
    options: Options,
    bases: Callable[[Iterable[str]], Mapping[str, Basis]],
    base: float = 0.0,
) -> Choice:
    """The mixture of experts with the given coefficients.

    Args:
        experts: K experts.
        alpha: as for :func:`choose`.
        options: ``space``, ``normalise``, ``rank``, ``rescale`` and ``per`` are used.
        bases: gives the bases of matrices; asked only where ``rescale`` needs σ.
        base: as for :func:`choose`.

    Raises:
        ArgumentError: the coefficients give no mixture under the options ``normalise`` and ``rescale``.
    """
    groups = _grouped(experts, options)
    rows = list(alpha) * (len(groups) if len(alpha) == 1 else 1)
    z: Z = {}
    for (_, names), row in zip(groups.items(), rows, strict=True):
        parts = [{name: expert.z[name] for name in names if name in expert.z} for expert in experts]
        z.update(mix([*parts, {}], [*row, base], options.space, options.normalise))
    if options.rank is not None:
        z = keep_leading(z, options.rank)
    if options.rescale == "nuclear":
        z = rescale_nuclear(z, bases(z))
    label = {
        expert.name if group == "" else f"{expert.name}@{group}": float(a)
        for group, row in zip(groups, rows, strict=True)
        for expert, a in zip(experts, row, strict=True)
    }
    return Choice(label | {BASE: float(base)} if base else label, z)


def rows_of(
    experts: Sequence[Expert], alpha: Mapping[str, float], options: Options
) -> tuple[list[Expert], list[list[float]], float]:
    """What :func:`mixture` was given, from the labels of its :class:`Choice`.

    Args:
        experts: those of the job; a search that chose among many names only the ones it used.
        alpha: coefficients by label, at least one.
        options: as for :func:`mixture`.

    Returns:
        The experts that were used, their coefficients by group, and that of the base.

    Raises:
        KeyError: the labels are not those of these experts.
    """

    def label(name: str, group: str) -> str:
        return name if group == "" else f"{name}@{group}"

    used = [e for e in experts if any(label(e.name, group) in alpha for group in _grouped(experts, options))]
    groups = _grouped(used, options)
    rows = [[alpha[label(expert.name, group)] for expert in used] for group in groups]
    if len(alpha) - (BASE in alpha) != len(used) * len(groups):
        raise KeyError(next(iter(alpha)))
    return used, rows, alpha.get(BASE, 0.0)


def _grouped(experts: Sequence[Expert], options: Options) -> dict[str, list[str]]:
    """The names of matrices by group."""
    grouped: dict[str, list[str]] = {} if options.per != "expert" else {"": []}
    for name in dict.fromkeys(name for expert in experts for name in expert.z):
        grouped.setdefault(_group(options, name), []).append(name)
    return grouped


def _group(options: Options, name: str) -> str:
    match options.per:
        case "expert":
            return ""
        case "layer":
            return f"layer{layer_of(name)}"
        case "matrix":
            return name.removesuffix(".weight")
