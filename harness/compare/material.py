"""What the pictures of a report need beside the cells: spectra of the base, profiles and reward curves of experts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict

from t2.adapters.engine import Engine
from t2.adapters.expert import Expert
from t2.adapters.spectrum import kept
from t2.adapters.targets import layer_of
from t2.core.digests import sha256_file
from t2.core.errors import DataError
from t2.core.manifest import BaseModelRef
from t2.harness.catalogue import known_experts
from t2.harness.compare.members import Member, origin_of
from t2.harness.runs import read_run

SHARES = (1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
"""Parts of a matrix's components whose share of Σσ is told."""
_BINS = 32


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Spectrum(_Frozen):
    """Singular values of one matrix: the share of Σσ in its first components, for each of :data:`SHARES`."""

    module: str
    layer: int
    rank: int
    sigma: tuple[float, ...]


class Profile(_Frozen):
    """How an expert moves components, by their place from the largest σ (0) to the smallest (1), over all its matrices.

    Attributes:
        places: middles of the bins.
        mean, low, high: of z − 1 in each bin: the mean, and the 10% and 90% quantiles.
        layers: root mean square of z − 1 by layer.
    """

    expert: str
    places: tuple[float, ...]
    mean: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]
    layers: dict[int, float]


class Learned(_Frozen):
    """An expert's reward curve: step, split, reward and score of each point."""

    expert: str
    points: tuple[tuple[int, str, float, float], ...]


class Material(_Frozen):
    """All of it."""

    spectra: tuple[Spectrum, ...] = ()
    profiles: tuple[Profile, ...] = ()
    curves: tuple[Learned, ...] = ()


def gather(engine: Engine | None, experts: Sequence[Expert]) -> Material:
    """What is known of a base and its experts.

    Args:
        engine: over the base; None where it cannot be adapted.
        experts: that took part.
    """
    if engine is None or not experts:
        return Material()
    ranks = engine.ranks()
    names = dict.fromkeys(name for expert in experts for name in expert.z if name in ranks)
    sigmas = {name: basis.sigma for name, basis in engine.bases(names).items()}
    return Material(
        spectra=tuple(spectra(sigmas)),
        profiles=tuple(profile(expert, _called(expert, engine.base)) for expert in experts),
        curves=tuple(curves(experts, engine.base)),
    )


def spectra(sigmas: Mapping[str, torch.Tensor]) -> Iterable[Spectrum]:
    """The share of Σσ in the first components of each matrix of a layer."""
    for name, sigma in sigmas.items():
        layer = layer_of(name)
        if layer is None:
            continue
        rank = len(sigma)
        found = kept({name: sigma}, {name: name}, [max(1, math.ceil(share * rank)) for share in SHARES])
        module = name.removesuffix(".weight").rpartition(".")[2]
        yield Spectrum(module=module, layer=layer, rank=rank, sigma=tuple(round(one.sigma, 6) for one in found))


def profile(expert: Expert, called: str) -> Profile:
    """Where an expert moves components of the base that it was trained on, and how far."""
    bins: list[list[torch.Tensor]] = [[] for _ in range(_BINS)]
    squares: dict[int, list[torch.Tensor]] = {}
    for name, z in expert.z.items():
        moved = z.double() - 1
        places = (torch.arange(len(moved)) * _BINS) // len(moved)
        for index in range(_BINS):
            bins[index].append(moved[places == index])
        layer = layer_of(name)
        if layer is not None:
            squares.setdefault(layer, []).append(moved.square())
    joined = [(index, torch.cat(parts)) for index, parts in enumerate(bins)]
    joined = [(index, values) for index, values in joined if len(values)]
    return Profile(
        expert=called,
        places=tuple((index + 0.5) / _BINS for index, _ in joined),
        mean=tuple(float(values.mean()) for _, values in joined),
        low=tuple(float(_quantile(values, 0.1)) for _, values in joined),
        high=tuple(float(_quantile(values, 0.9)) for _, values in joined),
        layers={layer: float(torch.cat(parts).mean().sqrt()) for layer, parts in sorted(squares.items())},
    )


def curves(experts: Sequence[Expert], base: BaseModelRef) -> Iterable[Learned]:
    """The reward curves that lie beside the files of experts on this machine."""
    files = {sha256_file(path): path for path in known_experts().values()}
    for expert in experts:
        path = files.get(expert.digest)
        if path is None:
            continue
        try:
            points = read_run(path).curve
        except DataError:
            continue  # a picture less
        if points:
            yield Learned(
                expert=_called(expert, base),
                points=tuple((point.step, point.split, point.reward, point.score) for point in points),
            )


def _called(expert: Expert, base: BaseModelRef) -> str:
    return Member(expert.name, "", origin_of(expert, base)).label


def _quantile(values: torch.Tensor, share: float) -> float:
    ordered = values.sort().values
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))])
