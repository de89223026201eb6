"""Experts in memory, and how they are mixed.

An expert is one vector z ∈ ℝʳ per adapted matrix. W′ and z are linear in the mixture, so a mixture of experts is an
expert again: z′ = Σₖ αₖ zₖ (Transformer², arXiv 2501.06252, section 3.2).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch

from t2.adapters.basis import Basis
from t2.core.errors import ArgumentError, ExpertMismatchError
from t2.core.expertfile import ExpertFile, Vector, read_expert, write_expert
from t2.core.manifest import BaseModelRef, Manifest
from t2.core.record import Transferred

Z = dict[str, torch.Tensor]
"""z by parameter name, each of shape (r,), float32, on the CPU. A matrix that is absent keeps z = 1."""

Space = Literal["paper", "delta"]
Normalise = Literal["none", "sum"]


@dataclass(frozen=True)
class Expert:
    """An expert.

    Attributes:
        manifest: what its file says of it.
        z: its vectors.
        digest: SHA-256 of its file, its identity.
        reference: the version of a registry that it came from; None for a file.
        reason: why it was chosen, where nobody named it.
        transferred: of which other base it was before :mod:`t2.adapters.transfer` took it to the one in use.
    """

    manifest: Manifest
    z: Z
    digest: str
    reference: str | None = field(default=None, compare=False)
    reason: str | None = field(default=None, compare=False)
    transferred: Transferred | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """The name in its manifest."""
        return self.manifest.name

    @property
    def domain(self) -> str | None:
        """What it is for, for example ``math``."""
        return self.manifest.domain


def load_expert(path: Path) -> Expert:
    """Read an expert from its file.

    Raises:
        ExpertFileError: the file cannot be read or breaks the strict profile.
    """
    return of_file(read_expert(path))


def of_file(file: ExpertFile) -> Expert:
    """The expert that a file's content is."""
    return Expert(file.manifest, {name: torch.from_numpy(vector) for name, vector in file.vectors.items()}, file.digest)


def save_expert(path: Path, manifest: Manifest, z: Mapping[str, torch.Tensor]) -> str:
    """Write an expert's file atomically and return its digest.

    Raises:
        ExpertFileError: z and the manifest disagree, or a value is not finite.
        StorageError: the file cannot be written; what was there stays.
    """
    vectors: dict[str, Vector] = {name: vector.detach().float().cpu().numpy() for name, vector in z.items()}
    return write_expert(path, manifest, vectors)


def distinct(experts: Sequence[Expert]) -> list[Expert]:
    """Experts of the same name get a part of their digest appended, so that a record tells them apart."""
    names = [expert.name for expert in experts]
    return [
        replace(e, manifest=e.manifest.model_copy(update={"name": f"{e.name}-{e.digest[:8]}"}))
        if names.count(e.name) > 1
        else e
        for e in experts
    ]


def by_weight(z: Mapping[str, torch.Tensor], aliases: Mapping[str, str], whose: str) -> Z:
    """Merge the vectors of shared weights: return one vector per weight, under its first name.

    Args:
        z: vectors, by any name of their weights.
        aliases: further names of shared weights, mapped to the first name.
        whose: owner of the vectors, for messages.

    Raises:
        ExpertMismatchError: two names of one weight have different vectors.
    """
    if not any(name in aliases for name in z):
        return z if isinstance(z, dict) else dict(z)
    found: Z = {}
    first: dict[str, str] = {}
    for name, vector in z.items():
        own = aliases.get(name, name)
        if own not in found:
            found[own], first[own] = vector, name
        elif not torch.equal(found[own].detach().float().cpu(), vector.detach().float().cpu()):
            raise ExpertMismatchError(
                f"{whose} has different vectors for {first[own]} and {name}, which are one weight of the model; "
                "give both names the same vector"
            )
    return found


def of_weights(expert: Expert, base: BaseModelRef, ranks: Mapping[str, int]) -> Expert:
    """Rename an expert's vectors to the first names of a base model's shared weights.

    An expert of an untied copy of the model has one vector for each layer that shares a weight. Such an expert fits if
    these vectors agree. Any other expert is returned unchanged.

    Args:
        expert, base, ranks: see :func:`check_expert`.

    Raises:
        ExpertMismatchError: two names of one weight have different vectors.
    """
    aliases: Mapping[str, str] = getattr(ranks, "aliases", {})
    if not aliases or not all(name in ranks or name in aliases for name in expert.z):
        return expert
    z = by_weight(expert.z, aliases, f"expert {expert.name}")
    update: dict[str, object] = {"targets": {name: len(vector) for name, vector in z.items()}}
    if expert.manifest.base.fingerprint == getattr(ranks, "untied", None):
        update["base"] = expert.manifest.base.model_copy(update={"fingerprint": base.fingerprint})
    return replace(expert, z=z, manifest=expert.manifest.model_copy(update=update))


