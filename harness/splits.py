"""The splits that the ``t2_*`` tasks see: what is scored, what an adaptation may see, what serves as few-shot examples.

No document is in two splits of a task. ``test`` is scored. ``validation`` (or ``train`` where there is none) is the
adaptation pool. ``fewshot`` is set apart from both by content hash, so that no document is ever its own example. Splits
are read when first asked for: a training set that is not on the machine matters only to those who use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from lm_eval.api.samplers import ContextSampler

from t2.core.digests import doc_hash
from t2.core.errors import TaskError
from t2.harness import choices
from t2.harness.data import load_rows
from t2.harness.data_features import FEATURES
from t2.harness.data_schema import Row

FEWSHOT_DOCS = 32
CARVED_DOCS = 20


class Splits(dict[str, Dataset]):
    """A dataset dictionary whose splits are made when first asked for.

    Args:
        dataset: the data set that gives the columns.
        makers: split name → function that returns its rows.
        question: the columns that are what a row asks, where a task's prompt does not tell them.

    Raises:
        DataError: on asking for a split whose data cannot be had.
    """

    def __init__(
        self,
        dataset: str,
        makers: dict[str, Callable[[], list[Row]]],
        question: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self._dataset = dataset
        self._makers = makers
        self.question = question
        self._origins: dict[str, tuple[Row, tuple[str, ...]]] = {}

    def came_from(self, row: Row, origin: Row, question: tuple[str, ...]) -> None:
        """Note from which row of another data set a row was made, so that who knows the one knows the other.

        Args:
            row: as these splits give it.
            origin: what it was made from.
            question: the columns of ``origin`` that are what it asks.
        """
        self._origins[doc_hash(row)] = (origin, question)

    def source(self, row: Mapping[str, Any]) -> tuple[Row, tuple[str, ...]] | None:
        """The row that a row was made from, and the columns of it that ask; None where it is a row of its own."""
        return self._origins.get(doc_hash(dict(row)))

    def __missing__(self, split: str) -> Dataset:
        made = Dataset.from_list(self._makers[split](), features=FEATURES[self._dataset])
        self[split] = made
        return made


def carve(rows: Sequence[Row], count: int) -> tuple[list[Row], list[Row]]:
    """``count`` rows chosen by content hash, which depends on neither seed nor order, and the others in their order."""
    chosen = set(sorted(doc_hash(row) for row in rows)[:count])
    return [row for row in rows if doc_hash(row) in chosen], [row for row in rows if doc_hash(row) not in chosen]


def without(rows: Iterable[Row], *others: Iterable[Row], key: Callable[[Row], Any]) -> list[Row]:
    """The rows whose question is in none of the others: benchmarks repeat a few questions across their splits."""
    taken = {key(row) for other in others for row in other}
    return [row for row in rows if key(row) not in taken]


def arc(dataset: str) -> Splits:
    """ARC: ``test``, ``validation`` as the pool; ``fewshot`` and ``train`` out of the training set.

    Args:
        dataset: ``arc_easy`` or ``arc_challenge``.
    """

    def question(row: Row) -> Any:
        return row["question"], tuple(sorted(row["choices"]["text"]))

    def test() -> list[Row]:
        return load_rows(dataset, "test")

    def validation() -> list[Row]:
        return without(load_rows(dataset, "validation"), test(), key=question)

    def training() -> tuple[list[Row], list[Row]]:
        return carve(without(load_rows(dataset, "train"), test(), validation(), key=question), FEWSHOT_DOCS)

    return Splits(
        dataset,
        {"test": test, "validation": validation, "fewshot": lambda: training()[0], "train": lambda: training()[1]},
    )


def gsm8k() -> Splits:
    """GSM8K: ``test``; ``fewshot`` and the pool ``train`` out of the training set."""
    return _trained("gsm8k", "question")


def math() -> Splits:
    """MATH: ``test``; ``fewshot`` and the pool ``train`` out of the training set."""
    return _trained("math", "problem")


def math500() -> Splits:
    """MATH-500: ``test``; ``fewshot`` and the pool ``validation`` out of the rest of MATH's test split."""

    def others() -> tuple[list[Row], list[Row]]:
        rest = without(load_rows("math", "test"), load_rows("math500", "test"), key=lambda row: row["problem"])
        return carve(rest, FEWSHOT_DOCS)

    return Splits(
        "math500",
        {
            "test": lambda: load_rows("math500", "test"),
            "validation": lambda: others()[1],
            "fewshot": lambda: others()[0],
        },
    )


