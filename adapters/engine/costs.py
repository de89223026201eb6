"""Which form costs less: measured on this model and machine, when there is first enough work to be worth it."""

from __future__ import annotations

import contextlib
import json
import logging
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal

import torch

from t2.adapters.engine.forms import Forms
from t2.adapters.expert import Z
from t2.core.digests import canonical_json, digest_of
from t2.core.errors import StorageError
from t2.core.files import atomic_write
from t2.core.settings import cache_dir

FormName = Literal["weight", "activation"]

_log = logging.getLogger(__name__)
_CHUNK = (64, 1024)
"""Tokens of the timed pass over prompts, on a CPU and on a GPU; more of them cost in proportion."""
_WORTH = 64
"""Work is worth measuring for from so many times the tokens that measuring takes."""
_SPAN = 12
_NEAR = 4e-6


@dataclass(frozen=True)
class Load:
    """Work under one mixture, or of one batch of many.

    Attributes:
        rows: rows side by side.
        prompt: tokens of all their prompts, with padding.
        steps: tokens that each row generates.
    """

    rows: int
    prompt: int
    steps: int


class CostModel:
    """Seconds that a piece of work takes in either form.

    A pass over m tokens is timed once per form and power of two, a change of the weights when it is first made. What
    was timed is kept in the cache, and holds from then on: timed anew at every start, near-ties of the two forms would
    be decided now this way and now that, and with them near-ties of answers in bfloat16.

    Args:
        model: the model.
        forms: its forms.
        of: tells models apart, for example by their fingerprint.
        clock: seconds.
    """

    def __init__(self, model: Any, forms: Forms, of: str = "", clock: Callable[[], float] = time.perf_counter) -> None:
        self._model = model
        self._forms = forms
        self._of = of
        self._clock = clock
        # Of a prompt only the last logits are computed.
        self._last_only = {"logits_to_keep": 1} if "logits_to_keep" in signature(model.forward).parameters else {}
        self._fixed: dict[str, float] | None = None
        self._switch: dict[bool, float] = {}
        self.last: dict[str, float | str] = {}

    @property
    def measured(self) -> Mapping[str, float]:
        """Seconds by what was timed: ``activation 32`` is one token of 32 rows; ``switch`` a change of the weights."""
        return dict(self._fixed or {})

    def switched(self, seconds: float, known: bool) -> None:
        """Note what a change of the weights took; ``known`` says that it was a sum of what was in memory."""
        self._switch[known] = min(seconds, self._switch.get(known, seconds))

    def choose(
        self, mixtures: Sequence[Z | None], in_turn: Sequence[Load], in_one: Sequence[Load], known: bool
    ) -> FormName:
        """The form that is faster for some work.

        Args:
            mixtures: the mixtures that move something.
            in_turn: the batches when mixtures come in turn.
            in_one: the batches of all mixtures together.
            known: a change of the weights is a sum of what is in memory.

        Returns:
            The activation form also for work so small that measuring would not pay.
        """
        tokens = sum(load.prompt + load.rows * load.steps for load in in_one)
        chunk = _CHUNK[self._model.device.type == "cuda"]
        if not mixtures or tokens < _WORTH * chunk:
            return "activation"
        before = dict(self._known())
        change = self._change(mixtures[0], known)
        weight = change * len(mixtures) + sum(self._seconds("weight", load, mixtures) for load in in_turn)
        activation = sum(self._seconds("activation", load, mixtures) for load in in_one)
        if self._known() != before:
            self._keep()
        chosen: FormName = "weight" if weight < activation else "activation"
        self.last = {"form": chosen, "weight": weight, "activation": activation}
        _log.debug("%d mixtures: %.1f s in weight form, %.1f s in activation form", len(mixtures), weight, activation)
        return chosen

    def _change(self, mixture: Z | None, known: bool) -> float:
        """Seconds of a change of the weights; where a sum was never timed, those of any other change."""
        fixed = self._known()
        if known and True in self._switch:
            return fixed.setdefault("switch (sum)", self._switch[True])
        if known and "switch (sum)" in fixed:
            return fixed["switch (sum)"]
        if "switch" not in fixed:
            for _ in range(2):  # the first may still read the basis from disk
                began = self._clock()
                with self._forms.applied(mixture):
                    self._wait()
                    self.switched(self._clock() - began, known=False)
            fixed["switch"] = self._switch[False]
        return fixed["switch"]

    def _known(self) -> dict[str, float]:
        if self._fixed is None:
            self._fixed = {}
            with contextlib.suppress(OSError, ValueError, AttributeError):
                stored = json.loads(self._path().read_text())
                self._fixed = {str(name): float(seconds) for name, seconds in stored.items()}
        return self._fixed

    def _keep(self) -> None:
        try:
            atomic_write(self._path(), canonical_json(self._known()).encode())
        except StorageError as error:
            _log.warning("%s", error)

    def _path(self) -> Path:
        device = self._model.device
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
        content = [1, self._of, str(self._model.dtype), machine, torch.get_num_threads(), torch.__version__]
        return cache_dir() / "costs" / f"{digest_of(content)}.json"

    def _seconds(self, form: FormName, load: Load, mixtures: Sequence[Z | None]) -> float:
        chunk = _CHUNK[self._model.device.type == "cuda"]
        most = 4 * chunk
        rows = min(most, 1 << max(0, load.rows - 1).bit_length())
        step = self._pass(form, rows, 1, mixtures) * max(1.0, load.rows / most)
        return load.steps * step + load.prompt / chunk * self._pass(form, 1, chunk, mixtures)

    def _pass(self, form: FormName, rows: int, width: int, mixtures: Sequence[Z | None]) -> float:
        fixed, key = self._known(), f"{form} {rows * width}"
        if key not in fixed:
            ids = torch.zeros(rows, width, dtype=torch.long, device=self._model.device)
            if form == "weight":
                fixed[key] = self._timed(ids)
            else:
                some = list(mixtures[:rows])
                with self._forms.activation(some, torch.arange(rows) % len(some)):
                    fixed[key] = self._timed(ids)
        return fixed[key]

    def _timed(self, ids: torch.Tensor) -> float:
        seconds = []
        for _ in range(2):
            began = self._clock()
            self._model(input_ids=ids, use_cache=False, **self._last_only)
            self._wait()
            seconds.append(self._clock() - began)
        return min(seconds)

    def _wait(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize(self._model.device)


def spanning(mixtures: Sequence[Z | None], before: Sequence[Z]) -> list[Z]:
    """Few mixtures of which, with z = 1, all others seem to be sums.

    Args:
        mixtures: the mixtures.
        before: what was found last; it is given back, the same objects, where it will do.

    Returns:
        Nothing where there would be more than half of them or more than a dozen. What is in the span is decided by the
        first matrix alone, so whoever relies on it looks at the others.
    """
    some = [z for z in mixtures if z]
    name = next((name for z in some for name, vector in z.items() if bool((vector != 1).any())), None)
    if name is None:
        return []
    if covered(some, before):
        return list(before)
    found = _outside(name, some, (), _SPAN + 1)
    return found if len(found) <= min(_SPAN, len(some) // 2) else []


def covered(mixtures: Sequence[Z | None], before: Sequence[Z]) -> bool:
    """Whether mixtures seem to be sums of those found before and z = 1, by the first matrix that moves."""
    some = [z for z in mixtures if z]
    name = next((name for z in some for name, vector in z.items() if bool((vector != 1).any())), None)
    return name is not None and bool(before) and all(name in z for z in before) and not _outside(name, some, before, 1)


def _outside(name: str, mixtures: Sequence[Z], given: Sequence[Z], most: int) -> list[Z]:
    """Mixtures outside the span of those given and those found before them, at most so many."""
    directions: list[torch.Tensor] = []
    found: list[Z] = []
    given_too = [{name: torch.full_like(mixtures[0][name], 2.0)} if name in mixtures[0] else {}, *given]
    for number, z in enumerate((*given_too, *mixtures)):
        if name not in z or len(found) == most:
            continue
        rest = z[name].detach().cpu().double() - 1
        bound = _NEAR * (1 + float(z[name].abs().max())) * len(rest) ** 0.5
        for _ in range(2):  # once leaves rounding errors of what is taken off
            for direction in directions:
                rest = rest - direction * (rest @ direction)
        if float(rest.norm()) > bound:
            directions.append(rest / rest.norm())
            if number >= len(given_too):
                found.append(z)
    return found
