"""A base model to adapt and to ask."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import transformers
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM

from t2.adapters.convert.pair import TOLERANCE, check_settings, extract
from t2.adapters.convert.public import import_public, read_public
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Expert, load_expert
from t2.adapters.strategies import STRATEGIES, Choice
from t2.api.adapted import Adapted
from t2.api.answers import Asked, stop_texts
from t2.api.saved import Named, SavedExpert, place, read_named, write
from t2.core.errors import ArgumentError, ExpertFileError, nearest
from t2.core.manifest import BaseModelRef
from t2.harness.adaptation import Runtime, TaskAdaptation, check_experts_move, check_moved, moves
from t2.harness.args import MODEL_ARGS, Settings, check_hf_args, parse_args
from t2.harness.base import base_id, open_base
from t2.harness.catalogue import known_experts
from t2.harness.examples import (
    ChoiceExample,
    Example,
    Scorer,
    example_pool,
    example_task,
    place_docs,
    prompt_task,
)
from t2.harness.experts import prepare_classifier, prepare_experts
from t2.harness.generation import requested_length
from t2.harness.pool import Pool, carved, find_pool
from t2.harness.tasks import PromptForm, load_task

Labelled = Example | ChoiceExample | tuple[str, str] | tuple[str, Sequence[str], int]
"""A labelled example: (prompt, answer) or (prompt, choices, index of the right one)."""

_ELSEWHERE = {
    "adapt": "strategy",
    "engine": "load_model",
    "moe": "load_model",
    "batch": "load_model",
    "record": "Adapted.write_record",
}
_ROOM = 8
"""Tokens that an answer may be longer than the longest right one; more cannot be an exact match."""

_log = logging.getLogger(__name__)


def load_model(
    pretrained: str | Path | transformers.PreTrainedModel | None = None,
    *,
    batch: int | None = None,
    moe: str = "refuse",
    **hf_args: Any,
) -> Model:
    """Load a base model as ``lm_eval --model t2`` does.

    Args:
        pretrained: a Hub name, a folder, or a loaded model (then ``tokenizer=`` too); None is the demo model.
        batch: rows of a batch at most, during a search or dispatch; None is as many as memory holds, 32 on a CPU.
        moe: a model with mixture-of-experts layers: ``refuse`` it, or ``skip`` their routers and routed experts.
        hf_args: arguments of lm-eval's ``hf``, for example ``dtype="bfloat16"``, ``device`` and ``batch_size``.

    Raises:
        ArgumentError: an argument that does not exist.
        DependencyError: the demo model is wanted and not installed.
        ModelError: the model cannot be loaded or adapted.
    """
    rows: Any = batch
    if rows is not None and (not isinstance(rows, int) or rows < 1):
        raise ArgumentError(f"batch={batch} must be a whole number, at least 1")
    if isinstance(pretrained, Path):
        pretrained = str(pretrained.expanduser())
    check_hf_args(hf_args, "load_model")
    lm = open_base(pretrained, **hf_args)
    revision = hf_args.get("revision")
    engine = TransformersEngine(
        lm.model,
        lm.tokenizer,
        base_id(pretrained, hf_args.get("gguf_file")),
        None if revision is None else str(revision),
        batch_size=batch,
        moe=moe,
    )
    return Model(lm, engine, moe)


class Model(Asked):
    """A base model. It answers as it is; :meth:`adapt` gives an adapted one over the same weights.

    Attributes:
        lm: lm-eval's ``HFLM``, which holds model and tokenizer.
        engine: runs it under mixtures.
    """

    def __init__(self, lm: HFLM, engine: TransformersEngine, moe: str = "refuse") -> None:
        self.lm = lm
        self.engine = engine
        self._moe = moe

    def __repr__(self) -> str:
        return f"<Model {self.base.id}, {len(self.engine.targets)} adaptable matrices, {self.engine.dtype}>"

    @property
    def base(self) -> BaseModelRef:
        """Its name, revision and fingerprint."""
        return self.engine.base

    def experts(self) -> dict[str, Expert]:
        """The experts for this base, by the name that ``experts=`` takes: the user's, then the demo's."""
        found: dict[str, Expert] = {}
        for name, path in known_experts().items():
            try:
                expert = load_expert(path)
            except ExpertFileError as error:
                _log.warning("experts: passed over: %s", error)
                continue
            if expert.manifest.base.fingerprint == self.base.fingerprint:
                found[name] = expert
        return found

    def adapt(
        self,
        strategy: str | None = None,
        *,
        examples: Sequence[Labelled] | None = None,
        prompts: str | Sequence[str] | None = None,
        task: str | Task | None = None,
        experts: str | Named | Sequence[Named] | None = None,
        score: Scorer | None = None,
        stop: Sequence[str] | None = None,
        max_new_tokens: int | None = None,
        chat: bool = False,
        system: str | None = None,
        num_fewshot: int | None = None,
        include_path: str | Path | None = None,
        **options: Any,
    ) -> Adapted:
        """Adapt to labelled examples, to prompts, to an lm-eval task, or to nothing in particular.

        An adaptation that was done before, also by ``lm_eval --model t2``, is found again and not repeated.

        Args:
            strategy: a value of ``adapt`` of the model_args; None is ``cem`` for examples and tasks, ``prompt`` for
                prompts, and else ``expert`` or ``mix``, by the number of experts.
            examples: labelled examples: (prompt, answer) or (prompt, choices, label), all of one kind.
            prompts: one prompt, whose mixture then answers everything, or several, which each have their own.
            task: an lm-eval task or its name; labelled docs come from its adaptation pool and are never scored.
            experts: names joined by ``+``, or a list of names, files, folders and experts; None takes the experts for
                this base, one per domain.
            score: for examples with answers: scores a generated answer, given the right one; None compares them.
            stop: for examples with answers: an answer ends before the first of these texts; None is the end of the
                line where no right answer has several lines.
            max_new_tokens: for examples with answers: None is eight more than the longest right answer has.
            chat: use the model's chat template.
            system: a system message; for examples and prompts it needs ``chat``.
            num_fewshot: for a task: examples in the prompt.
            include_path: for a task: a folder of further lm-eval tasks.
            options: model_args of the same names, for example ``shots``, ``generations``, ``alpha`` and ``light``.

        Raises:
            ArgumentError: an option does not exist or does not fit.
            ExpertError: an expert cannot be used with this base, or changes nothing.
            TaskError: the task is unknown or cannot be adapted to.
        """
        given = [name for name, to in (("examples", examples), ("prompts", prompts), ("task", task)) if to is not None]
        if len(given) > 1:
            raise ArgumentError(f"adapt: give one of {' and '.join(given)}, not both")
        self._check_fitting(given, score=score, stop=stop, max_new_tokens=max_new_tokens)
        where = options.get("registry")
        read = read_named(experts, strategy or "expert", where) if experts is not None else None
        name = strategy or self._strategy(given, read)
        labelled = [_labelled(number, example) for number, example in enumerate(examples or ())]
        if examples is not None and name in STRATEGIES and STRATEGIES[name]().needs_labels:
            options.setdefault("shots", max(1, len(set(labelled))))
        settings = self._settings(name, read, options)
        if settings.adapt == "none":
            raise ArgumentError("strategy=none adapts nothing; ask the model itself")
        kind = STRATEGIES[settings.adapt]()
        if kind.needs_labels and examples is None and task is None:
            raise ArgumentError(f"strategy={settings.adapt} needs labels; give examples= or task=")
        if system is not None and not chat and task is None:
            raise ArgumentError("system= is a message of a chat; give chat=True too")
        prepared = prepare_experts(settings, read, self.base, self.engine.ranks())
        classifier = prepare_classifier(settings, read, self.base, self.engine.ranks())
        runtime = Runtime(self.lm, self.engine, tuple(prepared), settings, classifier)
        target: Task
        if task is not None:
            target = load_task(task, include_path=include_path) if isinstance(task, str) else task
            pool = find_pool(target)
        elif examples is not None:
            if max_new_tokens is not None and max_new_tokens < 1:
                raise ArgumentError(f"max_new_tokens={max_new_tokens} must be at least 1")
            if stop is not None:
                stop = stop_texts(stop)
            if max_new_tokens is None:
                right = [example.answer for example in labelled if isinstance(example, Example)]
                max_new_tokens = _ROOM + max((len(self.lm.tok_encode(answer)) for answer in right), default=0)
            target = example_task(
                labelled,
                metric=settings.metric,
                score=score,
                stop=_stop(labelled) if stop is None else stop,
                max_new_tokens=max_new_tokens,
                chat=chat,
            )
            pool = example_pool(target)
        else:
            texts = [prompts] if isinstance(prompts, str) else list(prompts if prompts is not None else ["-"])
            if not texts:
                raise ArgumentError("prompts: there are none; give one or more")
            target = prompt_task(texts)
            pool = Pool("prompts", (), frozenset())
        # Of a task the lengths are lm-eval's, of examples those that are named here.
        length = contextlib.nullcontext() if examples is None else requested_length(self.lm)
        with self.engine.lock, length:
            form = PromptForm(num_fewshot=num_fewshot, system_instruction=system, apply_chat_template=chat)
            with carved(target, pool):
                docs = list(target.eval_docs)
            texts = place_docs(target, docs)
            adaptation = TaskAdaptation(target, pool, form, runtime)
            # A score of the caller's own is not in the key.
            if score is not None or not adaptation.find():
                if settings.adapt not in ("expert", "mix"):
                    check_experts_move(runtime)
                adaptation.plan()
            assert adaptation.record is not None
            chosen = [adaptation.choice_of(number) for number in range(len(docs))]
            self._check_moved(runtime, chosen)
            mixtures: dict[str | None, Choice] = dict(zip(texts, chosen, strict=True))
            if len(adaptation.choices) == 1:
                mixtures = {None: adaptation.choices[0]}
            elif isinstance(prompts, str):
                mixtures = {None: chosen[0]}
            return Adapted(self, adaptation.record, prepared, mixtures, adaptation.adaptation_marks)

    def import_public(
        self,
        file: str | Path,
        name: str,
        *,
        domain: str | None = None,
        task: str | None = None,
        max_mult: float = 1.0,
        folder: str | Path | None = None,
        overwrite: bool = False,
    ) -> SavedExpert:
        """Write the expert that a checkpoint of Transformer²'s public code is on this base.

        Args:
            file: ``policy_params.pt`` or ``learnable_params.pt``.
            name: the expert's name.
            domain: what it is for.
            task: what it was trained on.
            max_mult: the ``max_mult`` of its configuration.
            folder: where experts lie; None is ``T2_EXPERTS_DIR``.
            overwrite: replace an expert of that name.

        Raises:
            ArgumentError: the name is taken, or ``max_mult`` is not above zero.
            ExpertFileError: the file cannot be read, or holds more than tensors.
            ExpertMismatchError: it does not fit this base's MLP matrices.
            StorageError: the expert cannot be written.
        """
        path = place(name, folder, overwrite)
        checkpoint = read_public(Path(file).expanduser())
        z = import_public(checkpoint, self.engine, max_mult)
        training = {"source": checkpoint.form, "source_sha256": checkpoint.digest, "max_mult": max_mult}
        note = f"{len(z)} vectors of {Path(checkpoint.source).name} as effective z"
        return write(
            path,
            z,
            note,
            name=name,
            base=self.base,
            domain=domain,
            task=task,
            method="reinforce (public code)",
            training=training,
        )

    def extract(
        self,
        tuned: str | Path | transformers.PreTrainedModel,
        name: str,
        *,
        tuned_args: Mapping[str, Any] | None = None,
        domain: str | None = None,
        task: str | None = None,
        tolerance: float = TOLERANCE,
        folder: str | Path | None = None,
        overwrite: bool = False,
    ) -> SavedExpert:
        """Write the expert that takes this base to a tuned model, where there is one.

        Args:
            tuned: a Hub name, a folder, or a loaded model.
            name: the expert's name.
            tuned_args: arguments of lm-eval's ``hf`` for the tuned model, for example ``gguf_file``.
            domain: what it is for.
            task: what it was tuned on.
            tolerance: largest part of a matrix's difference, in the Frobenius norm, that may be something else than a
                change of singular values, beyond the rounding of the weights.
            folder: where experts lie; None is ``T2_EXPERTS_DIR``.
            overwrite: replace an expert of that name.

        Raises:
            ArgumentError: the name is taken, or the tolerance is not between 0 and 1.
            ModelError: the tuned model cannot be loaded.
            ExpertMismatchError: the difference is no change of singular values, with the share that is not.
            StorageError: the expert cannot be written.
        """
        if not 0 <= tolerance < 1:
            raise ArgumentError(f"tolerance={tolerance} must be at least 0 and below 1")
        path = place(name, folder, overwrite)
        if isinstance(tuned, (str, Path)):
            tuned = str(tuned)
            arguments = dict(tuned_args or {})
            check_hf_args(arguments, "tuned_args")
            if "pretrained" in arguments:
                raise ArgumentError(f"tuned_args: pretrained is the tuned model itself, {tuned}; leave it out")
            other, tuned_id = open_base(tuned, **arguments).model, base_id(tuned, arguments.get("gguf_file"))
        else:
            other, tuned_id = tuned, base_id(tuned)
        check_settings(self.engine, other.config, tuned_id)
        found = extract(self.engine, other.state_dict(), tuned_id, tolerance)
        worst, share = found.worst
        note = (
            f"{found.relative:.2g} of the difference is unexplained (norm), most in {worst} ({share:.2g}); "
            f"{found.unknown} of {found.components} components are too small to tell and stay 1"
        )
        training = {"tuned": tuned_id, "tolerance": tolerance, "unexplained": found.relative, "unknown": found.unknown}
        return write(
            path,
            found.z,
            note,
            name=name,
            base=self.base,
            domain=domain,
            task=task,
            method="extracted from a checkpoint",
            training=training,
        )

    def _asks(self) -> Model:
        return self

    def _choice(self, prompt: str | None) -> Choice:
        return Choice()

    def _strategy(self, given: Sequence[str], read: Sequence[Expert] | None) -> str:
        if given:
            return "prompt" if given == ["prompts"] else "cem"
        if read is None:
            raise ArgumentError("adapt: give examples=, prompts= or task= to adapt to, or experts= to mix")
        return "expert" if len(read) == 1 else "mix"

    def _settings(self, strategy: str, read: Sequence[Expert] | None, options: Mapping[str, Any]) -> Settings:
        allowed = [name for name in MODEL_ARGS if name not in (*_ELSEWHERE, "experts")]
        for name in options:
            if name in _ELSEWHERE:
                raise ArgumentError(f"adapt: {name} is not given here; see {_ELSEWHERE[name]}")
            if name not in allowed:
                raise ArgumentError(f"adapt: {name} does not exist{nearest(name, allowed)}")
        if strategy not in STRATEGIES:
            raise ArgumentError(f"adapt: strategy={strategy} does not exist{nearest(strategy, STRATEGIES)}")
        if strategy == "peft":
            raise ArgumentError("adapt: strategy=peft is for lm_eval --model t2; an adapter of PEFT is no mixture")
        names = [expert.name for expert in read] if read is not None else None
        # In Python None names nothing; in model_args it is how lm-eval writes a filter called none.
        unnamed = [name for name in ("metric", "filter") if options.get(name) is None]
        given = {name: value for name, value in options.items() if name not in unnamed}
        return parse_args({"adapt": strategy, "experts": names, "moe": self._moe, **given})

    def _check_fitting(self, given: Sequence[str], **of_examples: Any) -> None:
        for name, value in of_examples.items():
            if value is not None and given != ["examples"]:
                raise ArgumentError(f"adapt: {name} is for examples=; leave it out")

    def _check_moved(self, runtime: Runtime, chosen: Sequence[Choice]) -> None:
        base = None
        checked = set()
        for choice in chosen:
            label = ", ".join(f"{name} {value:g}" for name, value in choice.alpha.items())
            if moves(choice.z) and label not in checked:
                checked.add(label)
                base = runtime.probe() if base is None else base
                with self.engine.applied(choice.z):
                    check_moved(base, runtime.probe(), f"the mixture {label[:200]}")


def _labelled(number: int, example: Labelled) -> Example | ChoiceExample:
    match example:
        case Example(prompt, answer) | (str(prompt), str(answer)):
            return Example(prompt, answer)
        case ChoiceExample(prompt, [*choices], label) | (str(prompt), [*choices], int(label)):
            given: list[Any] = choices
            odd = next((choice for choice in given if not isinstance(choice, str)), None)
            if odd is None:
                return ChoiceExample(prompt, tuple(choices), label)
            raise ArgumentError(f"examples: number {number} has {odd!r} among its choices, which is no text")
    raise ArgumentError(f"examples: number {number} is neither (prompt, answer) nor (prompt, choices, label)")


def _stop(examples: Sequence[Example | ChoiceExample]) -> tuple[str, ...]:
    several = any("\n" in example.answer for example in examples if isinstance(example, Example))
    return () if several else ("\n",)
