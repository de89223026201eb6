"""The forward and backward passes of a training, cut so that they fit into memory."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import torch
from tqdm import tqdm

from t2.adapters.engine.checkpointing import checkpointed
from t2.adapters.engine.likelihood import Branches, LikelihoodModel
from t2.adapters.engine.transformers import TransformersEngine
from t2.core.errors import TrainingError
from t2.core.seeds import derive_seed
from t2.training.config import CheckpointingName

Result = TypeVar("Result")
Gradient = tuple[torch.Tensor | None, ...]


class Passes:
    """Cuts work into passes; out of memory makes them smaller, and the work goes on where it was.

    A pass that ran out of memory leaves nothing behind and is cut again at half its tokens, as are all passes after
    it. A step's gradient is the same sum, whichever way it is cut. With ``checkpointing`` of ``auto`` a single document
    that does not fit alone is run with gradient checkpointing, and so is all that comes after it.

    Args:
        engine: the model's forms.
        model: runs the passes.
        micro_tokens: at most so many tokens in one pass, at first.
        rank: only the first so many components of each vector are trained; None means all.
        checkpointing: compute each layer's activations again in the backward pass: ``on``, ``off`` or ``auto``.
        seed: of what an adapter draws in a pass, together with the step and the pass's number in it.
    """

    def __init__(
        self,
        engine: TransformersEngine,
        model: LikelihoodModel,
        micro_tokens: int,
        rank: int | None = None,
        checkpointing: CheckpointingName = "auto",
        seed: int = 0,
    ) -> None:
        self.engine = engine
        self.model = model
        self.micro_tokens = micro_tokens
        self.rank = rank
        self.checkpointing: CheckpointingName = checkpointing
        self.seed = seed
        self._drawn = (0, 0)

    def begin(self, step: int) -> None:
        """Say which step the passes to come are of; what is random in them follows from it."""
        self._drawn = (step, 0)

    def run(
        self, units: Sequence[Sequence[Branches]], work: Callable[[list[int]], Result]
    ) -> Iterator[tuple[list[int], Result]]:
        """Run all units and give what each pass found.

        Args:
            units: the work; what is in one unit stays in one pass.
            work: runs the units of these indices in one pass. It may be called again for units whose pass ran out of
                memory, so it changes nothing itself.

        Raises:
            TrainingError: one unit does not fit into memory.
        """
        waiting = list(range(len(units)))
        while waiting:
            cut = self.model.batches([units[i] for i in waiting], self.micro_tokens)
            done: set[int] = set()
            for batch in cut:
                picked = [waiting[k] for k in batch]
                found = self._attempt(work, picked)
                if found is None:
                    self._shrink([units[i] for i in picked])
                    break
                done.update(picked)
                yield picked, found[0]
            waiting = [i for i in waiting if i not in done]

    @contextlib.contextmanager
    def trained(self, z: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Context of a forward pass under z and of its backward pass."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.engine.trained(z, self.rank))
            if self.engine.random and torch.is_grad_enabled():
                stack.enter_context(self._seeded())
            if self.checkpointing == "on" and torch.is_grad_enabled():
                targets = self.engine.trained_targets(z)
                stack.enter_context(checkpointed(self.engine.model, targets, self.engine.random))
            yield

    @contextlib.contextmanager
    def _seeded(self) -> Iterator[None]:
        step, number = self._drawn
        self._drawn = (step, number + 1)
        with torch.random.fork_rng():
            torch.manual_seed(derive_seed(self.seed, "passes", step, number))
            yield

    @contextlib.contextmanager
    def base(self, z: Mapping[str, torch.Tensor]) -> Iterator[None]:
        """Context of a forward pass of the base, which rounds as one under z does: where z = 1 they are equal."""
        with torch.no_grad(), self.engine.untrained(z, self.rank):
            yield

    def _attempt(self, work: Callable[[list[int]], Result], batch: list[int]) -> tuple[Result] | None:
        try:
            return (work(batch),)
        except (RuntimeError, MemoryError) as error:
            # On a CPU torch raises a plain RuntimeError.
            known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
            if not known and "can't allocate memory" not in str(error):
                raise
        # The error is gone here, and with it the tensors that its traceback held.
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return None

    def _shrink(self, units: Sequence[Sequence[Branches]]) -> None:
        tokens = self.model.tokens(units)
        if len(units) > 1:
            self.micro_tokens = max(1, min(self.micro_tokens, tokens) // 2)
            _say(f"a pass of {tokens} tokens ran out of memory; going on with micro_tokens={self.micro_tokens}")
        elif self.checkpointing == "auto" and torch.is_grad_enabled():
            self.checkpointing = "on"
            _say(f"one document of {tokens} tokens ran out of memory; going on with gradient checkpointing")
        else:
            more = "" if self.checkpointing == "on" else "--checkpointing on, "
            raise TrainingError(
                f"one document of {tokens} tokens does not fit into memory; use {more}shorter documents or fewer "
                "samples of each, dtype=bfloat16 in model_args, or a smaller base model"
            )


def gradient(loss: torch.Tensor, z: Mapping[str, torch.Tensor]) -> Gradient:
    """∂loss/∂z of each vector in turn; None where the loss does not depend on it."""
    return torch.autograd.grad(loss, list(z.values()), allow_unused=True)


def accumulate(z: Mapping[str, torch.Tensor], found: Gradient) -> None:
    """Add a gradient to ``z[…].grad``."""
    for vector, part in zip(z.values(), found, strict=True):
        if part is not None:
            vector.grad = part if vector.grad is None else vector.grad + part


def _say(text: str) -> None:
    tqdm.write(f"t2: {text}", file=sys.stderr)
