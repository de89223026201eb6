"""One task's adaptation: checked before any search, found again by its key or planned, and recorded."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.task import Task
from tqdm import tqdm

from t2.adapters.engine import Engine
from t2.adapters.engine.pool import PooledEngine
from t2.adapters.expert import Expert, Z
from t2.adapters.strategies import STRATEGIES, Choice, DomainPrompts, Job, Plan
from t2.adapters.strategies.dispatch import asked_of
from t2.core.digests import digest_of, doc_hash
from t2.core.errors import ArgumentError, ExpertError, TaskError
from t2.core.manifest import unpack_hashes
from t2.core.record import AdaptationRecord, Calibration, ExpertRef, ModelRef, Overlap, Timing, UsedMixture
from t2.harness import store
from t2.harness.args import DISPATCHING, Settings
from t2.harness.calibrations import Calibrations
from t2.harness.generation import chat_text
from t2.harness.held_out import held_out_prompts
from t2.harness.identity import identity_of, model_ref
from t2.harness.journal import FORMAT, Journal
from t2.harness.overlap import DocMarks, marks_of
from t2.harness.pool import Pool, draw
from t2.harness.rules import rules_of
from t2.harness.scorer import TaskScorer
from t2.harness.tasks import PromptForm, TaskDocs, encode_pair, prompt_text

SPARE = 64
"""Docs of the pool that may serve as few-shot examples where a task's own are all scored."""
_PROBED = 16
"""Rows of a batch of probes, whose logits over the whole vocabulary are kept."""
PROBE = "The quick brown fox jumps over the lazy dog. 12 + 7 ="
"""What is asked to see whether an expert acts."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Runtime:
    """What all adaptations of a run share: lm-eval's model, the engine over it, experts and settings."""

    lm: TemplateLM
    engine: Engine
    experts: tuple[Expert, ...]
    settings: Settings
    classifier: Expert | None = None
    memory: dict[tuple[str, str], tuple[float, ...]] = field(default_factory=dict)
    pool: PooledEngine | None = None

    def __post_init__(self) -> None:
        """Refuse a classifier whose question no chat template of this tokenizer holds.

        Raises:
            ArgumentError: it was trained in a chat template, and the tokenizer has none that takes a message.
        """
        if self.classifier is not None and self.classifier.manifest.training.get("apply_chat_template"):
            where = f"classifier {self.classifier.name}: it was trained in a chat template"
            chat_text(self.lm, [{"role": "user", "content": "-"}], where=where)

    @property
    def asked(self) -> Engine:
        """What answers during searches and dispatches: the workers where there are any."""
        return self.pool if self.pool is not None else self.engine

    @cached_property
    def calibrations(self) -> Calibrations:
        """The answers about held-out prompts that earlier runs of this base left."""
        return Calibrations([identity_of(self.lm), self.dtype, self.settings.engine])

    @cached_property
    def base(self) -> ModelRef:
        """The base model, as records name it."""
        return model_ref(self.engine, self.lm)

    def expert_refs(self) -> tuple[ExpertRef, ...]:
        """The experts as a record names them, the classifier last."""
        return tuple(
            ExpertRef(
                name=e.name,
                digest=e.digest,
                domain=e.domain,
                reference=e.reference,
                reason=e.reason,
                transferred=e.transferred,
            )
            for e in self.taking_part
        )

    @property
    def taking_part(self) -> tuple[Expert, ...]:
        """The experts, and the classifier where one names domains."""
        return self.experts if self.classifier is None else (*self.experts, self.classifier)

    @cached_property
    def trained(self) -> Mapping[str, frozenset[str]]:
        """For each expert the marks of the docs that it was trained on."""
        return {e.name: frozenset(unpack_hashes(e.manifest.training_docs)) for e in self.taking_part}

    @property
    def dtype(self) -> str:
        """The dtype of the adapted weights, for example ``bfloat16``, and how they are quantised."""
        return self.engine.precision

    def probe(self) -> torch.Tensor:
        """What the model says of a fixed text under the weights as they are now."""
        return self.probes([None])[0]

    @cached_property
    def base_probe(self) -> torch.Tensor:
        """What the base says of it; asked once, for to an engine that holds one mixture the base is another one."""
        return self.probe()

    def probes(self, mixtures: Sequence[Z | None]) -> list[torch.Tensor]:
        """What the model says of the fixed text under each mixture; see :meth:`t2.adapters.engine.Engine.probe`."""
        rules = rules_of(self.lm)
        tokens = self.lm.tok_encode(PROBE)[: rules.rolling]
        with rules.arithmetic():
            return self.engine.probe(tokens, mixtures)


