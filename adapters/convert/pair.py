"""Experts from a pair of checkpoints: the singular-value change between a base model and a tuned one.

With the one-sided form W′ = W + Q·diag(s)·QᵀW (or its input-side twin) the s that leaves the least of a difference
Δ = T − W unexplained, in the Frobenius norm, is row by row

    sᵢ = ⟨(QᵀΔ)ᵢ, (QᵀW)ᵢ⟩ / ‖(QᵀW)ᵢ‖²,        zᵢ = 1 + sᵢ,

which is zᵢ = uᵢᵀ·T·vᵢ / σᵢ where Q, σ and V are exactly W's. What remains is R = Δ − Q·diag(s)·QᵀW, and a tuned model
is an expert of the base only where R is nothing but rounding.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z
from t2.adapters.targets import parameter_names
from t2.core.errors import ExpertMismatchError, ModelError

TOLERANCE = 0.05
"""Largest ‖R‖ / ‖Δ‖ of a matrix. Merges of the demo experts in float32 leave 4e-6; a change of low rank, or of every
weight, nearly 1."""
ROUNDING = 1.25
"""A matrix also passes whose ‖R‖ is at most so many times the norm that rounding a checkpoint's weights has by itself.
Merges of the demo experts in bfloat16 leave 0.99 times that norm."""
DROWNED = 0.5
"""Largest ‖R‖ / ‖Δ‖ over all matrices, rounding included: above it a checkpoint says too little of the expert."""
UNCERTAIN = 0.1
"""Standard error of zᵢ, as rounding gives it, from which on zᵢ cannot be told and stays 1."""


_QUANTISED = (".absmax", ".quant_map", ".SCB", ".weight_format")
"""Ends of the names that bitsandbytes' states have beside a weight."""
_COMPUTES = re.compile("rope|eps|act|sliding|heads|softcap|scal")
"""In the names of a configuration's values that no weight tells of and that answers depend on."""


@dataclass(frozen=True)
class Fit:
    """How a difference of two matrices is explained by z.

    Attributes:
        z: shape (r,), float32.
        change: ‖Δ‖, the Frobenius norm of the difference.
        residual: ‖R‖, what z does not explain.
        rounding: norm that rounding to the coarser of the two dtypes has by itself.
        moved: whether z explains more of the difference than it would of mere rounding.
        unknown: components whose zᵢ cannot be told, since σᵢ is too small against the rounding; there zᵢ = 1.
    """

    z: torch.Tensor
    change: float
    residual: float
    rounding: float
    moved: bool
    unknown: int

    @property
    def relative(self) -> float:
        """‖R‖ / ‖Δ‖; 0 where nothing differs."""
        return self.residual / self.change if self.change else 0.0


@dataclass(frozen=True)
class Extracted:
    """An expert found between two checkpoints.

    Attributes:
        z: the vectors of the matrices that differ.
        relative: ‖R‖ / ‖Δ‖ over all matrices.
        worst: the matrix with the largest of its own, and that value.
        unknown: components that stay 1 because their σ is too small to tell.
        components: of the matrices that differ.
    """

    z: Z
    relative: float
    worst: tuple[str, float]
    unknown: int
    components: int


