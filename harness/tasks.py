"""lm-eval tasks as docs, requests and metrics, for whoever asks a model outside of lm-eval's own loop."""

from __future__ import annotations

import contextlib
import functools
import math
import random
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from lm_eval.api.instance import Instance
from lm_eval.api.metrics import mean
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from t2.adapters.engine import Engine, GenerateRequest, ScoreRequest
from t2.adapters.expert import Z
from t2.core.digests import doc_hash
from t2.core.errors import ArgumentError, T2Error, TaskError, nearest
from t2.core.record import Objective
from t2.core.results import NO_METRIC, first_metric
from t2.core.seeds import derive_seed
from t2.harness.generation import Generations, chat_text
from t2.harness.pictures import (
    answers_in_turn,
    check_pictures,
    has_pictures,
    likelihoods_in_turn,
    without_places,
)
from t2.harness.rules import rules_of

FEWSHOT_SEED = 1234
OutputType = Literal["generate_until", "multiple_choice", "loglikelihood", "loglikelihood_rolling"]
Response = tuple[float, bool] | float | str
"""One answer as lm-eval's models give it: (log-likelihood, greedy), a rolling log-likelihood, or a text."""


@dataclass(frozen=True)
class PromptForm:
    """How prompts are built; the arguments of the same names of ``lm_eval.simple_evaluate``.

    Attributes:
        num_fewshot: None keeps the task's own; a task that sets 0 itself keeps 0, as in lm-eval.
        gen_kwargs: override the task's generation arguments.
    """

    num_fewshot: int | None = None
    system_instruction: str | None = None
    apply_chat_template: bool | str = False
    fewshot_as_multiturn: bool = True
    gen_kwargs: Mapping[str, Any] = field(default_factory=dict)


def tasks_folder() -> Path:
    """The folder of t2's own task definitions."""
    return Path(__file__).parent.parent / "tasks_yaml"


class TaskSource:
    """Tasks by name: t2's, those of ``include_path``, and lm-eval's; what names what is looked up once.

    Args:
        include_path: a folder of further task definitions.
        metadata: goes to every task, as the model_args do in a run of lm-eval.

    Raises:
        TaskError: ``include_path`` is not a folder.
    """

    def __init__(self, include_path: str | Path | None = None, metadata: Mapping[str, Any] | None = None) -> None:
        if include_path is not None and not Path(include_path).is_dir():
            raise TaskError(
                f"include_path={include_path} is not a folder; name the one that holds the tasks' YAML files"
            )
        self._paths: list[str | Path] = [path for path in (tasks_folder(), include_path) if path is not None]
        self._metadata = dict(metadata or {})
        self._managers: dict[bool, TaskManager] = {}

    def load(self, name: str) -> Task:
        """One task, loaded anew.

        Raises:
            TaskError: no such task, it is a group, or it cannot be loaded.
            DataError: the task's data is absent or malformed.
        """
        tasks = self.load_all(name)
        if len(tasks) != 1:
            raise TaskError(f"{name} is a group of {len(tasks)} tasks; name one of {', '.join(sorted(tasks)[:10])}")
        task: Task = next(iter(tasks.values()))
        return task

    def names(self, name: str) -> tuple[str, ...]:
        """The names of the tasks that a name stands for: itself, or those of a group.

        Raises:
            TaskError: there is none, or one of them cannot be loaded.
        """
        return tuple(self.load_all(name))

    def load_all(self, name: str) -> dict[str, Task]:
        """Load a task, or all tasks of a group with the group's settings, by name.

        Raises:
            TaskError: there is no such name, or a task cannot be loaded.
            DataError: a task's data is absent or malformed.
        """
        # lm-eval's own folder takes seconds to read.
        manager = self._manager(False)
        if name not in manager.task_index:
            manager = self._manager(True)
        if name not in manager.task_index:
            raise TaskError(f"task {name} does not exist{nearest(name, manager.all_tasks)}")
        try:
            return dict(manager.load([name])["tasks"])
        except T2Error:
            raise
        except Exception as error:  # a task's own code, or its data source, may raise anything
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, T2Error):
                cause = cause.__cause__ or cause.__context__
            if cause is not None:
                raise cause from None
            raise TaskError(f"task {name} could not be loaded: {type(error).__name__}: {error}") from error

    def _manager(self, defaults: bool) -> TaskManager:
        if defaults not in self._managers:
            self._managers[defaults] = TaskManager(
                include_path=self._paths, include_defaults=defaults, metadata=self._metadata
            )
        return self._managers[defaults]