def check_expert(expert: Expert, base: BaseModelRef, ranks: Mapping[str, int]) -> None:
    """Check that an expert belongs to a base model.

    Args:
        expert: the expert.
        base: the model as loaded.
        ranks: the rank of each of its adaptable matrices; :class:`t2.adapters.targets.Ranks` also has their aliases.

    Raises:
        ExpertMismatchError: matrices or ranks differ, or they agree but the weights are not those it was trained on.
    """
    expert = of_weights(expert, base, ranks)
    for name, rank in expert.manifest.targets.items():
        if name not in ranks:
            raise ExpertMismatchError(
                f"expert {expert.name} scales {name}, which {base.id} does not have; it was trained on "
                f"{expert.manifest.base.id}: choose an expert of {base.id} or that model, or use transfer=resample"
            )
        if ranks[name] != rank:
            raise ExpertMismatchError(
                f"expert {expert.name} has rank {rank} for {name}, {base.id} has {ranks[name]}; it was trained on "
                f"{expert.manifest.base.id}: choose an expert of {base.id} or that model, or use transfer=resample"
            )
    if expert.manifest.base.fingerprint != base.fingerprint:
        raise ExpertMismatchError(
            f"expert {expert.name} was trained on other weights ({expert.manifest.base.id}, fingerprint "
            f"{expert.manifest.base.fingerprint[:12]}) than {base.id} ({base.fingerprint[:12]}) has; "
            "names and ranks agree, so transfer=strict applies it all the same"
        )


def mix(experts: Sequence[Z], alpha: Sequence[float], space: Space = "paper", normalise: Normalise = "none") -> Z:
    """Mix experts.

    ``paper``: z′ = Σ αₖ zₖ. ``delta``: z′ = 1 + Σ αₖ (zₖ − 1), the base at the origin. A matrix that an expert does not
    hold counts as z = 1 in it.

    Args:
        experts: K experts' vectors.
        alpha: K coefficients.
        space: as above.
        normalise: ``sum`` divides α by its sum.

    Raises:
        ArgumentError: lengths differ, or ``normalise=sum`` and the coefficients sum to zero.
    """
    if len(alpha) != len(experts):
        raise ArgumentError(f"alpha has {len(alpha)} coefficients for {len(experts)} experts; give one for each")
    weights = [float(a) for a in alpha]
    if normalise == "sum":
        total = sum(weights)
        if abs(total) < 1e-8:
            raise ArgumentError("alpha sums to zero, which normalise=sum cannot divide by")
        weights = [a / total for a in weights]
    origin = 0.0 if space == "paper" else 1.0
    mixed: Z = {}
    for name in dict.fromkeys(name for z in experts for name in z):
        one = torch.ones(next(len(z[name]) for z in experts if name in z))
        added = torch.zeros(len(one), dtype=torch.float64, device=one.device)
        # Term by term: the order in which a product of matrices adds depends on the CPU, and the last bit of z with it.
        for weight, z in zip(weights, experts, strict=True):
            added += weight * (z.get(name, one).double() - origin)
        mixed[name] = (origin + added).float()
    return mixed


def z_digest(z: Z | None) -> str:
    """Hex SHA-256 of a mixture's vectors; empty for None, the base."""
    if z is None:
        return ""
    digest = hashlib.sha256()
    for name in sorted(z):
        digest.update(name.encode())
        digest.update(z[name].detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def keep_leading(z: Z, rank: int) -> Z:
    """Let only the first ``rank`` components move; the others keep z = 1."""
    return {name: torch.cat([v[:rank], torch.ones_like(v[rank:])]) for name, v in z.items()}


def rescale_nuclear(z: Z, bases: Mapping[str, Basis]) -> Z:
    """Scale z so that each matrix keeps its nuclear norm: z·Σσ / Σ(σ⊙z), matrix by matrix (the public code's rule).

    Raises:
        ArgumentError: Σ(σ⊙z) of a matrix is zero.
    """
    scaled: Z = {}
    for name, vector in z.items():
        sigma = bases[name].sigma.cpu().double()
        norm, moved = float(sigma.sum()), float((sigma * vector).sum())
        if norm and abs(moved) < 1e-8 * norm:
            raise ArgumentError(f"this mixture takes {name} to norm zero, which rescale=nuclear cannot divide by")
        scaled[name] = (vector.double() * (norm / moved)).float() if norm else vector
    return scaled
