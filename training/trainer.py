"""The training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import tqdm

from t2.adapters.engine.forms import Forms
from t2.core.curve import CurvePoint, append_point
from t2.core.errors import TrainingError
from t2.training.checkpoint import Checkpoint, Progress, save_checkpoint
from t2.training.config import TrainConfig
from t2.training.parameters import Trainable
from t2.training.problem import Measured, Problem
from t2.training.split import batch_docs


def learning_rate(config: TrainConfig, step: int) -> float:
    """The learning rate of a step: linear warmup, then constant, or half a cosine down to zero.

    It follows from the configuration and the step's number alone. The cosine reaches zero after ``decay_steps``, which
    are ``steps`` unless given; so with ``decay_steps``, or with a constant rate, a run of more steps begins as one of
    fewer does.

    Args:
        config: gives ``learning_rate``, ``warmup``, ``schedule``, ``steps`` and ``decay_steps``.
        step: from 0.
    """
    if step < config.warmup:
        return config.learning_rate * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.learning_rate
    done = (step - config.warmup) / ((config.decay_steps or config.steps) - config.warmup)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * done))


def finished(config: TrainConfig, state: Progress) -> bool:
    """Whether the steps are done, or validation has not improved for too long."""
    return state.step >= config.steps or (config.patience > 0 and state.stale >= config.patience)


class Trainer:
    """AdamW on θ with clipping, a schedule, validation and early stopping where there is a base to beat, checkpoints.

    Args:
        config: the run's configuration.
        identity: digest of all that decides the outcome; stored in checkpoints.
        problem: gives measurements and gradients.
        parameters: the layout of θ.
        train_docs: number of training documents.
        folder: gets ``curve.jsonl`` and ``checkpoint.safetensors`` as training goes.
        checkpoint_every: steps between checkpoints; each validation makes one too.
        progress: show a progress bar.
        observe: is told each point of the curve as it is written.
        forms: of the model that is trained; what they decide by the memory at hand is kept in checkpoints.
    """

    def __init__(
        self,
        config: TrainConfig,
        identity: str,
        problem: Problem,
        parameters: Trainable,
        train_docs: int,
        folder: Path,
        *,
        checkpoint_every: int = 5,
        progress: bool = True,
        observe: Callable[[CurvePoint], None] | None = None,
        forms: Forms | None = None,
    ) -> None:
        self.config = config
        self.identity = identity
        self.problem = problem
        self.parameters = parameters
        self.train_docs = train_docs
        self.folder = folder
        self.checkpoint_every = checkpoint_every
        self.progress = progress
        self.observe = observe
        self.forms = forms
        self._points = 0
        self._earlier = 0.0
        self._began = time.monotonic()

    def run(self, base: Measured | None, checkpoint: Checkpoint | None = None) -> Checkpoint:
        """Train until the steps are done or validation no longer improves.

        Args:
            base: the base model's measurement; None validates nothing, and the last θ is the best.
            checkpoint: where an interrupted run was.

        Returns:
            The last checkpoint, with the best θ.

        Raises:
            TrainingError: the gradient or a reward is not finite.
            StorageError: a checkpoint or point could not be written.
        """
        config = self.config
        theta = self.parameters.initial().requires_grad_()
        optimizer = torch.optim.AdamW([theta], lr=config.learning_rate, weight_decay=config.weight_decay)
        if checkpoint is None:
            at_first = base or Measured(0.0, 0.0)
            state = Progress(
                config=self.identity,
                step=0,
                points=0,
                best_step=0,
                best_score=at_first.score,
                best_reward=at_first.reward,
                base_score=at_first.score,
                base_reward=at_first.reward,
                stale=0,
                seconds=0.0,
            )
            best = theta.detach().clone()
            if base is not None:
                self._point("validation", 0, base)
        else:
            state, best = checkpoint.progress, checkpoint.best_theta
            if self.forms is not None and state.factors is not None:
                self.forms.factors = state.factors
            self._points, self._earlier = state.points, state.seconds
            with torch.no_grad():
                theta.copy_(checkpoint.theta)
            optimizer.state[theta] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": checkpoint.exp_avg.clone(),
                "exp_avg_sq": checkpoint.exp_avg_sq.clone(),
            }
        with tqdm(
            total=config.steps,
            initial=state.step,
            desc=f"Training {config.name}",
            unit="step",
            disable=not self.progress,
        ) as bar:
            shown = {} if base is None else {"best": f"{state.best_score:.4f}"}
            bar.set_postfix(shown)
            while not finished(config, state):
                step = state.step
                reached = self._step(theta, optimizer, step)
                state = state.model_copy(update={"step": step + 1})
                last = state.step == config.steps
                validate = base is not None and (last or state.step % config.validate_every == 0)
                if base is None:
                    best, state = theta.detach().clone(), state.model_copy(update={"best_step": state.step})
                elif validate:
                    measured = self.problem.measure(self.parameters.z(theta))
                    self._point("validation", state.step, measured)
                    if self._better(measured, state):
                        best = theta.detach().clone()
                        update = {"best_step": state.step, "best_score": measured.score, "best_reward": measured.reward}
                        state = state.model_copy(update={**update, "stale": 0})
                    else:
                        state = state.model_copy(update={"stale": state.stale + 1})
                    shown = {"best": f"{state.best_score:.4f}"}
                if validate or last or state.step % self.checkpoint_every == 0:
                    factors = None if self.forms is None else self.forms.factors
                    so_far = {"points": self._points, "seconds": self._seconds(), "factors": factors}
                    state = state.model_copy(update=so_far)
                    save_checkpoint(
                        self.folder / "checkpoint.safetensors", self._checkpoint(state, theta, optimizer, best)
                    )
                bar.set_postfix({"reward": f"{reached.reward:+.3f}", "score": f"{reached.score:.3f}", **shown})
                bar.update(1)
        return self._checkpoint(state, theta, optimizer, best)

    def _step(self, theta: torch.Tensor, optimizer: torch.optim.AdamW, step: int) -> Measured:
        config = self.config
        z = {name: vector.requires_grad_() for name, vector in self.parameters.z(theta).items()}
        size = self.train_docs if config.update == "epoch" else config.batch
        docs = batch_docs(self.train_docs, size, step, config.seed)
        measured = self.problem.accumulate(z, docs, step)
        theta.grad = self.parameters.gradient(theta, z)
        norm = float(theta.grad.norm())
        if not math.isfinite(norm):
            raise TrainingError(
                f"the gradient of step {step} is not finite: training of {config.name} diverged; lower learning_rate "
                f"({config.learning_rate:g}) or use dtype=float32 in model_args"
            )
        torch.nn.utils.clip_grad_norm_([theta], config.clip)
        rate = learning_rate(config, step)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.step()
        self._point("train", step, measured, rate, norm)
        return measured

    def _better(self, measured: Measured, state: Progress) -> bool:
        new, old = (measured.score, measured.reward), (state.best_score, state.best_reward)
        return new > old if self.config.select == "score" else new[::-1] > old[::-1]

    def _checkpoint(
        self, state: Progress, theta: torch.Tensor, optimizer: torch.optim.AdamW, best: torch.Tensor
    ) -> Checkpoint:
        moments = optimizer.state.get(theta) or {}
        zeros = torch.zeros_like(best)
        return Checkpoint(
            progress=state,
            theta=theta.detach().clone(),
            exp_avg=moments.get("exp_avg", zeros),
            exp_avg_sq=moments.get("exp_avg_sq", zeros),
            best_theta=best,
        )

    def _point(
        self, split: str, step: int, measured: Measured, rate: float | None = None, norm: float | None = None
    ) -> None:
        if not math.isfinite(measured.reward):
            raise TrainingError(
                f"the reward after step {step} is not a finite number: training of {self.config.name} diverged; lower "
                f"learning_rate ({self.config.learning_rate:g}) or use dtype=float32 in model_args"
            )
        point = CurvePoint(
            step=step,
            split="train" if split == "train" else "validation",
            reward=measured.reward,
            score=measured.score,
            kl=measured.kl,
            learning_rate=rate,
            gradient_norm=norm,
            seconds=round(self._seconds(), 3),
        )
        append_point(self.folder / "curve.jsonl", point)
        self._points += 1
        if self.observe is not None:
            self.observe(point)

    def _seconds(self) -> float:
        return self._earlier + time.monotonic() - self._began