def fit(engine: TransformersEngine, name: str, tuned: torch.Tensor) -> Fit:
    """The least-squares z of one matrix.

    Args:
        engine: the base model.
        name: the matrix.
        tuned: the tuned model's matrix in the layout of the parameter.
    """
    target, basis = engine.targets[name], engine.bases([name])[name]
    own = target.matrix
    other = (tuned.T if target.transposed else tuned).to(own.device)
    coarser = max((own.dtype, other.dtype), key=lambda dtype: torch.finfo(dtype).eps)
    w, delta = own.float(), other.float() - own.float()
    if not bool(delta.any()):
        return Fit(torch.ones(target.rank), 0.0, 0.0, 0.0, False, 0)
    rounding = _rounding(other.float(), coarser)
    q = basis.q.to(w.device)
    if basis.side == "in":
        w, delta = w.T, delta.T
    rows, moved = q.T @ w, q.T @ delta
    power = rows.double().square().sum(dim=1)
    sigma = power.sqrt()
    s = (moved.double() * rows.double()).sum(dim=1) / power.clamp_min(torch.finfo(torch.float64).tiny)
    noise = rounding / math.sqrt(w.numel())
    floor = float(sigma.max()) * max(w.shape) * torch.finfo(torch.float32).eps
    unknown = (sigma <= floor) | (noise > UNCERTAIN * sigma)
    s = torch.where(unknown, torch.zeros_like(s), s)
    residual = moved.double() - s.unsqueeze(1) * rows.double()
    explained = math.sqrt(float((s.square() * power).sum()))
    # r of the m·n independent errors of rounding lie in what z can explain; twice their norm is not met by chance.
    moved_at_all = explained > 2 * noise * math.sqrt(target.rank)
    change = float(delta.double().norm())
    return Fit((1 + s).float().cpu(), change, float(residual.norm()), rounding, moved_at_all, int(unknown.sum()))


def check_settings(engine: TransformersEngine, config: transformers.PreTrainedConfig, tuned_id: str) -> None:
    """Check that a tuned model does with its weights what the base model does: positions, norms, activations, heads.

    Raises:
        ExpertMismatchError: its configuration says otherwise.
    """
    own, other = (found.get_text_config(decoder=True).to_dict() for found in (engine.model.config, config))
    for key in sorted({*own, *other}):
        if _COMPUTES.search(key) and not _same(own.get(key), other.get(key)):
            raise ExpertMismatchError(
                f"{tuned_id} is not {engine.base.id} with other singular values: its configuration has "
                f"{key}={other.get(key)}, not {own.get(key)}; no expert can stand for such a change"
            )


def _same(own: Any, other: Any) -> bool:
    if isinstance(own, dict) and isinstance(other, dict):
        return all(_same(own.get(key), other.get(key)) for key in {*own, *other})
    if isinstance(own, float) and isinstance(other, (int, float)):
        return math.isclose(own, other, rel_tol=1e-6)  # a GGUF file holds float32
    return bool(own == other)


def extract(
    engine: TransformersEngine, tuned: Mapping[str, torch.Tensor], tuned_id: str, tolerance: float = TOLERANCE
) -> Extracted:
    """The expert that takes a base model to a tuned one.

    Args:
        engine: the base model.
        tuned: the tuned model's parameters, by name.
        tuned_id: its name, for messages.
        tolerance: largest ‖R‖ / ‖Δ‖ of a matrix beyond rounding.

    Raises:
        ModelError: the base model is quantised.
        ExpertMismatchError: other parameters or shapes; no difference; or one that is not a change of singular values,
            with the share that is not and the worst matrix.
    """
    if any(target.form is not None for target in engine.targets.values()):
        raise ModelError(f"{engine.base.id} is quantised, and what it lost hides what changed; load it unquantised")
    base = engine.model.state_dict(keep_vars=True)
    _same_shapes(base, tuned, engine.base.id, tuned_id)
    # Of a model that also sees, targets have the names of its text model.
    places = parameter_names(engine.model, engine.targets)
    adapted = {place for own in places.values() for place in own}
    _same_rest({name: own.detach() for name, own in base.items() if name not in adapted}, tuned, engine, tuned_id)
    for first, *others in places.values():
        for other in others:
            if not (torch.equal(tuned[first], tuned[other]) or torch.equal(tuned[first], tuned[other].T)):
                raise ExpertMismatchError(
                    f"{tuned_id} is not {engine.base.id} with other singular values: {first} and {other} differ, but "
                    f"they are one weight in {engine.base.id}; no expert can express this change"
                )
    fits = {name: fit(engine, name, tuned[first]) for name, (first, *_) in places.items()}
    differing = {name: found for name, found in fits.items() if found.change}
    failing = {
        name: found
        for name, found in differing.items()
        if found.residual > max(tolerance * found.change, ROUNDING * found.rounding)
    }
    if failing:
        worst = max(failing, key=lambda name: failing[name].relative)
        raise ExpertMismatchError(
            f"{tuned_id} is not {engine.base.id} with other singular values: {_relative(differing.values()):.1%} of "
            f"the difference (Frobenius norm) is something else, beyond rounding in {len(failing)} of {len(differing)} "
            f"matrices, worst {worst} with {failing[worst].relative:.1%}; no expert can stand for a dense or low-rank "
            "fine-tune"
        )
    moved = {name: found for name, found in differing.items() if found.moved}
    if not moved:
        how = "up to rounding " if differing else ""
        raise ExpertMismatchError(
            f"{tuned_id} has {how}the weights of {engine.base.id}, so there is no expert between them"
        )
    relative = _relative(moved.values())
    if relative > max(tolerance, DROWNED):
        raise ExpertMismatchError(
            f"{relative:.1%} of the difference between {tuned_id} and {engine.base.id} is the rounding of their "
            "weights, in which an expert drowns; save the tuned model in float32"
        )
    worst = max(moved, key=lambda name: moved[name].relative)
    return Extracted(
        {name: found.z for name, found in moved.items()},
        relative,
        (worst, moved[worst].relative),
        sum(found.unknown for found in moved.values()),
        sum(len(found.z) for found in moved.values()),
    )


