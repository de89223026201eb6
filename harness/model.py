"""``--model t2``: lm-eval's own model, adapted to each task or prompt before it answers."""

from __future__ import annotations

import contextlib
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM, CacheHook

from t2.adapters.expert import Expert, Z
from t2.adapters.peft_folder import PeftFolder, read_folder
from t2.adapters.strategies import STRATEGIES, Choice
from t2.adapters.strategies.dispatch import asked_of
from t2.core.digests import digest_of, doc_hash
from t2.core.errors import ArgumentError, StorageError, TaskError
from t2.core.files import check_writable
from t2.core.record import AdaptationRecord, ExpertRef, Timing, UsedMixture
from t2.harness import compat, excepthook, peft_adapter, store, summary
from t2.harness.adaptation import Runtime, TaskAdaptation, check_all_move, check_experts_move, check_moved, moves
from t2.harness.args import Settings, parse_args, split_args
from t2.harness.base import dtype_of
from t2.harness.compat import Evaluation
from t2.harness.experts import prepare_classifier, prepare_experts, read_experts
from t2.harness.generation import chat_text
from t2.harness.mixed import answer_in_rows
from t2.harness.opened import Opened, open_model
from t2.harness.pictures import check_pictures, has_pictures
from t2.harness.pool import Pool, carved, find_pool
from t2.harness.preflight import check_requests

RequestType = Literal["loglikelihood", "loglikelihood_rolling", "generate_until"]
_CACHE_KEY = "t2-identity"

_log = logging.getLogger(__name__)


@dataclass
class _Run:
    """One evaluation by lm-eval."""

    evaluation: Evaluation
    pools: Mapping[str, Pool]
    adaptations: dict[str, TaskAdaptation] = field(default_factory=dict)
    ready: set[str] = field(default_factory=set)
    checked: bool = False
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))