def mbpp() -> Splits:
    """MBPP by its authors' numbers: ``test`` 11-510, ``validation`` (the pool) 511-600, ``train`` 601-974.

    ``fewshot`` is 1-10, which they call the prompt.
    """
    names = {"test": "test", "validation": "validation", "train": "train", "fewshot": "prompt"}

    def maker(split: str) -> Callable[[], list[Row]]:
        return lambda: load_rows("mbpp", split)

    return Splits("mbpp", {ours: maker(theirs) for ours, theirs in names.items()}, question=("text", "test_list"))


def gsm8k_steps() -> Splits:
    """Calculations of GSM8K's solutions as choices; the splits are those of :func:`gsm8k`."""
    return _as_choices("gsm8k_steps", gsm8k(), ("test", "train", "fewshot"), choices.gsm8k_steps)


def mbpp_programs() -> Splits:
    """MBPP's programs as choices; the splits are those of :func:`mbpp`."""
    return _as_choices("mbpp_programs", mbpp(), ("test", "validation", "train", "fewshot"), choices.mbpp_programs)


def humaneval() -> Splits:
    """HumanEval: of its 164 documents 20 chosen by content hash are the pool ``validation``, the other 144 ``test``."""

    def parts() -> tuple[list[Row], list[Row]]:
        return carve(load_rows("humaneval", "test"), CARVED_DOCS)

    return Splits("humaneval", {"validation": lambda: parts()[0], "test": lambda: parts()[1]})


def fewshot_sampler(name: str, rows: Callable[[], Sequence[Row]]) -> type[ContextSampler]:
    """A sampler class over few-shot examples that are read when one is first drawn.

    lm-eval lists a few-shot split when it builds the task, which would ask for training sets that a zero-shot run does
    not need.

    Raises (when sampling):
        DataError: the examples cannot be had.
        TaskError: more are asked for than there are.
    """

    class LazySampler(ContextSampler):  # type: ignore[misc]
        _docs: Sequence[Row] = ()

        @property
        def df(self) -> Sequence[Row]:
            if not self._docs:
                self._docs = list(rows())
            return self._docs

        @df.setter
        def df(self, docs: Sequence[Row] | None) -> None:
            self._docs = docs or ()

        def sample(self, n: int, *args: Any, **kwargs: Any) -> Sequence[Row]:
            if n > len(self.df):
                raise TaskError(f"{n} few-shot examples asked for, but {name} has {len(self.df)}; lower --num_fewshot")
            drawn: Sequence[Row] = super().sample(n, *args, **kwargs)
            return drawn

    LazySampler.__name__ = LazySampler.__qualname__ = name
    return LazySampler


def _as_choices(
    dataset: str, source: Splits, splits: Iterable[str], convert: Callable[[Row], dict[str, Any] | None]
) -> Splits:
    def maker(split: str) -> Callable[[], list[Row]]:
        def make() -> list[Row]:
            rows = []
            for row in map(dict, source[split]):
                if (made := convert(row)) is not None:
                    result.came_from(made, row, source.question)
                    rows.append(made)
            return rows

        return make

    result = Splits(dataset, {split: maker(split) for split in splits})
    return result


def _trained(dataset: str, question: str) -> Splits:
    def training() -> tuple[list[Row], list[Row]]:
        rows = without(load_rows(dataset, "train"), load_rows(dataset, "test"), key=lambda row: row[question])
        return carve(rows, FEWSHOT_DOCS)

    return Splits(
        dataset,
        {
            "test": lambda: load_rows(dataset, "test"),
            "train": lambda: training()[1],
            "fewshot": lambda: training()[0],
        },
        question=(question,),
    )
