"""The forms in which a model runs under mixtures: changed weights, hooks on what its layers take and give, factors."""

from __future__ import annotations

import contextlib
import logging
import operator
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from t2.adapters.basis import Basis, load_bases
from t2.adapters.engine.gradients import shifted, spectral
from t2.adapters.engine.memory import free_bytes, total_bytes
from t2.adapters.engine.weights import Directions, KeptWeights, adapted
from t2.adapters.expert import Z, by_weight
from t2.adapters.targets import Target, Use, aliases_of
from t2.core.errors import ModelError

_log = logging.getLogger(__name__)


class ActiveRows:
    """What each row of a batch adds to z = 1, by matrix; rows may leave while the activation form is on.

    Attributes:
        shifts: z − 1, shape (rows, r), or (1, r) for all rows alike.
    """

    def __init__(self, apart: bool, shifts: Mapping[str, torch.Tensor] | None = None) -> None:
        self.shifts: dict[str, torch.Tensor] = dict(shifts or {})
        self._apart = apart

    def keep(self, index: torch.Tensor) -> None:
        """Row i of later forward calls is what row ``index[i]`` was."""
        if self._apart:
            self.shifts = {name: shift[index.to(shift.device)] for name, shift in self.shifts.items()}


class Forms:
    """A model's adaptable matrices, their bases, and the forms over them.

    *Weight form* (:meth:`applied`): each adapted parameter is replaced by W′ = W + Q·diag(z−1)·QᵀW (or its input-side
    twin), summed in float32 and rounded once into the model's dtype; leaving the context puts the original tensors
    back. The weights of mixtures that come back stay in memory as far as a quarter of what is free holds them, and
    applying one of these again only changes pointers; :meth:`switching` makes many new mixtures of known experts cheap.
    A quantised matrix is not replaced: hooks act on it as in activation form.

    *Activation form* (:meth:`activation`): the weights stay, hooks compute y′ = y + Q((z−1)⊙Qᵀy) on the output side,
    where y = Wx before the bias, or x′ = x + Q((z−1)⊙Qᵀx) on the input side. Every row of a batch has its own z.

    *Training form* (:meth:`trained`): W′ as two factors, for one z that gets gradients.

    A weight that several layers share has one z, which acts in all of these layers and in every form. Mixtures may use
    any of the weight's names.

    All hold :attr:`lock`, so threads that ask one model under several mixtures take turns.

    Args:
        base_id: the model's name, for messages.
        targets: its adaptable matrices, by parameter name.
        digests: :func:`t2.adapters.basis.matrix_digest` of each.

    Attributes:
        factors: whether :meth:`trained` holds factors; None decides by the device's memory at first use,
            and what was found then stays.
    """

    def __init__(self, base_id: str, targets: Mapping[str, Target], digests: Mapping[str, str]) -> None:
        self.lock = threading.RLock()
        self.targets = targets
        self._aliases = aliases_of(targets)
        self._base_id = base_id
        self._digests = digests
        self._bases: dict[str, Basis] = {}
        self._factors: dict[tuple[str, torch.dtype], torch.Tensor] = {}
        self._pairs: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self.factors: bool | None = None
        self._kept = KeptWeights(targets)
        self._directions: Directions | None = None
        self._last: Directions | None = None
        self._depth = 0

    def bases(self, names: Iterable[str], progress: bool = True) -> dict[str, Basis]:
        """The bases of some matrices, from memory, else from the cache, else built.

        Raises:
            ModelError: the model has no such matrix.
            StorageError: a basis could not be written to the cache.
        """
        wanted = {name: self._aliases.get(name, name) for name in names}
        missing = [name for name in dict.fromkeys(wanted.values()) if name not in self._bases]
        for name in missing:
            if name not in self.targets:
                raise ModelError(f"{self._base_id} has no adaptable matrix {name}")
        if missing:
            targets = {name: self.targets[name] for name in missing}
            with self.lock:  # not of weights that another thread has adapted
                self._bases.update(load_bases(targets, self._digests, progress=progress))
        return {name: self._bases[own] for name, own in wanted.items()}

    def preload(self, bases: Mapping[str, Basis]) -> None:
        """Take bases that are at hand, instead of reading or building them."""
        self._bases.update(bases)

    @contextlib.contextmanager
    def applied(self, z: Z | None) -> Iterator[None]:
        """Weight form: inside the context the model is the base under ``z``, for any caller; None is the base.

        The base comes back bit for bit, also after an error.

        Raises:
            ModelError: the model has no matrix of that name.
            ExpertMismatchError: two names of one weight have different vectors.
        """
        moving = {name: vector for name, vector in self._by_weight(z or {}).items() if bool((vector != 1).any())}
        self.bases(moving)
        hooked = {name: vector for name, vector in moving.items() if self.targets[name].form is not None}
        changed = {name: vector for name, vector in moving.items() if name not in hooked}
        originals: list[tuple[torch.nn.Parameter, torch.Tensor]] = []
        with self.lock:
            self._depth += 1
            try:
                for name, weight in self._weights(changed).items():
                    own, *others = self.targets[name].uses
                    originals += _replace(own.parameter, weight)
                    for use in others:
                        if use.parameter is not own.parameter:  # another view of the same memory
                            originals += _replace(use.parameter, use.stored(own.stored(weight)))
                with self.activation([hooked]):
                    yield
            finally:
                self._depth -= 1
                for parameter, original in reversed(originals):
                    parameter.data = original

    @contextlib.contextmanager
    def switching(self, experts: Sequence[Z], mixtures: Sequence[Z | None]) -> Iterator[None]:
        """Context in which many mixtures are :meth:`applied` one after another, at little cost each.

        Where more of them are mixtures of ``experts`` than there are experts, and memory holds it, each expert's ΔW is
        computed once (:class:`~t2.adapters.engine.weights.Directions`) and such a mixture costs a weighted sum, which
        moves about as many bytes as K + 2 copies of the matrices; any other z costs what it costs outside. ΔW stays in
        memory for the next such context over the same experts; :meth:`release` lets it go.

        W′ is the same up to rounding of the float32 sum, about 1e-6 of W. Outside the context weights are always
        computed from z alone, so that what an answer is does not depend on what was applied before.
        """
        with self.lock:
            outer = self._directions
            self._directions = self._directions_of(experts, mixtures)
            try:
                yield
            finally:
                self._directions = outer

    @property
    def kept_bytes(self) -> int:
        """Bytes of adapted weights, directions and factors that are held outside any context."""
        directions = {id(d): d.size for d in (self._directions, self._last) if d is not None and d.built}
        pairs = sum(factor.nbytes for pair in self._pairs.values() for factor in pair)
        return self._kept.size + sum(directions.values()) + pairs

    def release(self) -> None:
        """Let go what is in memory only to make changes of the mixture cheap: after it memory is as it was at first."""
        with self.lock:
            self._kept.clear()
            self._pairs.clear()
            for directions in (self._directions, self._last):
                if directions is not None:
                    directions.clear()

    def _directions_of(self, experts: Sequence[Z], mixtures: Sequence[Z | None]) -> Directions | None:
        if len(mixtures) <= len(experts):
            return None
        last = self._last
        if last is None or len(last.experts) != len(experts) or any(map(operator.is_not, last.experts, experts)):
            named = [self._by_weight(expert) for expert in experts]
            last = Directions(self.targets, lambda names: self.bases(names, progress=False), named)
        # Ignores whether the directions are in memory already: answers must not depend on earlier requests.
        own = sum(1 for z in mixtures if z and last.coefficients(self._moving(self._by_weight(z))) is not None)
        if own <= len(experts):
            return None
        if self._last is not None and self._last is not last:
            self._last.clear()
        self._last = last
        return last if last.build() else None

    def _moving(self, z: Z) -> Z:
        """What is applied in weights."""
        return {name: v for name, v in z.items() if self.targets[name].form is None and bool((v != 1).any())}

    def _weights(self, z: Z) -> Mapping[str, torch.Tensor]:
        """W′ of each matrix."""
        # In a nested context the weights to adapt are not the base's.
        if self._depth > 1 or not z:
            return {name: adapted(self.targets[name], self._bases[name], vector) for name, vector in z.items()}
        if self._directions is not None and (coefficients := self._directions.coefficients(z)) is not None:
            return self._directions.weights(coefficients)
        if (kept := self._kept.find(z)) is not None:
            return kept
        weights = {name: adapted(self.targets[name], self._bases[name], vector) for name, vector in z.items()}
        self._kept.keep(z, weights)
        return weights

    @contextlib.contextmanager
    def activation(
        self, mixtures: Sequence[Mapping[str, torch.Tensor] | None], rows: torch.Tensor | None = None
    ) -> Iterator[ActiveRows]:
        """Activation form: inside the context, row b of every forward call runs under ``mixtures[rows[b]]``.

        Args:
            mixtures: z by parameter name, each of shape (r,); None is the base. Vectors that require gradients get
            them. rows: shape (batch,), integer; None means that all rows use the only mixture.

        Raises:
            ModelError: a layer's input has another leading dimension than ``rows``.
            ExpertMismatchError: two names of one weight have different vectors.
        """
        if rows is None and len(mixtures) != 1:
            raise ValueError(f"{len(mixtures)} mixtures need rows")
        named = [self._by_weight(mixture or {}) for mixture in mixtures]
        names = dict.fromkeys(name for mixture in named for name in mixture)
        moving = [name for name in names if any(_moves(mixture.get(name)) for mixture in named)]
        bases = self.bases(moving)
        handles = []
        active = ActiveRows(rows is not None)
        with self.lock:
            try:
                for name in moving:
                    rank = self.targets[name].rank
                    shifts = [
                        torch.zeros(rank) if vector is None else vector.float() - 1
                        for vector in (mixture.get(name) for mixture in named)
                    ]
                    shift = torch.stack([shift.to(self.targets[name].parameter.device) for shift in shifts])
                    if rows is not None:
                        shift = shift[rows.to(shift.device)]
                    active.shifts[name] = shift
                    handles += self._register_hooks(name, bases[name], active)
                yield active
            finally:
                for handle in handles:
                    handle.remove()

    def _register_hooks(self, name: str, basis: Basis, active: ActiveRows) -> list[torch.utils.hooks.RemovableHandle]:
        """Register hooks on every layer that uses a matrix."""

        def move(x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
            shift = active.shifts[name]
            # Mixture-of-experts layers flatten (rows, positions), row after row.
            if shift.shape[0] not in (1, x.shape[0]) and (x.dim() != 2 or x.shape[0] % shift.shape[0]):
                raise ModelError(
                    f"{name} sees {x.shape[0]} rows in a batch of {shift.shape[0]}; this layer mixes rows, "
                    "so it can only be adapted in weight form"
                )
            return shifted(x, shift, self._factor(name, x.dtype)[:, : shift.shape[1]], bias)

        def before(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            return (move(args[0], None), *args[1:])

        def after(layer: nn.Module, _: tuple[Any, ...], y: torch.Tensor) -> torch.Tensor:
            return move(y, layer.bias if isinstance(layer.bias, torch.Tensor) else None)

        return [
            # The out side of W is the in side of its transpose.
            use.module.register_forward_hook(after)
            if (basis.side == "out") != use.flipped
            else use.module.register_forward_pre_hook(before)
            for use in self.targets[name].uses
        ]

    @contextlib.contextmanager
    def trained(self, z: Mapping[str, torch.Tensor], rank: int | None = None) -> Iterator[None]:
        """Training form: inside the context every forward call runs under ``z``, which gets gradients at least cost.

        W′ is run as its two spectral factors (:class:`~t2.adapters.engine.gradients.Spectral`) in place of W. Hooks, as
        in activation form, serve where these do not: matrices of which fewer than half of the components move,
        quantised ones, layers of an unknown kind, and all of them where the factors, about as large as the adapted
        weights, would take more than a quarter of the device's memory; see :attr:`factors`. The factors
        stay for the next context; :meth:`release` lets them go. A backward pass that recomputes activations must run
        inside too.

        Args:
            z: by parameter name, each of shape (r,); matrices that are not in it are those of the base.
            rank: only the first so many components of each vector move, the others are 1.

        Raises:
            ModelError: the model has no matrix of that name, or memory no longer holds the factors.
            ExpertMismatchError: two names of one weight have different vectors.
        """
        z = self._by_weight(z)
        bases = self.bases(z)
        with self.lock, contextlib.ExitStack() as stack:
            pairs = self._spectral([name for name in z if rank is None or 2 * rank >= self.targets[name].rank])
            for name, shift in self._shifts(z).items():
                if name in pairs:
                    for use in self.targets[name].uses:
                        stack.callback(use.module.__dict__.pop, "forward", None)
                        use.module.__dict__["forward"] = _spectral_forward(use, shift, *pairs[name])
                else:
                    alike = ActiveRows(False, {name: shift[: rank or len(shift)].unsqueeze(0)})
                    for handle in self._register_hooks(name, bases[name], alike):
                        stack.callback(handle.remove)
            yield

    def _by_weight(self, z: Mapping[str, torch.Tensor]) -> Z:
        return by_weight(z, self._aliases, f"a mixture on {self._base_id}")

    def _shifts(self, z: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """z − 1 of each matrix on its device, in float32; one copy, and of the gradients one back, for all."""
        found: dict[str, torch.Tensor] = {}
        devices = {name: self.targets[name].parameter.device for name in z}
        for device in dict.fromkeys(devices.values()):
            names = [name for name in z if devices[name] == device]
            flat = torch.cat([z[name].float() for name in names]).to(device) - 1
            found |= zip(names, torch.split(flat, [len(z[name]) for name in names]), strict=True)
        return found

    def _spectral(self, names: Iterable[str]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """The factors (D, U) of the matrices that can be run by them, as far as memory holds them."""
        able = [name for name in names if _is_plain_layer(self.targets[name])]
        missing = [name for name in able if name not in self._pairs]
        wanted = [self.targets[name] for name in missing]
        size = sum((target.parameter.numel() + target.rank**2) * target.parameter.itemsize for target in wanted)
        if missing:
            device = wanted[0].parameter.device
            free = free_bytes(device)
            if self.factors is None:
                # By total memory, not free memory: hooks and factors round differently.
                self.factors = size <= total_bytes(device) // 4
                if self.factors and size > free:
                    self.factors = False
                    _log.warning(
                        "factors of the weights need %.2f GB, and %.2f GB are free on %s; training uses hooks instead, "
                        "which are slower and round differently",
                        size / 1e9,
                        free / 1e9,
                        device,
                    )
            if self.factors and size > free:
                raise ModelError(
                    f"the training began with factors of the weights in memory, which take {size / 1e9:.2f} GB, and "
                    f"{free / 1e9:.2f} GB are free; free some, or begin again with --overwrite"
                )
        if not self.factors:
            return {}
        for name in missing:
            target = self.targets[name]
            dtype = target.parameter.dtype
            w = target.matrix.to(torch.promote_types(dtype, torch.float32))
            q = self._bases[name].q.to(w)
            down, up = (q.T @ w, q) if self._bases[name].side == "out" else (q.T, w @ q)
            self._pairs[name] = down.to(dtype).contiguous(), up.to(dtype).contiguous()
        return {name: self._pairs[name] for name in able}

    def _factor(self, name: str, dtype: torch.dtype) -> torch.Tensor:
        key = (name, dtype)
        if key not in self._factors:
            parameter = self.targets[name].parameter
            self._factors[key] = self._bases[name].q.to(parameter.device, dtype)
        return self._factors[key]


def _moves(vector: torch.Tensor | None) -> bool:
    return vector is not None and (vector.requires_grad or bool((vector != 1).any()))


def _replace(parameter: nn.Parameter, weight: torch.Tensor) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Replace a parameter's data; return the parameter with its original data."""
    original = parameter.data
    parameter.data = weight
    return [(parameter, original)]


def _is_plain_layer(target: Target) -> bool:
    """Whether all layers of a target compute x·Wᵀ + b and nothing else."""
    modules = [use.module for use in target.uses]
    plain = all(type(module).forward in (nn.Linear.forward, Conv1D.forward) for module in modules)
    return plain and target.form is None and not any("forward" in module.__dict__ for module in modules)


def _spectral_forward(
    use: Use, shift: torch.Tensor, down: torch.Tensor, up: torch.Tensor
) -> Callable[[torch.Tensor], torch.Tensor]:
    bias = use.module.bias if isinstance(use.module.bias, torch.Tensor) else None
    if use.flipped:
        down, up = up.T.contiguous(), down.T.contiguous()

    def forward(x: torch.Tensor) -> torch.Tensor:
        return spectral(x, shift, down, up, bias)

    return forward