class T2LM(LM):  # type: ignore[misc]
    """lm-eval's ``hf`` model with Transformer² adaptation in front of it.

    Pass 1 finds the mixture of experts for each task (or prompt) by the strategy ``adapt``; pass 2 answers through
    lm-eval's own ``HFLM``, one call per mixture over all its requests in their order. With ``adapt=none`` every call
    goes to ``HFLM`` as it came.

    Args:
        model_args: see :data:`t2.harness.args.MODEL_ARGS`, and the parameters of ``HFLM``.

    Attributes:
        records: the adaptations of the last evaluation.
        MULTIMODAL: whether the model sees; lm-eval asks before it runs tasks with pictures.

    Raises:
        T2Error: an argument, expert or model cannot be used; arguments and expert files are checked before the model
            loads.
    """

    def __init__(self, **model_args: Any) -> None:
        super().__init__()
        settings = parse_args(model_args)
        read = _read_before(settings)
        adapter = _read_adapter(settings)
        self._begin(settings, read, open_model(settings), adapter)

    @classmethod
    def sharing(cls, opened: Opened, model_args: Mapping[str, Any]) -> T2LM:
        """Build a model over a base that is loaded already, from the arguments that loading it would take too.

        Only one of the models that share a base may be in an evaluation at a time. An adapter of PEFT is in it while
        it answers, and no longer.

        Raises:
            T2Error: as for the constructor; or the arguments mean another base.
        """
        settings = parse_args(model_args)
        if not opened.serves(settings):
            raise ArgumentError(f"model_args name another model than {opened.base.id}, which is loaded; load that one")
        lm = cls.__new__(cls)
        LM.__init__(lm)
        lm._begin(settings, _read_before(settings), opened, _read_adapter(settings), shared=True)
        return lm

    def _begin(
        self,
        settings: Settings,
        read: list[Expert] | None,
        opened: Opened,
        adapter: PeftFolder | None,
        *,
        shared: bool = False,
    ) -> None:
        self.settings = settings
        self.inner, self.base = opened.inner, opened.base
        self.MULTIMODAL = bool(getattr(self.inner, "MULTIMODAL", False))
        self._adapter = adapter
        self._shared = shared
        self._answers = opened.answers
        self._runtime: Runtime | None = None
        needs_experts = STRATEGIES[settings.adapt]().needs_experts
        engine = opened.engine
        if engine is None and needs_experts:
            assert opened.unadaptable is not None
            raise opened.unadaptable
        if engine is not None:
            experts = prepare_experts(settings, read, engine.base, engine.ranks()) if needs_experts else []
            classifier = prepare_classifier(settings, read, engine.base, engine.ranks())
            if settings.adapt in ("prompt", "classifier"):
                asked_of(experts, classifier)
            pool = opened.workers() if needs_experts and settings.workers else None
            self._runtime = Runtime(
                self.inner, engine, tuple(experts), settings, classifier, memory=opened.memory, pool=pool
            )
        if adapter is not None and not shared:
            peft_adapter.adapt(self.inner, adapter, self.base)
        with self._with_adapter():  # one that does not fit is told now
            pass
        self.records: list[AdaptationRecord] = []
        self._paths: dict[str, Any] = {}
        self._run: _Run | None = None
        self._moved: set[str] = set()
        compat.watch()

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: Mapping[str, Any], additional_config: Mapping[str, Any] | None = None
    ) -> T2LM:
        """Build the model from arguments; ``additional_config`` holds the command line's device and batch size."""
        if compat.in_command_line():
            excepthook.install(whole_program=True)
        extra = {name: value for name, value in (additional_config or {}).items() if value is not None}
        return cls(**{**extra, **arg_dict})

    @classmethod
    def create_from_arg_string(cls, arg_string: str, additional_config: Mapping[str, Any] | None = None) -> T2LM:
        """Build the model from ``key=value,…``."""
        return cls.create_from_arg_obj(split_args(arg_string), additional_config)

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """See ``lm_eval.api.model.LM.loglikelihood``."""
        answers: list[tuple[float, bool]] = self._answer("loglikelihood", requests)
        return answers

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        """See ``lm_eval.api.model.LM.loglikelihood_rolling``."""
        answers: list[float] = self._answer("loglikelihood_rolling", requests)
        return answers

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """See ``lm_eval.api.model.LM.generate_until``."""
        answers: list[str] = self._answer("generate_until", requests)
        return answers

    @contextlib.contextmanager
    def evaluation(self, evaluation: Evaluation) -> Iterator[dict[str, Any]]:
        """Context in which requests belong to the given tasks.

        lm-eval's ``simple_evaluate`` and ``evaluate`` enter it by themselves; only a program that had bound
        ``evaluate`` before this model was built enters it itself.

        Yields:
            Arguments of ``evaluate`` to override: requests cached by an older run may hold docs that are now set aside.
        """
        if self._run is not None:
            raise ArgumentError("this t2 model is already in an evaluation; build another one for a second")
        for task in evaluation.tasks.values():
            if has_pictures(task) and not self.MULTIMODAL:
                check_pictures(task, self.inner)
        with contextlib.ExitStack() as stack:
            labelled = STRATEGIES[self.settings.adapt]().needs_labels
            pools = {
                name: find_pool(task, evaluation.samples.get(name), labelled=labelled)
                for name, task in evaluation.tasks.items()
            }
            for name, task in evaluation.tasks.items():
                stack.enter_context(carved(task, pools[name]))
            set_aside = [name for name, pool in pools.items() if pool.kept is not None]
            for name in set_aside:
                _log.info("%s: %d docs are set aside for adaptation and not scored", name, len(pools[name].docs))
            self._run = run = _Run(evaluation, pools)
            self.records, self._paths = [], {}
            try:
                yield {"cache_requests": False} if set_aside and evaluation.caches_requests else {}
                self._finish(run)
            finally:
                self._run = None
                if self._runtime is not None:
                    self._runtime.engine.release()

    def _answer(self, kind: RequestType, requests: list[Instance]) -> Any:
        if self._run is not None and not self._run.checked:
            # Without a search, lm-eval's model fails at once on requests that it cannot generate.
            tries = STRATEGIES[self.settings.adapt]().needs_experts
            check_requests(self.inner, self._run.evaluation.tasks, tries=tries)
            self._run.checked = True
        if not STRATEGIES[self.settings.adapt]().needs_experts:
            as_it_came, seconds = self._answered(kind, requests, None, self._with_adapter())
            self._spent(requests, seconds)
            return as_it_came
        run = self._prepare(requests)
        groups: dict[tuple[tuple[str, float], ...], list[int]] = {}
        choices: dict[tuple[tuple[str, float], ...], Choice] = {}
        for index, request in enumerate(requests):
            choice = run.adaptations[str(request.task_name)].choice_of(request.doc_id)
            key = tuple(sorted(choice.alpha.items()))
            groups.setdefault(key, []).append(index)
            choices[key] = choice
        self._check_cacheable(kind, requests, groups)
        assert self._runtime is not None
        if kind == "generate_until" and len(groups) > 1:
            places = {index: place for place, some in enumerate(groups.values()) for index in some}
            rows = [places[index] for index in range(len(requests))]
            if (texts := self._in_rows(requests, [choices[key] for key in groups], rows)) is not None:
                return texts
        answers: list[Any] = [None] * len(requests)
        experts = [expert.z for expert in self._runtime.experts]
        engine, mixtures = self._runtime.engine, [choice.z for choice in choices.values()]
        # In low precision a sum of directions and composed weights round differently, and the choice between them would
        # depend on how many mixtures are cached.
        exact = engine.precision == "float32"
        with engine.switching(experts, mixtures) if exact else contextlib.nullcontext():
            for key, indices in groups.items():
                own = requests if len(groups) == 1 else [requests[i] for i in indices]
                found, seconds = self._answered(kind, own, choices[key].z, self._mixed(choices[key]))
                self._spent(own, seconds)
                for i, answer in zip(indices, found, strict=True):
                    answers[i] = answer
        return answers

    def _in_rows(self, requests: list[Instance], choices: Sequence[Choice], rows: Sequence[int]) -> list[str] | None:
        """Texts by :func:`t2.harness.mixed.answer_in_rows`, in lm-eval's cache too."""
        assert self._runtime is not None
        start = time.perf_counter()
        with _told_of_ctrl_c():
            texts = answer_in_rows(self._runtime, requests, [choice.z for choice in choices], rows)
        if texts is None:
            return None
        unchecked = {label: choice.z for choice in choices if (label := _label(choice)) not in self._moved}
        check_all_move(self._runtime, [(f"the mixture {label[:200]}", z) for label, z in unchecked.items()])
        self._moved.update(unchecked)
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        self._spent(requests, time.perf_counter() - start)
        return texts

    def _check_cacheable(
        self, kind: RequestType, requests: list[Instance], groups: Mapping[Any, Sequence[int]]
    ) -> None:
        """lm-eval's cache keys answers by the request alone, so one request must not have two mixtures.

        Raises:
            ArgumentError: it has, and the cache is in use.
        """
        if self.cache_hook.dbdict is None or len(groups) == 1:
            return
        owner: dict[str, tuple[Any, str]] = {}
        for group, indices in groups.items():
            for i in indices:
                name = str(requests[i].task_name)
                first, other = owner.setdefault(doc_hash([kind, *requests[i].args]), (group, name))
                if first != group:
                    raise ArgumentError(
                        f"--use_cache: tasks {other} and {name} ask the same under different mixtures, which the cache "
                        "cannot tell apart; run them one by one with a file each"
                    )

    def _answered(
        self, kind: RequestType, requests: list[Instance], z: Z | None, mixed: contextlib.AbstractContextManager[None]
    ) -> tuple[list[Any], float]:
        """Answers under a mixture, and the seconds they took; what the user's cache of lm-eval sees is asked anew."""

        def ask() -> list[Any]:
            with mixed:
                found: list[Any] = self._ask(kind, requests)
                return found

        if self._answers is not None and self._adapter is None and self.cache_hook.dbdict is None:
            return self._answers.ask(kind, requests, z, ask)
        start = time.perf_counter()
        answers = ask()
        return answers, time.perf_counter() - start

    def _with_adapter(self) -> contextlib.AbstractContextManager[None]:
        """The model with the adapter, where there is one and it is not in the model for good."""
        if self._adapter is None or not self._shared:
            return contextlib.nullcontext()
        return peft_adapter.adapted(self.inner, self._adapter, self.base)

    def _ask(self, kind: RequestType, requests: list[Instance]) -> Any:
        self.inner.set_cache_hook(self.cache_hook)
        try:
            with _told_of_ctrl_c():
                return getattr(self.inner, kind)(requests)
        except NotImplementedError as error:
            raise TaskError(f"lm-eval's {self.settings.engine} model cannot answer {kind} requests: {error}") from error
        finally:
            self.inner.set_cache_hook(CacheHook(None))

    @contextlib.contextmanager
    def _mixed(self, choice: Choice) -> Iterator[None]:
        """The model under a mixture, which must act."""
        assert self._runtime is not None
        label = _label(choice)
        unchecked = moves(choice.z) and label not in self._moved
        base = self._runtime.base_probe if unchecked else None
        with self._runtime.engine.applied(choice.z):
            if base is not None:
                check_moved(base, self._runtime.probe(), f"the mixture {label[:200]}")
                self._moved.add(label)
            yield

    def _prepare(self, requests: Sequence[Instance]) -> _Run:
        run = self._run
        if run is None or any(request.task_name not in run.evaluation.tasks for request in requests):
            raise ArgumentError(
                f"adapt={self.settings.adapt} was not told which tasks these requests belong to: build the model "
                "before importing lm_eval's evaluate by name, or use simple_evaluate, or call inside lm.evaluation(...)"
            )
        assert self._runtime is not None
        if not run.adaptations:
            for name, task in run.evaluation.tasks.items():
                run.adaptations[name] = TaskAdaptation(task, run.pools[name], run.evaluation.form, self._runtime)
        wanted = [run.adaptations[name] for name in dict.fromkeys(str(request.task_name) for request in requests)]
        missing = [a for a in wanted if a.name not in run.ready and not a.find()]
        if STRATEGIES[self.settings.adapt]().needs_labels:
            for adaptation in missing:
                self._check_uncached(adaptation.task, requests)
        if missing and self.settings.adapt not in ("expert", "mix"):
            check_experts_move(self._runtime)
        self._plan(missing)
        run.ready.update(adaptation.name for adaptation in wanted)
        return run

    def _plan(self, adaptations: Sequence[TaskAdaptation]) -> None:
        """Plan one task after another, or several beside each other where workers do their searches."""
        assert self._runtime is not None
        pool = self._runtime.pool
        if pool is None:
            for adaptation in adaptations:
                adaptation.plan()
            return
        plans = [adaptation.plan for adaptation in adaptations]
        # The other strategies put mixtures into the model of this process, which is one.
        together = [plans] if self.settings.adapt == "cem" else [[plan] for plan in plans]
        try:
            for some in together:
                pool.workers.turns.run(some)
        finally:
            if (told := pool.workers.losses()) is not None:
                _log.warning("%s", told)

    def _check_uncached(self, task: Any, requests: Sequence[Instance] = ()) -> None:
        """A new search must not meet answers that another one has left in lm-eval's cache.

        Raises:
            ArgumentError: some requests of the task did not reach the model.
        """
        given = Counter(request.request_type for request in requests if request.task_name == task.task_name)
        own: Counter[str] = Counter()
        for instance in task.instances:
            own[instance.request_type] += int(instance.repeats or 1)
        kinds = given or own
        if any(given[kind] < own[kind] for kind in kinds):
            raise ArgumentError(
                f"--use_cache: the file holds answers of task {task.task_name} under an adaptation whose record is not "
                "in the cache of adaptations; name another file"
            )

    def _spent(self, requests: Sequence[Instance], seconds: float) -> None:
        if self._run is not None and requests:
            for name, count in Counter(str(request.task_name) for request in requests).items():
                self._run.seconds[name] += seconds * count / len(requests)

    def _finish(self, run: _Run) -> None:
        """Collect the records, also of tasks whose answers all came from lm-eval's cache."""
        assert self._run is run
        for name, task in run.evaluation.tasks.items():
            if not STRATEGIES[self.settings.adapt]().needs_experts:
                self.records.append(self._plain_record(name, task, run.seconds[name]))
                continue
            adaptation = run.adaptations.get(name)
            if adaptation is None:
                assert self._runtime is not None
                adaptation = TaskAdaptation(task, run.pools[name], run.evaluation.form, self._runtime)
            if name not in run.ready and not adaptation.find():
                if STRATEGIES[self.settings.adapt]().needs_labels:
                    self._check_uncached(task)
                adaptation.plan()
            adaptation.answered(run.seconds[name])
            with _results_first():
                adaptation.finish()
            assert adaptation.record is not None
            assert adaptation.path is not None
            self.records.append(adaptation.record)
            self._paths[name] = adaptation.path
        if self.settings.record is not None:
            with _results_first():
                store.write_records(self.settings.record, self.records)
                self._paths = dict.fromkeys(run.evaluation.tasks, self.settings.record)

    def _plain_record(self, name: str, task: Any, seconds: float) -> AdaptationRecord:
        """What answered a task where nothing was mixed: the base, or an adapter of PEFT."""
        metadata = getattr(task.config, "metadata", None) or {}
        refs = self._refs()
        key = [self.settings.adapt, name, self.base.identity, self.dtype]
        return AdaptationRecord(
            key=digest_of([*key, *(ref.digest for ref in refs), self._settings()] if refs else key),
            task=name,
            task_version=str(metadata.get("version", task.VERSION)),
            strategy=self.settings.adapt,
            base=self.base,
            dtype=self.dtype,
            experts=refs,
            settings=self._settings(),
            overlap=peft_adapter.overlap(self._adapter, task) if self._adapter is not None else (),
            mixtures=(
                UsedMixture(
                    alpha={ref.name: 1.0 for ref in refs}, requests=sum(int(i.repeats or 1) for i in task.instances)
                ),
            ),
            note="the base model" if self._adapter is None else f"the adapter {self._adapter.name} of PEFT",
            timing=Timing(pass2=seconds),
        )

    def _refs(self) -> tuple[ExpertRef, ...]:
        if self._adapter is not None:
            return (peft_adapter.reference(self._adapter),)
        return self._runtime.expert_refs() if self._runtime else ()

    def _settings(self) -> dict[str, Any]:
        own = peft_adapter.bearing(self._adapter) if self._adapter is not None else {}
        return {**self.settings.bearing(), **own}

    @property
    def dtype(self) -> str:
        """The dtype of the weights, for example ``bfloat16``."""
        return self._runtime.dtype if self._runtime else dtype_of(self.inner)

    @property
    def numbers(self) -> int:
        """The numbers in what takes part beside the base: experts and classifier, or an adapter of PEFT."""
        if self._adapter is not None:
            return self._adapter.numbers
        if self._runtime is None or not self._runtime.experts:
            return 0
        return sum(vector.numel() for expert in self._runtime.taking_part for vector in expert.z.values())

    def identity(self) -> dict[str, Any]:
        """What answers: base, strategy, experts, controls, settings and seeds, with a digest of all of it."""
        refs = self._refs()
        content = {
            "base": self.base.model_dump(mode="json"),
            "dtype": self.dtype,
            "experts": [ref.model_dump(mode="json") for ref in refs],
            "settings": self._settings(),
        }
        nameless = {**content, "base": self.base.identity, "experts": [ref.content for ref in refs]}
        return {**content, "digest": digest_of(nameless)}

    def results_name(self, own: str) -> str:
        """Return the name of results for lm-eval, such as ``SmolLM2-135M-Instruct+t2-cem-36694d46``.

        Results of an adapted model never have the base's name.

        Args:
            own: lm-eval's name, from the model_args; random if these name no model.
        """
        if self.settings.adapt != "none":
            return f"{self.base.id}+t2-{self.settings.adapt}-{self.identity()['digest'][:8]}"
        return own if "pretrained" in self.settings.hf else self.base.id

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval writes into its results: ``hf``'s own entries, and under ``t2`` the identity and the records."""
        if compat.in_command_line():
            summary.arm(self.records, self._paths)
        records = [record.model_dump(mode="json") for record in self.records]
        with self._with_adapter():
            told = self.inner.get_model_info()
        return {**told, "t2": {**self.identity(), "records": records}}

    def set_cache_hook(self, cache_hook: CacheHook) -> None:
        """Take lm-eval's answer cache, unless it holds the answers of something else.

        Raises:
            ArgumentError: the cache belongs to another base, other experts or settings, or to another model of lm-eval.
        """
        if cache_hook.dbdict is not None:
            own, stored = self.identity()["digest"], cache_hook.dbdict.get(_CACHE_KEY)
            if stored is None and len(cache_hook.dbdict):
                raise ArgumentError("--use_cache: the file holds answers that t2 did not write; name another one")
            if stored is not None and stored != own:
                raise ArgumentError(
                    "--use_cache: the file holds answers of another base model, other experts or other model_args; "
                    "name another one"
                )
            cache_hook.dbdict[_CACHE_KEY] = own
        self.cache_hook = cache_hook

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Chat messages as one prompt text, by ``hf``."""
        return chat_text(self.inner, chat_history, add_generation_prompt)

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template's text, by ``hf``."""
        try:
            template: str | None = self.inner.chat_template(chat_template)
        except ValueError as error:
            raise ArgumentError(f"--apply_chat_template={chat_template}: {error}") from error
        return template

    @property
    def tokenizer_name(self) -> str:
        """Name of the tokenizer, part of the key of lm-eval's request cache."""
        name: str = self.inner.tokenizer_name
        return name

    @property
    def tokenizer(self) -> Any:
        """The tokenizer."""
        return self.inner.tokenizer

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self.inner.device)

    @property
    def rank(self) -> int:
        """Index of this process among those of a data-parallel run."""
        return int(self.inner.rank)

    @property
    def world_size(self) -> int:
        """Number of processes of a data-parallel run."""
        return int(self.inner.world_size)

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        """Concatenate a tensor over processes."""
        gathered: torch.Tensor = self.inner.all_gather(tensor)
        return gathered

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        """Collect an object from every process on process ``dst``."""
        gathered: list[Any] | None = self.inner.gather_object(obj, dst)
        return gathered

    def barrier(self) -> None:
        """Wait for all processes."""
        self.inner.barrier()

    @property
    def batch_size(self) -> int | str:
        """As given to ``hf``."""
        size: int | str = self.inner.batch_size
        return size

    @property
    def batch_sizes(self) -> dict[Any, Any]:
        """Batch sizes that ``hf`` has found by itself."""
        sizes: dict[Any, Any] = self.inner.batch_sizes
        return sizes

    @property
    def max_length(self) -> int:
        """Tokens that the model holds."""
        return int(self.inner.max_length)

    @property
    def max_gen_toks(self) -> int:
        """Tokens of an answer where a task names no limit."""
        return int(self.inner.max_gen_toks)

    @property
    def eot_token_id(self) -> int:
        """The end-of-text token."""
        return int(self.inner.eot_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context."""
        return int(self.inner.prefix_token_id)

    @property
    def config(self) -> Any:
        """The model's configuration."""
        return self.inner.config


def _label(choice: Choice) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in choice.alpha.items())


def _read_adapter(settings: Settings) -> PeftFolder | None:
    return read_folder(settings.peft) if settings.peft is not None else None


def _read_before(settings: Settings) -> list[Expert] | None:
    """What can be read and checked before a model is loaded: named experts, and the place of the records."""
    if settings.record is not None:
        check_writable(settings.record)
    if settings.experts is None or not STRATEGIES[settings.adapt]().needs_experts:
        return None
    return read_experts(settings.experts, settings.adapt, settings.registry)


@contextlib.contextmanager
def _told_of_ctrl_c() -> Iterator[None]:
    """A Ctrl-C while the model answers ends with one line, by :mod:`t2.harness.excepthook`."""
    try:
        yield
    except KeyboardInterrupt as stop:
        stop.add_note("t2: stopped while answering; the base model is as it was")
        raise


@contextlib.contextmanager
def _results_first() -> Iterator[None]:
    """After the answers a full disk is reported and no more: lm-eval's results hold the records too."""
    try:
        yield
    except StorageError as error:
        _log.error("%s", error)
