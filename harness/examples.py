"""Labelled examples and bare prompts as lm-eval tasks, so that adapting to them is adapting to any task."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask, Task

from t2.core.digests import doc_hash
from t2.core.errors import ArgumentError, nearest
from t2.harness.pool import Pool

Scorer = Callable[[str, str], float]
"""Scores a generated answer, given the right one."""

METRICS = ("exact_match", "loglikelihood")
"""Of examples with an answer; examples with choices have lm-eval's ``acc`` and ``acc_norm``."""
_SPLIT = "test"


@dataclass(frozen=True)
class Example:
    """A prompt and its right answer.

    Attributes:
        prompt: what is asked.
        answer: what is right, without the space that may part it from the prompt.
    """

    prompt: str
    answer: str


@dataclass(frozen=True)
class ChoiceExample:
    """A prompt with choices, of which one is right.

    Attributes:
        prompt: what is asked.
        choices: the choices' texts.
        label: index of the right one.
    """

    prompt: str
    choices: tuple[str, ...]
    label: int


def continuation(prompt: str, text: str, chat: bool = False) -> str:
    """An answer as it follows its prompt: a space parts them, unless one has white space there or a chat template is
    used.
    """
    if chat or not prompt or prompt[-1].isspace() or text[:1].isspace():
        return text
    return f" {text}"


def example_task(
    examples: Sequence[Example | ChoiceExample],
    *,
    metric: str | None = None,
    score: Scorer | None = None,
    stop: Sequence[str] = (),
    max_new_tokens: int = 64,
    chat: bool = False,
) -> ConfigurableTask:
    """Labelled examples as a task.

    Examples with an answer are generated and compared by ``exact_match`` (white space at the ends apart), scored by
    ``score``, or, with the metric ``loglikelihood``, judged by the log-likelihood of the right answer in nats per byte.
    Examples with choices are answered by likelihood.

    Raises:
        ArgumentError: no examples, both kinds at once, an empty one, or a metric that they do not have.
    """
    if not examples:
        raise ArgumentError("examples: there are none; give a few (prompt, answer) or (prompt, choices, label)")
    rows: list[dict[str, Any]] = []
    for number, example in enumerate(examples):
        where = f"examples: number {number}"
        if type(example) is not type(examples[0]):
            raise ArgumentError(f"{where} is of another kind than the first; give either answers or choices")
        if isinstance(example, Example):
            if not example.answer.strip():
                raise ArgumentError(f"{where} has an empty answer")
            answer = continuation(example.prompt, example.answer, chat)
            rows.append({"prompt": example.prompt, "answer": example.answer, "continuation": answer})
        else:
            if not 0 <= example.label < len(example.choices):
                raise ArgumentError(f"{where} has label {example.label} for {len(example.choices)} choices")
            choices = [continuation(example.prompt, choice, chat) for choice in example.choices]
            rows.append({"prompt": example.prompt, "choices": choices, "label": example.label})
    if isinstance(examples[0], ChoiceExample):
        if score is not None:
            raise ArgumentError(
                "score: examples with choices are scored by acc; give examples with answers, or no score"
            )
        return _task("examples", rows, _choices())
    if score is None and metric not in (None, *METRICS):
        raise ArgumentError(f"metric={metric} is not a metric of examples with answers{nearest(str(metric), METRICS)}")
    if metric == "loglikelihood":
        if score is not None:
            raise ArgumentError("score: metric=loglikelihood generates no answer to score; leave one of them out")
        return _task("examples", rows, _likelihood())
    return _task("examples", rows, _generation(score, stop, max_new_tokens))


def prompt_task(prompts: Sequence[str]) -> ConfigurableTask:
    """Prompts without labels as a task, for strategies that look at nothing else.

    Raises:
        ArgumentError: a prompt is empty, or no text.
    """
    for number, prompt in enumerate(prompts):
        if not isinstance(prompt, str):
            raise ArgumentError(f"prompts: number {number} is {prompt!r} and no text")
        if not prompt.strip():
            raise ArgumentError(f"prompts: number {number} is empty")
    rows = [{"prompt": prompt, "answer": ""} for prompt in prompts]
    return _task("prompts", rows, _generation(None, (), 64))


def example_pool(task: Task) -> Pool:
    """The examples of a task of :func:`example_task` as its adaptation pool; nothing of it is scored."""
    docs = {doc_hash(doc): doc for doc in task.eval_docs}
    return Pool("the given examples", tuple(docs[digest] for digest in sorted(docs)), frozenset())


def place_docs(task: Task, docs: Sequence[Any]) -> list[str]:
    """Give a task the docs that an adaptation is to answer, without building their prompts; return their texts."""
    wide: Any = task
    kind = str(task.OUTPUT_TYPE)
    wide._instances = [
        Instance(request_type=kind, doc=doc, arguments=(), idx=0, metadata=(str(wide.task_name), number, 1))
        for number, doc in enumerate(docs)
    ]
    return [str(wide.doc_to_text(doc)) for doc in docs]


def _task(name: str, rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any]) -> ConfigurableTask:
    def load(**_: Any) -> dict[str, datasets.Dataset]:
        return {_SPLIT: datasets.Dataset.from_list([dict(row) for row in rows])}

    with _without_advice():
        return ConfigurableTask(
            config={
                "task": name,
                "custom_dataset": load,
                "test_split": _SPLIT,
                "doc_to_text": "prompt",
                "target_delimiter": "",
                "metadata": {"version": 1},
                **config,
            }
        )


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """lm-eval warns whoever builds a data set of a command-line option for it, which is not in question here."""
    logger = logging.getLogger("lm_eval.api.task")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _metric(name: str) -> dict[str, Any]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


def _choices() -> dict[str, Any]:
    return {
        "output_type": "multiple_choice",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "metric_list": [_metric("acc"), _metric("acc_norm")],
    }


def _generation(score: Scorer | None, stop: Sequence[str], max_new_tokens: int) -> dict[str, Any]:
    name = "exact_match" if score is None else "score"

    def judge(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
        right = str(doc["answer"])
        if score is None:
            return {name: float(results[0].strip() == right.strip())}
        found = score(results[0], right)
        try:
            return {name: float(found)}
        except (TypeError, ValueError):
            raise ArgumentError(f"score: of {results[0][:40]!r} it says {found!r}, which is not a number") from None

    return {
        "output_type": "generate_until",
        "doc_to_target": "answer",
        "generation_kwargs": {"until": list(stop), "max_gen_toks": max_new_tokens, "do_sample": False},
        "process_results": judge,
        "metric_list": [_metric(name)],
    }


def _likelihood() -> dict[str, Any]:
    def judge(doc: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, float]:
        return {"loglikelihood": results[0][0] / len(str(doc["answer"]).encode())}

    return {
        "output_type": "loglikelihood",
        "doc_to_target": "continuation",
        "process_results": judge,
        "metric_list": [_metric("loglikelihood")],
    }