def _relative(fits: Iterable[Fit]) -> float:
    found = list(fits)
    return math.sqrt(sum(f.residual**2 for f in found) / sum(f.change**2 for f in found))


def _rounding(matrix: torch.Tensor, dtype: torch.dtype) -> float:
    """Norm of a uniform rounding error: √(Σ ulp² / 12), ulp the distance of neighbouring numbers of ``dtype``."""
    _, exponent = torch.frexp(matrix)
    ulp = torch.ldexp(torch.full_like(matrix, torch.finfo(dtype).eps), exponent - 1)
    return math.sqrt(float(ulp.masked_fill_(matrix == 0, 0).double().square().sum()) / 12)


def _same_shapes(
    base: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor], base_id: str, tuned_id: str
) -> None:
    odd = next((name for name in [*base, *tuned] if name not in tuned or name not in base), None)
    if odd is not None and odd.endswith(_QUANTISED):
        raise ModelError(f"{tuned_id} is quantised, and what it lost hides what changed; load it unquantised")
    if odd is not None:
        has, lacks = (base_id, tuned_id) if odd in base else (tuned_id, base_id)
        raise ExpertMismatchError(f"{has} has {odd} and {lacks} has not: they are not models of one architecture")
    for name, own in base.items():
        if tuned[name].is_floating_point() and not bool(torch.isfinite(tuned[name]).all()):
            raise ExpertMismatchError(f"{name} of {tuned_id} holds values that are not finite; its file is damaged")
        if own.shape != tuned[name].shape:
            raise ExpertMismatchError(
                f"{name} has shape {tuple(own.shape)} in {base_id} and {tuple(tuned[name].shape)} in {tuned_id}"
            )


def _same_rest(
    base: Mapping[str, torch.Tensor], tuned: Mapping[str, torch.Tensor], engine: TransformersEngine, tuned_id: str
) -> None:
    """Norms, embeddings and biases must agree up to the rounding of the coarser dtype."""
    changed: dict[str, float] = {}
    for name, own in base.items():
        other = tuned[name].to(own.device)
        if not own.is_floating_point() or torch.equal(own, other):
            continue
        coarser = max((own.dtype, other.dtype), key=lambda dtype: torch.finfo(dtype).eps)
        if not torch.equal(own.to(coarser), other.to(coarser)):
            norm = float(own.double().norm())
            changed[name] = float((other.double() - own.double()).norm()) / norm if norm else math.inf
    if changed:
        worst = max(changed, key=lambda name: changed[name])
        raise ExpertMismatchError(
            f"{tuned_id} is not {engine.base.id} with other singular values: {len(changed)} parameters differ that "
            f"have none or are not adapted, most of all {worst} (by {changed[worst]:.2%} of its norm); no expert can "
            "stand for such a change"
        )
