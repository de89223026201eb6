"""Few-shot adaptation to the same final held-out score, all economies on, against the reference procedure in full.

Both search mixtures of the demo experts for the demo model with the same seed, 32 candidates a generation on 10 docs.
The reference takes its candidates in turn, recomposes every matrix and copies every weight for each, asks every one of
them every doc, each choice of a question in a row of its own, and goes on for all generations until the search has
converged. It does the same work for every candidate, so it is timed on some of them and multiplied. The other side is
timed as it is, from nothing (but the spectral bases, as the reference's decomposition), with ``economy=early``; then
the search is completed without any economy, which tells how many candidates the reference asks and the score it ends
with.

On a CPU one task is taken, and the search is cut after 8 generations, of the paper's 100, to be done in minutes; that
favours the reference, whose later generations are the ones that are left out.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

import torch

from benchmarks.speed.reference import Reference
from benchmarks.speed.rows import Row
from t2.adapters.basis import Basis
from t2.adapters.engine import Engine, Generated, GenerateRequest, Scored, ScoreRequest
from t2.adapters.engine.likelihood import LikelihoodModel
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z
from t2.adapters.search import CEM
from t2.adapters.strategies import STRATEGIES, Job, Options, Plan
from t2.adapters.strategies.base import Economy
from t2.adapters.strategies.mixing import choose
from t2.harness.args import parse_args
from t2.harness.base import base_id, open_base
from t2.harness.experts import prepare_experts, read_experts
from t2.harness.pool import draw, find_pool
from t2.harness.scorer import TaskScorer
from t2.harness.shipped import demo_dir
from t2.harness.tasks import PromptForm, TaskDocs, encode_pair, load_task

_Result = TypeVar("_Result")
EXPERTS = ("math", "code", "reasoning")
DOCS = 10
TARGET = {"cpu": 4.0, "cuda": 25.0}


@dataclass(frozen=True)
class Size:
    """What is measured: tasks, candidates of a generation, generations, and candidates the reference is timed on."""

    tasks: tuple[str, ...] = ("t2_arc_challenge", "t2_arc_challenge_letter")
    population: int = 32
    generations: int = 8
    timed: int = 4


class ReferenceEngine:
    """The reference procedure as an engine: mixture by mixture, and nothing shared between requests."""

    supports_rows = False

    def __init__(self, engine: TransformersEngine, names: Iterable[str]) -> None:
        self.base = engine.base
        self._engine = engine
        self._reference = Reference(engine.model, {name: engine.targets[name] for name in names})
        self._plain = LikelihoodModel(engine.model, share=False)

    def ranks(self) -> Mapping[str, int]:
        """See :class:`t2.adapters.engine.Engine`."""
        return self._engine.ranks()

    def bases(self, names: Iterable[str]) -> Mapping[str, Basis]:
        """See :class:`t2.adapters.engine.Engine`."""
        return self._engine.bases(names)

    def applied(self, z: Z | None) -> AbstractContextManager[None]:
        """See :class:`t2.adapters.engine.Engine`."""
        return self._engine.applied(z)

    def generate(
        self,
        requests: Sequence[GenerateRequest],
        mixtures: Sequence[Z | None] = (None,),
        rows: Sequence[int] | None = None,
        *,
        seed: int = 0,
        progress: str | None = None,
    ) -> list[Generated]:
        """See :class:`t2.adapters.engine.Engine`."""
        found: dict[int, Generated] = {}
        for index, own in self._in_turn(len(requests), mixtures, rows):
            self._reference.apply(mixtures[index])
            found.update(zip(own, self._engine.generate([requests[i] for i in own], seed=seed), strict=True))
        self._reference.apply(None)
        return [found[i] for i in range(len(requests))]

    def score(
        self,
        requests: Sequence[ScoreRequest],
        mixtures: Sequence[Z | None] = (None,),
        rows: Sequence[int] | None = None,
        *,
        progress: str | None = None,
    ) -> list[Scored]:
        """See :class:`t2.adapters.engine.Engine`."""
        found: dict[int, Scored] = {}
        shared, self._engine.likelihood = self._engine.likelihood, self._plain
        try:
            for index, own in self._in_turn(len(requests), mixtures, rows):
                self._reference.apply(mixtures[index])
                found.update(zip(own, self._engine.score([requests[i] for i in own]), strict=True))
        finally:
            self._engine.likelihood = shared
            self._reference.apply(None)
        return [found[i] for i in range(len(requests))]

    @staticmethod
    def _in_turn(count: int, mixtures: Sequence[Z | None], rows: Sequence[int] | None) -> list[tuple[int, list[int]]]:
        every = [0] * count if rows is None else rows
        found = [(index, [i for i in range(count) if every[i] == index]) for index in range(len(mixtures))]
        return [(index, own) for index, own in found if own]


def run(args: argparse.Namespace) -> Iterator[Row]:
    """Measure; see :class:`benchmarks.speed.rows.Benchmark`."""
    device = "cuda" if args.device.startswith("cuda") else "cpu"
    size = Size(generations=100, timed=16) if device == "cuda" else Size(Size.tasks[:1])
    if args.quick:
        size = Size(size.tasks[:1], population=6, generations=2, timed=1)
    lm = open_base(dtype="float32", device=args.device)
    engine = TransformersEngine(lm.model, lm.tokenizer, base_id(None))
    names = [str(demo_dir() / name / "expert.safetensors") for name in EXPERTS]
    experts = prepare_experts(parse_args({"adapt": "cem"}), read_experts(names), engine.base, engine.ranks())
    moved = dict.fromkeys(name for expert in experts for name in expert.z)
    engine.bases(moved)
    reference = ReferenceEngine(engine, moved)
    for name in size.tasks:
        task = load_task(name)
        pool = find_pool(task)
        docs = TaskDocs(task, lm, PromptForm(), forbidden=pool.scored)
        drawn = draw(pool, docs, DOCS, args.seed)
        options = Options(population=size.population, generations=size.generations, seed=args.seed)
        job = Job(name, [""], experts, engine, options, partial(encode_pair, lm), lambda text: text, progress=False)
        yield from _rows(job, docs, drawn, reference, size, device)


def _rows(
    job: Job, docs: TaskDocs, drawn: Sequence[object], reference: ReferenceEngine, size: Size, device: str
) -> Iterator[Row]:
    def scorer(engine: Engine) -> TaskScorer:
        return TaskScorer(docs, drawn, engine, progress=False)

    plain, own = scorer(reference), scorer(job.engine)
    zs = _candidates(job, 2 * size.timed + 1)
    plain.evaluate(zs[:1])
    times = [_timed(partial(plain.evaluate, [z]), device)[1] for z in zs[1 : size.timed + 1]]
    found: dict[Economy, tuple[Plan, tuple[float, float]]] = {
        "halving": _timed(lambda: _plan(job, scorer(job.engine), "halving"), device),
        "early": _timed(lambda: _plan(job, own, "early"), device),
    }
    # After as well as before, so that a machine that gets busier slows both sides.
    times += [_timed(partial(plain.evaluate, [z]), device)[1] for z in zs[size.timed + 1 :]]
    full = _plan(job, own, "none")
    assert full.search is not None
    assert full.held_out is not None
    each, each_cpu = (statistics.median(column) for column in zip(*times, strict=True))
    theirs = each * full.search.evaluations
    for economy, (plan, (ours, ours_cpu)) in found.items():
        assert plan.search is not None
        assert plan.held_out is not None
        same = full.held_out.after == plan.held_out.after
        yield Row(
            what=f"few-shot adaptation to the same held-out score, {job.task}, economy={economy}",
            against="the reference procedure in full",
            ratio=theirs / ours if same else 0.0,
            target="time of the reference / ours",
            bound=TARGET[device] if economy == "halving" else None,
            better="above",
            detail=(
                f"{theirs:.0f} s ({full.search.evaluations:.0f} mixtures of {each:.2f} s; {full.search.stopped}) / "
                f"{ours:.0f} s ({plan.search.evaluations:.0f} mixtures; {plan.search.stopped}); held-out score "
                f"{full.held_out.before:.2g} → {full.held_out.after:.2g} / {plan.held_out.after:.2g}; "
                f"by CPU seconds {each_cpu * full.search.evaluations / ours_cpu:.2f}"
            ),
            numbers={
                "reference_seconds_each": times,
                "seconds": ours,
                "cpu_seconds": ours_cpu,
                "reference": full.search.model_dump(),
                "ours": plan.search.model_dump(),
                "alpha": [full.choices[0].alpha, plan.choices[0].alpha],
                "history": [[g.best for g in each_plan.history] for each_plan in (full, plan)],
            },
        )


def _plan(job: Job, scorer: TaskScorer, economy: Economy) -> Plan:
    options = replace(job.options, economy=economy)
    return STRATEGIES["cem"]().plan(replace(job, scorer=scorer, options=options))


def _candidates(job: Job, count: int) -> list[Z | None]:
    """Mixtures as a search asks for, but not those of this one, whose answers would be known."""
    mean = [1 / len(job.experts)] * len(job.experts)
    drawn = CEM(mean, population=count, seed=job.options.seed + 1).ask()
    return [choose(job, [candidate]).z for candidate in drawn]


def _timed(work: Callable[[], _Result], device: str) -> tuple[_Result, tuple[float, float]]:
    """What some work gives, its seconds of wall clock and of the processor."""
    if device == "cuda":
        torch.cuda.synchronize()
    start, cpu = time.perf_counter(), time.process_time()
    result = work()
    if device == "cuda":
        torch.cuda.synchronize()
    return result, (time.perf_counter() - start, time.process_time() - cpu)
