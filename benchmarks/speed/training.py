"""One training step: against the reference procedure, and against PEFT's LoRA of rank 16.

Two kinds of step on the demo model: documents of ``t2_arc_easy`` with the exact expected reward over their choices, and
answers of about 100 tokens to documents of ``t2_gsm8k`` with REINFORCE, two to each prompt; what is answered is
the document's own right answer, cut or repeated, since a step takes as long whatever it learns from. All sides
compute forward and backward passes and the gradient of what they train; no optimizer step, no rollouts.

* The reference procedure is that of Transformer²'s public code: each matrix is composed as U·diag(σ⊙z)·Vᵀ, the model
  keeps dense gradients of all of these, rows (a context with one continuation) are run one after another, and at the
  end the dense gradients are taken back through the composition, matrix by matrix. All matrices are trained.
* LoRA runs the same documents through the same packed rows, so it differs in the layers alone; padded, it runs one row
  per continuation in one batch, as ``transformers`` users do.

Memory is the sum of what a side keeps beside the base model's weights from step to step (U, σ, V and the kept copy of
all weights; or the factors of the training form) and of the peak of what the step allocates: on a CPU the allocator's
events as ``torch.profiler`` records them, on CUDA ``torch.cuda.max_memory_allocated``.
"""

from __future__ import annotations

import argparse
import copy
import functools
import gc
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch.profiler import ProfilerActivity, profile

from benchmarks.speed.reference import Reference
from benchmarks.speed.rows import Row, in_turn
from t2.adapters.engine.likelihood import Branches, LikelihoodModel
from t2.adapters.engine.transformers import TransformersEngine
from t2.harness.base import open_base
from t2.harness.tasks import load_task
from t2.training.api import build_problem
from t2.training.choices import ChoiceProblem
from t2.training.config import make_config
from t2.training.methods import build_engine
from t2.training.objective import expected_reward, reinforce
from t2.training.passes import Passes, accumulate, gradient
from t2.training.rollouts import GenerationProblem
from t2.training.split import split_docs

