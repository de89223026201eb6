"""What t2 adds to vLLM's workers: they keep the way to checkpoint and bases, and make W′ themselves.

vLLM imports :class:`Worker` by name (``worker_extension_cls``) and mixes it into each of its workers, in this process,
in others or on other machines. The process that asks sends z alone: kilobytes, whatever the size of the model. Every
worker reads the base matrices and their bases from disk, as files mapped into memory, and hands whole matrices under
their checkpoint's names to vLLM's own loader, which fuses, shards and packs them as it did when it started.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import safetensors
import safetensors.torch
import torch

from t2.adapters.basis import read_basis
from t2.adapters.engine.weights import composed
from t2.core.errors import ModelError

NAME = f"{__name__}.Worker"
"""What vLLM is told as ``worker_extension_cls``."""

# They say of every layer that is not adapted that it was not loaded again.
_LOGGERS = ("vllm.model_executor.model_loader.reload.layerwise", "vllm.model_executor.model_loader.reload.inplace")


@dataclass(frozen=True)
class Place:
    """Where an adapted matrix comes from.

    Attributes:
        keys: names of its tensors in the checkpoint: one, or one for each layer that shares it.
        digest: :func:`t2.adapters.basis.matrix_digest`, by which its basis is found.
        rank: r.
        transposed: the tensor holds in × out.
    """

    keys: list[str]
    digest: str
    rank: int
    transposed: bool


@dataclass(frozen=True)
class Plan:
    """All that a worker needs to know of the model.

    Attributes:
        places: of the adaptable matrices, by parameter name.
        files: the file of each tensor of the checkpoint.
        bases: the folder of the bases.
    """

    places: Mapping[str, Place]
    files: Mapping[str, str]
    bases: str

    def text(self) -> str:
        """As JSON, which is sent."""
        return json.dumps(asdict(self))

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Of JSON."""
        content = json.loads(text)
        places = {name: Place(**place) for name, place in content["places"].items()}
        return cls(places, content["files"], content["bases"])


class Weights:
    """The weights that turn what a worker holds into a mixture.

    Args:
        plan: the model.
        packed: names of vLLM's layers and of the layers that each of them holds as one; these have to be loaded
            together.
        dtype: of the model in vLLM.
        device: where matrices are composed.
    """

    def __init__(
        self, plan: Plan, packed: Mapping[str, Iterable[str]], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._plan = plan
        self._dtype = dtype
        self._device = device
        self._names = {key: name for name, place in plan.places.items() for key in place.keys}
        self._tensors: dict[str, list[str]] = {}
        for key in plan.files:
            self._tensors.setdefault(key.rpartition(".")[0], []).append(key)
        self._fused = [frozenset(names) for names in packed.values()]
        self._held: dict[str, torch.Tensor] = {}
        self._unsure: set[str] = set()

    def change(self, z: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Tensors under their checkpoint's names: of all layers that ``z`` moves, or that are not the base and should.

        A layer of vLLM is loaded whole: with its bias, and with the layers that vLLM fuses with it.
        """
        differ = [name for name in {**self._held, **z} if not _same(self._held.get(name), z.get(name))]
        changing = self._unsure.union(differ)
        modules: dict[str, None] = {}
        for name in sorted(changing, key=list(self._plan.places).index):
            for key in self._plan.places[name].keys:
                modules.update(dict.fromkeys(self._group(key.rpartition(".")[0])))
        # Should loading stop half way, all of these are loaded again the next time.
        self._unsure |= changing
        for module in modules:
            for key in self._tensors[module]:
                yield key, self._tensor(key, z)
        self._unsure.clear()
        self._held = dict(z)

    def _group(self, module: str) -> list[str]:
        parent, _, leaf = module.rpartition(".")
        together = next((names for names in self._fused if leaf in names and len(names) > 1), frozenset([leaf]))
        return [name for name in (f"{parent}.{own}" for own in sorted(together)) if name in self._tensors]

    def _tensor(self, key: str, z: Mapping[str, torch.Tensor]) -> torch.Tensor:
        with safetensors.safe_open(self._plan.files[key], framework="pt") as file:
            stored: torch.Tensor = file.get_tensor(key)
        name = self._names.get(key)
        if name is None or name not in z:
            return stored
        place = self._plan.places[name]
        basis = read_basis(Path(self._plan.bases), place.digest, place.rank)
        if basis is None:
            raise ModelError(f"the basis of {name} is not in {self._plan.bases}, which every worker has to see")
        w = stored.to(self._device, self._dtype)
        adapted = composed(w.T if place.transposed else w, basis, z[name])
        return (adapted.T if place.transposed else adapted).contiguous()


class _Host(Protocol):
    """vLLM's worker, as far as it is used."""

    device: torch.device
    vllm_config: Any
    t2_weights: Weights

    def get_model(self) -> torch.nn.Module: ...

    def reload_weights(self, weights_iterator: Iterable[tuple[str, torch.Tensor]]) -> None: ...


class Worker:
    """The methods that vLLM's workers get."""

    def t2_open(self, plan: str) -> None:
        """Take up a :class:`Plan`."""
        host = cast("_Host", self)
        packed = getattr(host.get_model(), "packed_modules_mapping", None) or {}
        host.t2_weights = Weights(Plan.parse(plan), packed, host.vllm_config.model_config.dtype, host.device)

    def t2_apply(self, z: bytes) -> None:
        """Become the base under ``z``, a safetensors file's bytes; of no vectors, the base itself."""
        host = cast("_Host", self)
        with torch.no_grad(), _without_warnings():
            host.reload_weights(weights_iterator=host.t2_weights.change(safetensors.torch.load(z)))


def _same(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is other if one is None or other is None else torch.equal(one, other)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