def load_task(name: str, *, include_path: str | Path | None = None, metadata: Mapping[str, Any] | None = None) -> Task:
    """Load one task by name; see :class:`TaskSource`.

    Raises:
        TaskError: no such task, it is a group, or it cannot be loaded.
        DataError: the task's data is absent or malformed.
    """
    return TaskSource(include_path, metadata).load(name)


def encode_pair(lm: HFLM, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Tokens of (context, continuation), split at the border and with an empty context as lm-eval does it."""
    if context:
        pair: tuple[list[int], list[int]] = lm._encode_pair(context, continuation)
        return pair
    tokens = lm.tok_encode(continuation, add_special_tokens=False)
    prefix = lm.prefix_token_id
    return ([prefix], tokens) if not tokens or prefix != tokens[0] else (tokens[:1], tokens[1:])


def prompt_text(task: Any, doc: Any) -> str:
    """The text of a doc, without few-shot examples or template: what it asks, by which its domain is told.

    Never its label: where the text stands in the choices, it is all of them, and nothing where only an answer is left.
    """
    text = task.doc_to_text(doc)
    if has_pictures(task):
        return without_places(str(text))
    if isinstance(text, int) or not text:
        if getattr(task.config, "doc_to_choice", None) is not None:
            return "\n".join(map(str, task.doc_to_choice(doc)))
        return str(task.doc_to_target(doc)) if task.OUTPUT_TYPE == "loglikelihood_rolling" else ""
    return str(text)


class TaskDocs:
    """One lm-eval task seen as docs → requests → metrics, without disturbing the task.

    Args:
        task: the task; its few-shot sampler is as it was after every call.
        lm: lm-eval's model, for its tokenisation.
        form: how prompts are built.
        metric: the objective's metric; None is the task's first.
        filter: the objective's filter; None is the task's first.
        forbidden: content hashes of docs that are never few-shot examples.
        spare: docs that serve as few-shot examples where too few others are left.

    Attributes:
        objective: metric, filter and direction.
        output_type: the kind of requests that the task makes.

    Raises:
        ArgumentError: the task has no such metric or filter.
        TaskError: the task has no metric to adapt by, or an output type that text models do not answer.
    """

    def __init__(
        self,
        task: Task,
        lm: HFLM,
        form: PromptForm = PromptForm(),
        *,
        metric: str | None = None,
        filter: str | None = None,
        forbidden: Collection[str] = (),
        spare: Sequence[Any] = (),
    ) -> None:
        self.task = task
        self.lm = lm
        self.rules = rules_of(lm)
        self._generations = Generations(lm)
        self.form = form
        self.name = str(task.task_name)
        self._pictures = has_pictures(task)
        if self._pictures:
            check_pictures(task, lm)
        if task.OUTPUT_TYPE not in get_args(OutputType):
            raise TaskError(f"task {self.name} has the output type {task.OUTPUT_TYPE}, which t2 does not know")
        self.output_type: OutputType = task.OUTPUT_TYPE
        # The directions come first, because lm-eval's results list the metrics in that order; see first_metric.
        every = dict.fromkeys((*task.higher_is_better(), *task.aggregation()))
        metrics = [str(name) for name in every if name != NO_METRIC]
        if not metrics or list(task.aggregation()) == [NO_METRIC]:
            raise TaskError(f"task {self.name} computes no metric (predict_only?), so there is nothing to adapt by")
        if metric is not None and metric not in metrics:
            raise ArgumentError(f"metric={metric} is not a metric of task {self.name}{nearest(metric, metrics)}")
        self._listed = metrics
        self._expands = metric is None
        self._ensembles = {ensemble.name: ensemble for ensemble in task._filters}
        if filter is not None and filter not in self._ensembles:
            raise ArgumentError(
                f"filter={filter} is not a filter of task {self.name}{nearest(filter, self._ensembles)}"
            )
        name = metric or metrics[0]
        self._computed_as = name
        self.objective = Objective(
            metric=name,
            filter=filter or next(iter(self._ensembles)),
            higher_is_better=bool(task.higher_is_better().get(name, True)),
        )
        self._forbidden = frozenset(forbidden)
        self._spare = spare
        self._encoded: dict[tuple[str, ...], list[ScoreRequest]] = {}
        self._fewshot: list[tuple[str, Any]] | None = None

    @property
    def num_fewshot(self) -> int:
        """Few-shot examples per prompt, by lm-eval's rule."""
        own = self.task.config.num_fewshot
        return int((own if self.form.num_fewshot is None or own == 0 else self.form.num_fewshot) or 0)

    def instances(self, docs: Sequence[Any]) -> list[list[Instance]]:
        """The requests of each doc, built as lm-eval builds them.

        A doc's few-shot examples depend on the doc alone, so its prompt is the same in any company; the doc itself is
        never among them.

        Raises:
            TaskError: too few few-shot examples remain, or the task's code fails on a doc.
        """
        built = []
        for doc in docs:
            with self._undisturbed(doc):
                try:
                    built.append(self._build(doc))
                except T2Error:
                    raise
                except (ValueError, AssertionError) as error:
                    if not self.num_fewshot:
                        raise TaskError(f"task {self.name} cannot build a prompt: {error}") from error
                    raise TaskError(
                        f"task {self.name} cannot draw {self.num_fewshot} few-shot examples that are neither the doc "
                        f"itself nor scored docs ({error}); lower num_fewshot"
                    ) from error
        return built

    def _build(self, doc: Any) -> list[Instance]:
        chat = bool(self.form.apply_chat_template)
        template = functools.partial(chat_text, self.lm) if chat else None
        context = self.task.fewshot_context(
            doc,
            num_fewshot=self.num_fewshot,
            system_instruction=self.form.system_instruction,
            apply_chat_template=chat,
            fewshot_as_multiturn=self.form.fewshot_as_multiturn,
            chat_template=template,
            gen_prefix=self.task.doc_to_prefix(doc),
        )
        requests = self.task.construct_requests(
            doc=doc, ctx=context, metadata=(self.name, None, 1), apply_chat_template=chat, chat_template=template
        )
        requests = requests if isinstance(requests, list) else [requests]
        if self.form.gen_kwargs:
            for request in requests:
                if request.request_type == "generate_until":
                    request.arguments = (request.args[0], {**request.args[1], **self.form.gen_kwargs})
        return requests

    @contextlib.contextmanager
    def _undisturbed(self, doc: Any) -> Iterator[None]:
        if not self.num_fewshot:
            yield
            return
        own = doc_hash(doc)
        seed = derive_seed(FEWSHOT_SEED, "few-shot", own)
        task, sampler = self.task, getattr(self.task, "sampler", None)
        kept = task.fewshot_rnd if hasattr(task, "fewshot_rnd") else None
        state = dict(vars(sampler)) if sampler is not None else {}
        try:
            task.fewshot_rnd = random.Random(seed)
            if sampler is not None:
                if self._fewshot is None:
                    self._fewshot = [(doc_hash(example), example) for example in sampler.fewshot_docs()]
                state = dict(vars(sampler))
                sampler.set_rnd(seed)
                sampler.df = [e for digest, e in self._examples() if digest != own]
            yield
        finally:
            task.fewshot_rnd = kept
            if sampler is not None:
                vars(sampler).update(state)

    def _examples(self) -> list[tuple[str, Any]]:
        allowed = [(digest, e) for digest, e in self._fewshot or () if digest not in self._forbidden]
        # One more than needed: the sampler of a task whose examples come from the scored split draws one to throw away.
        if len(allowed) <= self.num_fewshot + 1:
            allowed += [(doc_hash(doc), doc) for doc in self._spare]
        return list(dict(allowed).items())

    def metrics(self, doc: Any, instances: Sequence[Instance], responses: Sequence[Response]) -> dict[str, Any]:
        """The task's metrics of one doc, from one answer per request.

        The answers go through the objective's filter and the task's ``process_results``. Where the task asks several
        times and votes, the one answer stands for all.
        """
        found = dict(self.task.process_results(doc, self.filtered(instances, responses)))
        # Some metrics are computed under other names, such as pass_at_k as pass@1; the first name is the objective.
        if self.objective.metric in found:
            self._expands, self._computed_as = False, self.objective.metric
        elif self._expands and found:
            name = first_metric(self._listed, list(found))
            if name not in self._listed:
                self._expands, self._computed_as = False, name
        return found

    def filtered(self, instances: Sequence[Instance], responses: Sequence[Response]) -> list[Any]:
        """What the objective's filter makes of one answer per request, as the task's ``process_results`` takes it."""
        repeats = max(1, int(self.task.config.repeats or 1))
        copies = [
            replace(instance, resps=[response] * repeats, filtered_resps={})
            for instance, response in zip(instances, responses, strict=True)
        ]
        self._ensembles[self.objective.filter].apply(copies)
        return [copy.filtered_resps[self.objective.filter] for copy in copies]

    def has_value(self, metrics: Mapping[str, Any]) -> bool:
        """Whether a doc has the objective's metric; lm-eval leaves out docs without it."""
        return self._computed_as in metrics

    def aggregate(self, metrics: Sequence[Mapping[str, Any]]) -> float:
        """Aggregate the objective over the docs that have it, signed so that higher is better.

        What is not a finite number (a metric undefined on such a set) counts as −inf.

        Raises:
            TaskError: no doc has the metric.
        """
        values = [m[self._computed_as] for m in metrics if self.has_value(m)]
        if not values:
            known = dict.fromkeys(name for m in metrics for name in m)
            raise TaskError(
                f"task {self.name} did not compute the metric {self.objective.metric} for any of {len(metrics)} docs; "
                f"it computed: {', '.join(known) or 'none'}; choose another with metric="
            )
        value = float(self._aggregation(values))
        if not math.isfinite(value):
            return -math.inf
        return value if self.objective.higher_is_better else -value

    @property
    def _aggregation(self) -> Callable[[Sequence[Any]], Any]:
        function: Callable[[Sequence[Any]], Any] = self.task.aggregation().get(self._computed_as, mean)
        return function

    @property
    def averages(self) -> bool:
        """Whether the objective over a set is the mean over its docs."""
        return self._aggregation is mean

    def samples(self, request: Instance) -> bool:
        """Whether the answer to a request is drawn at random."""
        if request.request_type != "generate_until":
            return False
        return self._generations.samples(request)

    def right(self, metrics: Mapping[str, Any]) -> bool:
        """Whether a doc counts as answered rightly: its metric is 1."""
        value = self.number(metrics)
        return value == 1.0 and self.objective.higher_is_better

    def number(self, metrics: Mapping[str, Any]) -> float | None:
        """Return the objective's metric of one doc; None if it is missing or not a number."""
        value: Any = metrics.get(self._computed_as)
        try:
            return None if isinstance(value, (tuple, list, str)) else float(value)
        except (TypeError, ValueError):
            return None

    def gold_index(self, doc: Any) -> tuple[int, ...]:
        """Indices of the requests whose continuation is a right answer; empty for generation or without a label."""
        if self.output_type == "generate_until":
            return ()
        if self.output_type != "multiple_choice":
            return (0,)
        task: Any = self.task
        choices = task.doc_to_choice(doc)
        gold = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
        found = []
        for label in gold if isinstance(gold, list) else [gold]:
            index = choices.index(label) if isinstance(label, str) and label in choices else label
            if isinstance(index, int) and 0 <= index < len(choices):
                found.append(index)
        return tuple(found)

    def gold_text(self, doc: Any) -> str | None:
        """The right answer's text with its delimiter, for generation; None for a doc without a label."""
        task: Any = self.task
        gold = task.doc_to_target(doc)
        if isinstance(gold, list):
            gold = gold[0] if gold else None
        if isinstance(gold, int) and task.config.doc_to_choice is not None:
            choices = task.doc_to_choice(doc)
            gold = choices[gold] if 0 <= gold < len(choices) else None
        if gold is None or str(gold).strip() in ("", "None"):
            return None
        return f"{task.config.target_delimiter or ''}{gold}"

    def labelled(self, doc: Any) -> bool:
        """Whether a doc has a right answer to adapt by."""
        try:
            return (
                bool(self.gold_index(doc)) if self.output_type == "multiple_choice" else self.gold_text(doc) is not None
            )
        except (KeyError, IndexError, TypeError, ValueError):
            return False

    def answer(
        self,
        engine: Engine,
        requests: Sequence[Sequence[Instance]],
        mixtures: Sequence[Z | None] = (None,),
        rows: Sequence[int] | None = None,
        *,
        seed: int = 0,
        progress: str | None = None,
    ) -> list[list[Response]]:
        """Answer requests on the batched engine, with lm-eval's tokens, truncation, stop texts and postprocessing.

        Requests with pictures, and requests that the engine cannot generate, are answered by lm-eval's own model
        instead, one mixture after another.

        Args:
            engine: runs the model.
            requests: for each entry (a doc, or a doc under one of many mixtures) its requests.
            mixtures: the distinct mixtures.
            rows: the mixture of each entry; None means all use the first.
            seed: of sampling, where the task samples.
            progress: text of a progress bar.

        Returns:
            For each entry its answers, in the order and shape of lm-eval's.
        """
        if self._pictures:
            every = rows if rows is not None else [0] * len(requests)
            seen = answers_in_turn(self.lm, engine, requests, mixtures, every, seed=seed, progress=progress)
            return [list[Response](texts) for texts in seen]
        flat = [(entry, instance) for entry, instances in enumerate(requests) for instance in instances]
        row = [0 if rows is None else rows[entry] for entry, _ in flat]
        answers: list[Response | None] = [None] * len(flat)
        texts = [i for i, (_, instance) in enumerate(flat) if instance.request_type == "generate_until"]
        scores = [i for i, (_, instance) in enumerate(flat) if instance.request_type != "generate_until"]
        with self.rules.arithmetic():
            if texts and not self._generations.same_in_batches([flat[i][1] for i in texts]):
                asked, of_texts = [[flat[i][1]] for i in texts], [row[i] for i in texts]
                by_lm = answers_in_turn(self.lm, engine, asked, mixtures, of_texts, seed=seed, progress=progress)
                for i, (text,) in zip(texts, by_lm, strict=True):
                    answers[i] = text
            elif texts:
                prepared = [self.generation(flat[i][1]) for i in texts]
                found = engine.generate(prepared, mixtures, [row[i] for i in texts], seed=seed, progress=progress)
                for i, generated in zip(texts, found, strict=True):
                    answers[i] = self._generations.answer(flat[i][1], generated)
            if scores:
                windows = [self.continuations(flat[i][1]) for i in scores]
                parts = [(i, window) for i, some in zip(scores, windows, strict=True) for window in some]
                scored = engine.score(
                    [part for _, part in parts], mixtures, [row[i] for i, _ in parts], progress=progress
                )
                sums: dict[int, tuple[float, bool]] = dict.fromkeys(scores, (0.0, True))
                for (i, _), result in zip(parts, scored, strict=True):
                    total, greedy = sums[i]
                    sums[i] = (total + result.loglikelihood, greedy and result.greedy)
                for i, result_pair in sums.items():
                    rolling = flat[i][1].request_type == "loglikelihood_rolling"
                    answers[i] = result_pair[0] if rolling else result_pair
        shaped: list[list[Response]] = [[] for _ in requests]
        for (entry, _), response in zip(flat, answers, strict=True):
            assert response is not None
            shaped[entry].append(response)
        return shaped

    def likelihoods(
        self,
        engine: Engine,
        asked: Sequence[tuple[Instance, str]],
        mixtures: Sequence[Z | None],
        rows: Sequence[int],
        *,
        progress: str | None = None,
    ) -> list[tuple[float, int]]:
        """Log-likelihoods of given texts as answers to generation requests.

        Args:
            engine: runs the model.
            asked: requests, each with a text.
            mixtures: the distinct mixtures.
            rows: the mixture of each request.
            progress: text of a progress bar.

        Returns:
            For each the log-likelihood in nats and the number of tokens; (0, 0) for a text without tokens.
        """
        if self._pictures:
            return likelihoods_in_turn(self.lm, engine, asked, mixtures, rows, progress=progress)
        pairs = [encode_pair(self.lm, str(instance.args[0]), text) for instance, text in asked]
        kept = [i for i, (_, continuation) in enumerate(pairs) if continuation]
        windows = [self.window(*pairs[i]) for i in kept]
        scored = engine.score(windows, mixtures, [rows[i] for i in kept], progress=progress)
        found = [(0.0, 0)] * len(asked)
        for i, window, result in zip(kept, windows, scored, strict=True):
            found[i] = (result.loglikelihood, len(window.continuation))
        return found

    def generation(self, instance: Instance) -> GenerateRequest:
        """A generation request's tokens and arguments; see :meth:`t2.harness.generation.Generations.request`."""
        return self._generations.request(instance)

    def text(self, tokens: Sequence[int], stop: Sequence[str]) -> str:
        """An answer's text; see :meth:`t2.harness.generation.Generations.text`."""
        return self._generations.text(tokens, stop)

    def continuations(self, instance: Instance) -> list[ScoreRequest]:
        """A likelihood request's tokens by ``HFLM``'s rules: one continuation, or the windows of a rolling request.

        None where there is nothing to score: lm-eval gives an answer without tokens 0 nats, beside one of one token.
        """
        texts = tuple(str(text) for text in instance.args[:2])
        key = (instance.request_type, *texts)
        if key not in self._encoded:
            if instance.request_type == "loglikelihood_rolling":
                windows = get_rolling_token_windows(
                    token_list=self.lm.tok_encode(texts[0]),
                    prefix_token=self.lm.prefix_token_id,
                    max_seq_len=self.rules.rolling,
                    context_len=1,
                )
                self._encoded[key] = [self.window(*make_disjoint_window(pair)) for pair in windows]
            else:
                context, continuation = encode_pair(self.lm, *texts)
                self._encoded[key] = [self.window(context, continuation)] if continuation else []
        return self._encoded[key]

    def continuation(self, instance: Instance) -> ScoreRequest:
        """The tokens of a request for one continuation.

        Raises:
            TaskError: the continuation is empty or longer than the model takes.
        """
        return next(iter(self.continuations(instance)), None) or self.window([], [])

    def window(self, context: list[int], continuation: list[int]) -> ScoreRequest:
        """A likelihood request, its context cut from the left to what the model holds.

        Raises:
            TaskError: the continuation is empty or longer than the model takes.
        """
        if not 0 < len(continuation) < self.rules.pair:
            raise TaskError(
                f"task {self.name} has an answer of {len(continuation)} tokens, "
                f"the model takes 1 to {self.rules.pair - 1}"
            )
        kept = context[-(self.rules.pair - len(continuation)) :]
        return ScoreRequest(tuple(kept), tuple(continuation))