_TARGETS = {
    "q, v": ["q_proj", "v_proj"],
    "all matrices": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
_ANSWER = 100
"""Tokens of an answer."""


@dataclass(frozen=True)
class Item:
    """A document: its branches, and what is maximised as a function of their log-likelihoods, shape (branches,)."""

    branches: Branches
    gain: Callable[[torch.Tensor], torch.Tensor]

    def rows(self) -> list[Branches]:
        """One continuation each."""
        return [Branches(self.branches.context, (one,)) for one in self.branches.continuations]


@dataclass(frozen=True)
class Step:
    """What all sides compute."""

    name: str
    items: Sequence[Item]

    @property
    def tokens(self) -> int:
        """Input tokens of packed rows."""
        return sum(item.branches.inputs for item in self.items)

    def loss(self, model: LikelihoodModel) -> torch.Tensor:
        """Of all documents in one pass."""
        spans = model.run([item.branches for item in self.items])
        parts = torch.split(spans.loglikelihoods(), [len(item.branches.continuations) for item in self.items])
        return -torch.stack([item.gain(part) for item, part in zip(self.items, parts, strict=True)]).mean()


def run(args: argparse.Namespace) -> list[Row]:
    """Rows of both steps in float32 and bfloat16; on a CPU the second in bfloat16 alone, with ``quick`` not at all."""
    torch.manual_seed(args.seed)
    rows = []
    for dtype in ["float32"] if args.quick else ["float32", "bfloat16"]:
        lm = open_base(dtype=dtype, device=args.device)
        config = make_config(task="t2_arc_easy", name="x", model_args={"dtype": dtype}, seed=args.seed)
        engine = build_engine(lm, config, given=False)
        on_gpu = args.device.startswith("cuda")
        docs = 2 if args.quick else 32 if on_gpu else 4
        steps = [_choices(lm, engine, docs, args.seed)]
        if not args.quick and (on_gpu or dtype == "bfloat16"):
            steps.append(_answers(lm, engine, docs // 2, args.seed))
        for step in steps:
            rows += _measure(step, engine, dtype, args)
        del lm, engine, steps
        gc.collect()
    return rows


def _choices(lm: Any, engine: TransformersEngine, docs: int, seed: int) -> Step:
    config = make_config(task="t2_arc_easy", name="x", seed=seed)
    task = load_task("t2_arc_easy")
    problem = build_problem(config, engine, lm, task, split_docs(task, seed, docs, docs))
    assert isinstance(problem, ChoiceProblem)
    items = [
        Item(unit, lambda found, rewards=doc.rewards: expected_reward(found, rewards.to(found)))  # type: ignore[misc]
        for doc in problem.validation
        for unit in doc.unit
    ]
    return Step(f"{len(items)} documents of choices", items)


def _answers(lm: Any, engine: TransformersEngine, answers: int, seed: int) -> Step:
    config = make_config(task="t2_gsm8k", name="x", seed=seed)
    task = load_task("t2_gsm8k")
    half = max(1, answers // 2)
    problem = build_problem(config, engine, lm, task, split_docs(task, seed, half, half))
    assert isinstance(problem, GenerationProblem)
    items = []
    for doc, instance in zip(problem.setup.validation, problem._validation, strict=True):
        context = problem.setup.docs.generation(instance).context
        tokens = lm.tok_encode(str(problem.setup.docs.gold_text(doc)), add_special_tokens=False)
        answer = (tokens * _ANSWER)[: _ANSWER + 1]
        branches = Branches(context, (tuple(answer[:-1]), tuple(answer[1:])))
        items.append(Item(branches, lambda found: reinforce(found, torch.tensor([1.0, 0.5]).to(found))))
    return Step(f"{2 * half} answers of {_ANSWER} tokens", items)


def _measure(step: Step, engine: TransformersEngine, dtype: str, args: argparse.Namespace) -> list[Row]:
    generator = torch.Generator().manual_seed(args.seed)
    z = {name: 1 + 0.02 * torch.randn(rank, generator=generator) for name, rank in engine.ranks().items()}
    device, repeats = args.device, 1 if args.quick else args.repeats
    rows = []

    def ours(checkpointing: bool = False) -> torch.Tensor:
        return _ours(step, engine, z, checkpointing)

    reference = Reference(engine.model, engine.targets, engine.bases(engine.targets))
    side = functools.partial(_reference, step, engine, reference, z)
    (slow, quick), (theirs, own) = in_turn([side, ours], max(1, repeats - 1), device)
    agreement = float(torch.cosine_similarity(theirs, own, dim=0))
    rows.append(
        Row(
            f"a training step, {step.name}, {dtype}",
            "the reference procedure",
            slow / quick,
            "its time / ours",
            3,
            "above",
            f"{slow:.2f} s / {quick:.2f} s; cosine of the two gradients {agreement:.4f}",
            {"reference_seconds": slow, "seconds": quick, "cosine": agreement, "tokens": step.tokens},
        )
    )
    held = sum(factor.nbytes for factors in reference.factors.values() for factor in factors)
    held += sum(parameter.nbytes for parameter in engine.model.parameters())
    much = held + _peak(side, device)
    del reference, side
    gc.collect()
    plain, twice = (engine.forms.kept_bytes + _peak(functools.partial(ours, on), device) for on in (False, True))
    model = sum(parameter.nbytes for parameter in engine.model.parameters())
    mb = 1 << 20
    rows.append(
        Row(
            f"memory of a training step, {step.name}, {dtype}",
            "the reference procedure",
            twice / much,
            "ours with checkpointing on / its",
            0.5,
            "below",
            f"{twice / mb:.0f} MB / {much / mb:.0f} MB beside the base model's {model / mb:.0f} MB; ours without "
            f"checkpointing {plain / mb:.0f} MB",
            {"reference_bytes": much, "checkpointed_bytes": twice, "bytes": plain, "model_bytes": model},
        )
    )
    sides: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, modules in _TARGETS.items():
        model, leaves = _lora(engine.model, modules)
        for how, share in (("packed as ours", True), ("padded", False)):
            runner = LikelihoodModel(model, share=share)
            sides[name, how] = functools.partial(_lora_step, step, runner, leaves)
    (quick, *taken), _ = in_turn([ours, *sides.values()], repeats, device)
    for (name, how), other in zip(sides, taken, strict=True):
        rows.append(
            Row(
                f"a training step, {step.name}, {dtype}",
                f"LoRA r=16 on {name}, {how}",
                quick / other,
                "our time / its",
                1.3,
                "below",
                f"{quick:.2f} s / {other:.2f} s",
                {"lora_seconds": other, "seconds": quick},
            )
        )
    return rows


def _ours(step: Step, engine: TransformersEngine, z: Mapping[str, torch.Tensor], checkpointing: bool) -> torch.Tensor:
    passes = Passes(engine, engine.likelihood, step.tokens, checkpointing="on" if checkpointing else "off")
    leaves = {name: vector.clone().requires_grad_() for name, vector in z.items()}
    with passes.trained(leaves):
        accumulate(leaves, gradient(step.loss(engine.likelihood), leaves))
    return _flat(leaves)


def _reference(
    step: Step, engine: TransformersEngine, reference: Reference, z: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """The step as the public code makes it; a document's choices meet in one softmax, so its weights come first."""
    model = LikelihoodModel(engine.model, share=False)
    leaves = {name: vector.clone().requires_grad_() for name, vector in z.items()}
    reference.apply(dict(z))
    parameters = {name: engine.targets[name].parameter for name in z}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    try:
        for item in step.items:
            rows = item.rows()
            if len(rows) > 2:
                likelihoods = [model.run([row]).loglikelihoods()[0] for row in rows]
                weights = _weights(item, [float(likelihood.detach()) for likelihood in likelihoods])
                for likelihood, weight in zip(likelihoods, weights, strict=True):
                    torch.autograd.backward(-weight * likelihood / len(step.items))
            else:
                for row, weight in zip(rows, _weights(item, [0.0] * len(rows)), strict=True):
                    likelihood = model.run([row]).loglikelihoods()[0]
                    torch.autograd.backward(-weight * likelihood / len(step.items))
        for name, vector in leaves.items():
            u, sigma, vt = reference.factors[name]
            composed = (u * (sigma * vector.to(sigma.device, sigma.dtype))) @ vt
            target = engine.targets[name]
            grown = parameters[name].grad
            assert grown is not None
            torch.autograd.backward(composed, grown.T if target.transposed else grown)
    finally:
        for parameter in parameters.values():
            parameter.requires_grad_(False)
            parameter.grad = None
        reference.apply(None)
    return _flat(leaves)


def _weights(item: Item, likelihoods: Sequence[float]) -> list[float]:
    """∂gain/∂likelihood of each row; of REINFORCE a constant."""
    leaf = torch.tensor(likelihoods, requires_grad=True)
    (found,) = torch.autograd.grad(item.gain(leaf), leaf)
    return [float(weight) for weight in found]


def _lora(model: Any, modules: list[str]) -> tuple[Any, list[torch.Tensor]]:
    """A copy of the model that carries LoRA adapters, and their parameters."""
    config = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=modules, init_lora_weights=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = get_peft_model(copy.deepcopy(model), config).get_base_model()
    return adapted, [parameter for parameter in adapted.parameters() if parameter.requires_grad]


def _lora_step(step: Step, runner: LikelihoodModel, leaves: Sequence[torch.Tensor]) -> None:
    torch.autograd.grad(step.loss(runner), leaves)


def _peak(side: Callable[[], Any], device: str) -> int:
    """Peak of the bytes that a call allocates beyond those that were held when it began."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        side()
        return int(torch.cuda.max_memory_allocated()) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        side()
    results: Any = profiler.profiler
    events = [event for event in results.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _flat(z: Mapping[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([torch.zeros_like(v) if v.grad is None else v.grad for v in z.values()])
