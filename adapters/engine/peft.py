"""The engine over a model with an adapter of PEFT in it, whose parameters come and go as z does."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import peft
import safetensors.torch
import torch
import transformers
from peft.tuners.tuners_utils import BaseTunerLayer

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z
from t2.adapters.peft_folder import CONFIG, WEIGHTS
from t2.adapters.targets import Target
from t2.core.digests import canonical_json
from t2.core.files import atomic_write
from t2.core.seeds import derive_seed

PeftMethod = Literal["lora", "dora", "ia3"]


@dataclass(frozen=True)
class PeftForm:
    """Which adapter it is.

    Attributes:
        method: ``lora`` (arXiv 2106.09685), ``dora`` (2402.09353) or ``ia3`` (2205.05638).
        rank: r of the update B·A, for ``lora`` and ``dora``.
        alpha: the update counts α/r times.
        dropout: of the update's input, while a gradient is taken.
    """

    method: PeftMethod
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05


class PeftEngine(TransformersEngine):
    """A ``transformers`` causal language model with an adapter of PEFT that stands aside until it is asked for.

    Where :class:`TransformersEngine` takes z by matrix name, :meth:`applied` and :meth:`trained` of this one take the
    adapter's parameters by theirs; None is the base. Its other methods are for the model as it then is.

    Args:
        model, tokenizer, base_id, revision, batch_size, moe: as for :class:`TransformersEngine`.
        adapter: which adapter.
        matrices: names of the matrices that it adapts, of :attr:`targets`.
        seed: of the parameters' first values, which are PEFT's own.
    """

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        tokenizer: transformers.PreTrainedTokenizerBase,
        base_id: str,
        revision: str | None = None,
        *,
        adapter: PeftForm,
        matrices: Collection[str],
        seed: int = 0,
        batch_size: int | None = None,
        moe: str = "refuse",
    ) -> None:
        super().__init__(model, tokenizer, base_id, revision, batch_size=batch_size, moe=moe)
        self.adapter = adapter
        self._adapted = {name: self.targets[name] for name in matrices}
        inner = [target for target in self._adapted.values() if target.kind == "mlp" and _narrows(target)]
        # Each layer has its own adapter, also layers that share a weight.
        self._modules, self._inner = _named(*map(_all_names, (self.targets.values(), self._adapted.values(), inner)))
        transposed = any(target.transposed for target in self._adapted.values())
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive_seed(seed, "peft"))
            self._peft: Any = peft.get_peft_model(model, _config(adapter, self._modules, self._inner, transposed))
        self._layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        self._places = {
            f"{name}.{key}" if name else key: (module, key)
            for name, module in model.named_modules()
            for key, parameter in module.named_parameters(recurse=False)
            if parameter.requires_grad
        }
        model.train(False).requires_grad_(False)
        self._stand_aside()

    @property
    def random(self) -> bool:
        """Dropout draws from torch's random state."""
        return self.adapter.method != "ia3" and self.adapter.dropout > 0

    def parameters(self) -> Z:
        """The adapter's parameters as they are at first, float32, on the CPU."""
        return {name: module._parameters[key].detach().float().cpu() for name, (module, key) in self._places.items()}

    @contextlib.contextmanager
    def applied(self, z: Z | None) -> Iterator[None]:
        """Inside the context the model has the adapter with these parameters, for any caller; None leaves it be."""
        if z is None:
            with super().applied(None):
                yield
            return
        with self.lock, self._placed(z):
            yield

    @contextlib.contextmanager
    def trained(self, z: Mapping[str, torch.Tensor], rank: int | None = None) -> Iterator[None]:
        """Training form: gradients reach the given tensors, and dropout acts where gradients are taken."""
        acts = self.random and torch.is_grad_enabled()
        with self.lock, self._placed(z):
            for layer in self._layers:
                layer.train(acts)
            try:
                yield
            finally:
                for layer in self._layers:
                    layer.train(False)

    @contextlib.contextmanager
    def untrained(self, z: Mapping[str, torch.Tensor], rank: int | None = None) -> Iterator[None]:
        """The base, whatever ``z``."""
        with self.lock:
            yield

    def trained_targets(self, z: Mapping[str, torch.Tensor]) -> dict[str, Target]:
        """The matrices that the adapter changes."""
        return self._adapted

    def write(self, folder: Path, z: Z) -> None:
        """Write the adapter as PEFT's ``save_pretrained`` does, the same bytes each time; the weights come last.

        Raises:
            StorageError: a file cannot be written.
        """
        with self.applied(z):
            state = {
                name: tensor.detach().float().cpu().contiguous().clone()
                for name, tensor in peft.get_peft_model_state_dict(self._peft, save_embedding_layers=False).items()
            }
        config = self._peft.peft_config["default"].to_dict()
        plain = {key: sorted(value) if isinstance(value, (set, frozenset)) else value for key, value in config.items()}
        # Where names are long PEFT puts shorter ones in the place of some.
        plain |= {
            "target_modules": self._modules,
            "inference_mode": True,
            "base_model_name_or_path": self.base.id,
            "revision": self.base.revision,
        }
        atomic_write(folder / CONFIG, (canonical_json(plain) + "\n").encode())
        atomic_write(folder / WEIGHTS, safetensors.torch.save(state, metadata={"format": "pt"}))

    def close(self) -> None:
        """Take the adapter out of the model, which is the base again."""
        self._peft.unload()

    @contextlib.contextmanager
    def _placed(self, z: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """The tensors in the place of the adapter's parameters, and the adapter acting."""
        own = {name: module._parameters[key] for name, (module, key) in self._places.items()}
        try:
            for name, (module, key) in self._places.items():
                module._parameters[key] = z[name].to(own[name])
            for layer in self._layers:
                layer._disable_adapters = False
            yield
        finally:
            for name, (module, key) in self._places.items():
                module._parameters[key] = own[name]
            self._stand_aside()

    def _stand_aside(self) -> None:
        # PEFT's own switch also sets requires_grad, which tensors that stand for parameters do not bear.
        for layer in self._layers:
            layer._disable_adapters = True


def _named(targets: Collection[str], *groups: Collection[str]) -> list[list[str]]:
    """The modules of groups of matrices as PEFT matches them: by their last parts where no group means others by them.

    PEFT wants some groups to be part of others by name, so all are told in one way.
    """
    last = [sorted({name.split(".")[-2] for name in group}) for group in groups]
    meant = [{name for name in targets if name.split(".")[-2] in names} for names in last]
    if meant == [set(group) for group in groups]:
        return last
    return [sorted(name.removesuffix(".weight") for name in group) for group in groups]


def _all_names(targets: Iterable[Target]) -> list[str]:
    return [name for target in targets for name in (target.name, *target.aliases)]


def _narrows(target: Target) -> bool:
    out, inner = target.shape
    return inner > out


def _config(form: PeftForm, modules: list[str], inner: list[str], transposed: bool) -> peft.PeftConfig:
    common: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": modules, "fan_in_fan_out": transposed}
    if form.method == "ia3":
        # Where the feed-forward part narrows again, what goes in is scaled, elsewhere what comes out.
        return peft.IA3Config(**common, feedforward_modules=inner)
    alpha: Any = int(form.alpha) if float(form.alpha).is_integer() else form.alpha
    return peft.LoraConfig(
        **common, r=form.rank, lora_alpha=alpha, lora_dropout=form.dropout, use_dora=form.method == "dora"
    )