def moves(z: Z | None) -> bool:
    """Whether any component of z differs from 1."""
    return any(bool((vector != 1).any()) for vector in (z or {}).values())


def check_experts_move(runtime: Runtime) -> None:
    """Stop when an expert changes nothing, before a search is spent on it.

    Raises:
        ExpertError: an expert that is not z = 1 leaves the logits of a probe text unchanged.
    """
    check_all_move(runtime, [(f"expert {expert.name}", expert.z) for expert in runtime.taking_part])


def check_all_move(runtime: Runtime, named: Sequence[tuple[str, Z | None]]) -> None:
    """Stop when something that is not z = 1 changes nothing.

    Raises:
        ExpertError: it leaves the logits of a probe text unchanged.
    """
    moving = [(name, z) for name, z in named if moves(z)]
    width = max(1, min(runtime.settings.batch or _PROBED, _PROBED) - 1)
    for start in range(0, len(moving), width):
        batch = moving[start : start + width]
        base, *adapted = runtime.probes([None, *(z for _, z in batch)])
        for (name, _), logits in zip(batch, adapted, strict=True):
            check_moved(base, logits, name)


def check_moved(base: torch.Tensor, adapted: torch.Tensor, what: str) -> None:
    """Stop when an applied mixture has left the logits as they were.

    Raises:
        ExpertError: it has.
    """
    if torch.equal(base, adapted):
        raise ExpertError(
            f"{what} leaves the logits of a probe text unchanged: its z is too close to 1 to survive rounding in this "
            "dtype, or its matrices do not act; try dtype=float32, or leave it out"
        )


class TaskAdaptation:
    """The adaptation of one task.

    Making one checks all that can be checked before a search: the adaptation pool, its labels, the objective, and that
    every adaptation prompt can be built.

    Args:
        task: the task as lm-eval is about to run it, its requests built.
        pool: its adaptation pool.
        form: how prompts are built.
        runtime: what the run shares.

    Raises:
        TaskError: the task cannot be adapted to.
        ArgumentError: it has no such metric or filter.
    """

    def __init__(self, task: Task, pool: Pool, form: PromptForm, runtime: Runtime) -> None:
        self.task = task
        self.name = str(task.task_name)
        self._runtime = runtime
        self._pool = pool
        self._split = pool.split
        self._form = form
        self._docs = {instance.doc_id: instance.doc for instance in task.instances}
        self._strategy = STRATEGIES[runtime.settings.adapt]()
        self._scorer: TaskScorer | None = None
        self._adaptation_docs: tuple[str, ...] = ()
        self._drawn: list[Any] = []
        if self._strategy.needs_labels:
            settings = runtime.settings
            docs = TaskDocs(
                task,
                runtime.lm,
                form,
                metric=settings.metric,
                filter=settings.filter,
                forbidden=pool.scored,
                spare=pool.docs[:SPARE],
            )
            trained = {mark for marks in runtime.trained.values() for mark in marks}
            drawn = draw(pool, docs, settings.shots, settings.adapt_seed, trained)
            prompts = [prompt_text(task, doc) for doc in drawn]
            self._adaptation_docs = tuple(doc_hash(doc) for doc in drawn)
            self._scorer = TaskScorer(docs, drawn, runtime.asked, prompts=prompts, seed=settings.adapt_seed)
            marks = DocMarks(task)
            seen = sum(not trained.isdisjoint(marks.of(doc)) for doc in drawn) if trained else 0
            if seen:
                self._split = f"{pool.split}, {seen} of those drawn trained an expert"
            self._drawn = drawn
        self._overlap = self._find_overlap()
        self.key = self._key()
        self.choices: tuple[Choice, ...] = ()
        self.record: AdaptationRecord | None = None
        self.path: Path | None = None
        self.found = False
        self._rows: dict[Any, int] = {}

    @property
    def version(self) -> str:
        """The task's version."""
        metadata = getattr(self.task.config, "metadata", None) or {}
        return str(metadata.get("version", self.task.VERSION))

    @property
    def adaptation_marks(self) -> frozenset[str]:
        """The marks of the labelled docs that a search sees; see :mod:`t2.harness.overlap`."""
        return marks_of(self.task, self._drawn)

    def choice_of(self, doc_id: int | None) -> Choice:
        """The mixture that answers a doc."""
        return self.choices[self._rows[doc_id]]

    def find(self) -> bool:
        """Take up an adaptation with this key from disk; False when there is none."""
        stored = store.load(self.key)
        if stored is None:
            return False
        rows = stored.plan.rows
        if len(rows) not in (1, len(self._docs)) or any(not 0 <= row < len(stored.plan.alphas) for row in rows):
            return False
        job = self._job()
        try:
            self.choices = tuple(store.restore(job, alpha) for alpha in stored.plan.alphas)
        except KeyError:
            return False
        self._place(rows)
        self.path = store.path_of(self.key)
        self.found = True
        timing = Timing(pass1=0.0, pass2=0.0)
        self.record = stored.record.model_copy(
            update={
                "experts": self._runtime.expert_refs(),
                "overlap": self._overlap,
                "mixtures": self._used(),
                "timing": timing,
                "command": _command(),
            }
        )
        _say(f"{self.name}: adaptation found again, not repeated ({self.path})")
        return True

    def plan(self) -> None:
        """Find the mixtures, by the strategy, and store them.

        Raises:
            T2Error: the strategy cannot work with these experts or options, or the cache cannot be written.
        """
        start = time.perf_counter()
        # Under a time limit what is answered at once would tell nothing of the time that the rest needs.
        if self._scorer is not None and self._runtime.settings.budget.seconds is None:
            known = self._scorer.keep(self._journal(self._scorer))
            if known:
                _say(f"{self.name}: {known} answers of an earlier run are known and not asked for again")
        try:
            plan = self._strategy.plan(self._job())
        except KeyboardInterrupt as stop:
            told = f"{self.name}: stopped while adapting; the base model is as it was"
            stop.add_note(f"t2: {told}, and the same command goes on from here")
            raise
        if self._scorer is not None and self._scorer.incomparable:
            _log.warning(
                "%s: left out %d mixtures, because they have the metric %s on other adaptation docs than the base; "
                "choose one with metric= that every answer has",
                self.name,
                self._scorer.incomparable,
                self._scorer.task.objective.metric,
            )
        self.choices = plan.choices
        rows = plan.rows if len(plan.choices) > 1 else (0,)
        self._place(rows)
        self.record = AdaptationRecord(
            key=self.key,
            task=self.name,
            task_version=self.version,
            strategy=self._runtime.settings.adapt,
            base=self._runtime.base,
            dtype=self._runtime.dtype,
            experts=self._runtime.expert_refs(),
            control=self._runtime.settings.control,
            settings=self._runtime.settings.bearing(),
            objective=self._scorer.task.objective if self._scorer else None,
            adaptation_docs=self._adaptation_docs,
            pool=self._split if self._scorer else None,
            held_out=plan.held_out,
            history=plan.history,
            search=plan.search,
            preselected=plan.preselected,
            considered=plan.considered,
            overlap=self._overlap,
            mixtures=self._used(),
            dispatch=plan.dispatch,
            calibration=self._with_own_row(plan),
            no_signal=plan.no_signal,
            note=plan.note,
            command=_command(),
            timing=Timing(pass1=time.perf_counter() - start),
        )
        self._save()

    def answered(self, seconds: float) -> None:
        """Note the seconds of the second pass."""
        assert self.record is not None
        timing = Timing(pass1=self.record.timing.pass1, pass2=self.record.timing.pass2 + seconds)
        self.record = self.record.model_copy(update={"timing": timing})

    def finish(self) -> None:
        """Store the record with the seconds of the second pass; an adaptation that was found again stays as it was."""
        if not self.found:
            self._save()

    def _with_own_row(self, plan: Plan) -> Calibration | None:
        """The calibration with the scored prompts' row of the confusion matrix, where the task says its domain."""
        metadata: Any = getattr(self.task.config, "metadata", None) or {}
        own = metadata.get("t2")
        domain = own.get("domain") if isinstance(own, Mapping) else None
        if plan.calibration is None or domain is None:
            return plan.calibration
        return plan.calibration.model_copy(update={"scored": {str(domain): plan.dispatch}})

    def _held_out(self, labels: Sequence[str], classifier: Expert | None) -> DomainPrompts:
        return held_out_prompts(labels, self._runtime.experts, classifier, self._not_held_out)

    @cached_property
    def _not_held_out(self) -> frozenset[str]:
        """The marks of the docs that are scored or adapted on, and the hashes of the texts that are dispatched."""
        texts = {doc_hash(prompt_text(self.task, doc)) for doc in self._docs.values()}
        return marks_of(self.task, self.task.eval_docs) | self.adaptation_marks | texts

    def _held_out_digests(self) -> list[str | None]:
        """What the dispatches of the strategy are calibrated on; they come and go with the task data at hand."""
        asked: list[Expert | None] = [] if self._runtime.settings.adapt == "classifier" else [None]
        if self._runtime.classifier is not None:
            asked.append(self._runtime.classifier)
        digests: list[str | None] = []
        for classifier in asked:
            try:
                labels = asked_of(self._runtime.experts, classifier).labels
            except ArgumentError:
                digests.append(None)  # auto does without
            else:
                digests.append(self._held_out(labels, classifier).digest())
        return digests

    def _save(self) -> None:
        assert self.record is not None
        rows = tuple(self._rows.values()) if len(self.choices) > 1 else (0,)
        plan = store.StoredPlan(alphas=tuple(choice.alpha for choice in self.choices), rows=rows)
        self.path = store.save(store.Stored(record=self.record, plan=plan))

    def _place(self, rows: Sequence[int]) -> None:
        every = rows if len(rows) == len(self._docs) else [rows[0]] * len(self._docs)
        self._rows = dict(zip(self._docs, every, strict=True))

    def _used(self) -> tuple[UsedMixture, ...]:
        counts = [0] * len(self.choices)
        for instance in self.task.instances:
            counts[self._rows[instance.doc_id]] += int(instance.repeats or 1)
        return tuple(
            UsedMixture(alpha=choice.alpha, requests=count)
            for choice, count in zip(self.choices, counts, strict=True)
            if count or len(self.choices) == 1
        )

    def _find_overlap(self) -> tuple[Overlap, ...]:
        """Count the docs that experts were trained on, and say so.

        Raises:
            TaskError: there are some, and ``overlap=refuse``.
        """
        trained = {name: marks for name, marks in self._runtime.trained.items() if marks}
        if not trained:
            return ()
        marks = DocMarks(self.task)
        scored, drawn = ([marks.of(doc) for doc in docs] for docs in (self._docs.values(), self._drawn))
        counted = [
            Overlap(
                expert=name,
                scored=sum(not own.isdisjoint(seen) for own in scored),
                adaptation=sum(not own.isdisjoint(seen) for own in drawn),
            )
            for name, seen in trained.items()
        ]
        found = tuple(one for one in counted if one.scored or one.adaptation)
        for one in found:
            told = (
                f"expert {one.expert} was trained on {one.scored} of the {len(scored)} scored docs and "
                f"{one.adaptation} of the {len(drawn)} adaptation docs"
            )
            if self._runtime.settings.overlap == "refuse":
                raise TaskError(
                    f"task {self.name}: {told}, which overlap=refuse does not allow; leave the expert out, or use "
                    "overlap=mark"
                )
            _log.warning("%s: %s; it looks better on them than it is", self.name, told)
        return found

    def _job(self) -> Job:
        lm = self._runtime.lm
        chat = bool(self._form.apply_chat_template)

        def template(text: str) -> str:
            return chat_text(lm, [{"role": "user", "content": text}])

        return Job(
            task=self.name,
            prompts=[prompt_text(self.task, doc) for doc in self._docs.values()],
            experts=self._runtime.experts,
            engine=self._runtime.asked,
            options=self._runtime.settings.options(),
            encode_pair=self._encode_pair,
            render=template if chat else lambda text: text,
            scorer=self._scorer,
            say=_say,
            classifier=self._runtime.classifier,
            held_out=self._held_out,
            template=template,
            decode=lm.tok_decode,
            memory=self._runtime.memory,
            calibrations=self._runtime.calibrations,
        )

    def _encode_pair(self, context: str, text: str) -> tuple[list[int], list[int]]:
        """Tokens of a pair, the context cut from the left to what the model holds, as lm-eval cuts prompts."""
        lm = self._runtime.lm
        left, right = encode_pair(lm, context, text)
        return left[-max(1, rules_of(lm).pair - len(right)) :], right

    def _journal(self, scorer: TaskScorer) -> Journal:
        """Where answers on the adaptation docs are kept: by all they depend on but the mixture."""
        sampled = any(scorer.task.samples(request) for requests in scorer.requests for request in requests)
        content = {
            "format": FORMAT,
            "task": [self.name, self.version, scorer.task.objective.model_dump(mode="json")],
            "base": self._runtime.base.identity,
            "dtype": self._runtime.dtype,
            "engine": self._runtime.settings.engine,
            "docs": self._adaptation_docs,
            "requests": _digests(scorer.requests),
            "seed": self._runtime.settings.adapt_seed if sampled else None,
        }
        return Journal(digest_of(content))

    def _key(self) -> str:
        settings = self._runtime.settings
        content: dict[str, Any] = {
            "format": store.FORMAT,
            "task": self.name,
            "version": self.version,
            "base": self._runtime.base.identity,
            "dtype": self._runtime.dtype,
            "experts": [[ref.name, ref.digest, ref.domain] for ref in self._runtime.expert_refs()],
            "settings": settings.bearing(),
        }
        if self._scorer is not None:
            # The built requests hold the whole prompt form; which docs are scored has no bearing on a search.
            content["objective"] = self._scorer.task.objective.model_dump(mode="json")
            content["docs"] = self._adaptation_docs
            content["requests"] = _digests(self._scorer.requests)
        if self._scorer is None or settings.adapt == "auto":
            content["prompts"] = [doc_hash(prompt_text(self.task, doc)) for doc in self._docs.values()]
            content["chat"] = bool(self._form.apply_chat_template)
        if settings.adapt in DISPATCHING:
            content["held_out"] = self._held_out_digests()
        return digest_of(content)


def _digests(requests: Sequence[Sequence[Instance]]) -> list[list[list[str]]]:
    return [[[request.request_type, doc_hash(list(request.args))] for request in some] for some in requests]


def _say(text: str) -> None:
    tqdm.write(f"t2: {text}", file=sys.stderr)


def _command() -> str:
    return " ".join(sys.argv)
