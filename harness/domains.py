"""Prompts labelled with their domain: what ``t2_domains`` trains a classifier on.

They are made from training documents only. Prompts of ``math``, ``code`` and ``reasoning`` come from the training
splits of the tasks that t2 knows, ``others`` from data sets of another kind. Every document is asked in one wording of
several, drawn by its content hash, so that a document cannot be in both halves of a split in two wordings.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from t2.adapters.strategies.question import OTHERS
from t2.core.digests import doc_hash
from t2.core.seeds import generator
from t2.harness import splits
from t2.harness.data import load_rows
from t2.harness.data_schema import Row

LABELS = ("code", "math", "reasoning", OTHERS)
"""The domains in the order in which a dispatch asks for them."""
VALIDATION_SHARE = 5
"""One document in so many is scored by ``t2_domains``; the others train."""

Wording = Callable[[Row], str]

_ENOUGH = 1000
"""Prompts of one source at most: the smallest domain, MBPP's, has fewer."""
_WRAPPED = 3
"""One prompt in so many is wrapped in general words as well."""
WRAPPERS = (
    "Please help me with the following.\n\n{}",
    "{}\n\nThink about it carefully.",
    "User: {}\nAssistant:",
    "Here is a task for you:\n{}",
    "I need an answer to this: {}",
    "{}\nThank you!",
)
"""General words around a prompt, alike in every domain."""


def _problem(field: str) -> tuple[Wording, ...]:
    return (
        lambda row: f"Question: {row[field]}\nAnswer:",
        lambda row: f"Problem: {row[field]}\nSolution:",
        lambda row: str(row[field]),
        lambda row: f"Solve this problem step by step.\n\n{row[field]}",
        lambda row: f"{row[field]}\nGive the final result.",
        lambda row: f"Work out the answer and explain your steps: {row[field]}",
    )


_SCIENCE: tuple[Wording, ...] = (
    lambda row: f"Question: {row['question']}\nAnswer:",
    lambda row: (
        f"Question: {row['question']}\n{_listed(row, '. ')}\nAnswer with the letter of the right option.\nAnswer:"
    ),
    lambda row: str(row["question"]),
    lambda row: f"Choose the right answer.\n\n{row['question']}\n{_listed(row, ') ')}",
    lambda row: f"{row['question']} Is it {' or '.join(row['choices']['text'])}?",
    lambda row: f"Answer this science question: {row['question']}",
)
_PROGRAM: tuple[Wording, ...] = (
    lambda row: f"{row['text']}\nThe code must pass these tests:\n```python\n{_tests(row)}\n```\nSolution:\n```python",
    lambda row: f"# {row['text']}\n# {row['test_list'][0]}",
    lambda row: str(row["text"]),
    lambda row: _stub(row, example=True),
    lambda row: f"{_stub(row)}    # your code here",
    lambda row: f"You are a Python programmer. {row['text']}\n\n{_tests(row)}",
)
_CONTINUATION: tuple[Wording, ...] = (
    lambda row: f"{row['text']}",
    lambda row: f"Continue the text.\n\n{row['text']}",
    lambda row: f"{row['text']}\nWhat happens next?\n" + "\n".join(f"- {ending}" for ending in row["endings"]),
    lambda row: f"Translate into French: {row['text']} {row['endings'][row['label']]}",
    lambda row: f"Write a short story that begins like this: {row['text']}",
    lambda row: f"Correct the grammar of this sentence: {row['text']} {row['endings'][row['label']]}",
)
_PASSAGE: tuple[Wording, ...] = (
    lambda row: f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:",
    lambda row: f"Summarise the text below in one sentence.\n\n{row['passage']}",
    lambda row: f"{row['passage']}\n{row['question']}? Yes or no?",
    lambda row: f"Read the passage and answer.\n{row['passage']}\n{row['question']}?",
    lambda row: f"Write a friendly e-mail to a colleague about this: {row['passage']}",
    lambda row: f"{row['passage']}",
)


def domains() -> splits.Splits:
    """The splits of ``t2_domains``: ``train``, and ``validation``, which is scored."""
    made: dict[str, list[Row]] = {}

    def maker(split: str) -> Callable[[], list[Row]]:
        def read() -> list[Row]:
            if not made:
                made.update(read_domains(result.came_from))
            return made[split]

        return read

    result = splits.Splits("domains", {"train": maker("train"), "validation": maker("validation")})
    return result


def read_domains(
    came_from: Callable[[Row, Row, tuple[str, ...]], None] = lambda row, origin, question: None,
) -> dict[str, list[Row]]:
    """Labelled prompts by split, as many of each domain: ``text``, ``domain`` and ``source``.

    No two prompts ask the same, whatever their wording, and none asks what a scored split of its sources asks.

    Args:
        came_from: is told of each prompt the document it was made from, and the columns of that which ask.

    Raises:
        DataError: a training set, or the scored split that it is cleared of, is absent.
    """
    seen = {_key(source.asked(row)) for source in _SOURCES for row in source.scored()}
    chosen: dict[str, list[Row]] = {label: [] for label in LABELS}
    for label, rows in chosen.items():
        made = [_prompts(source, seen, came_from) for source in _SOURCES if source.domain == label]
        # The sources of a domain take turns, so that a long one does not drown a short one.
        for turn in itertools.zip_longest(*made):
            rows += [row for row in turn if row is not None]
    count = min(map(len, chosen.values()))
    result: dict[str, list[Row]] = {"train": [], "validation": []}
    for rows in chosen.values():
        for position, row in enumerate(rows[:count]):
            result["train" if position % VALIDATION_SHARE else "validation"].append(row)
    return {split: sorted(rows, key=doc_hash) for split, rows in result.items()}


def word(row: Row, wordings: Sequence[Wording]) -> str:
    """A document as a prompt, in the wording that its content hash draws."""
    rng = generator(0, "domains", doc_hash(row))
    text = wordings[int(rng.integers(len(wordings)))](row)
    if rng.integers(_WRAPPED) == 0:
        text = WRAPPERS[int(rng.integers(len(WRAPPERS)))].format(text)
    return text


@dataclass(frozen=True)
class _Source:
    """Training documents of one data set: how they are read and worded, and the scored ones they must not repeat."""

    name: str
    domain: str
    rows: Callable[[], Iterable[Row]]
    scored: Callable[[], Iterable[Row]]
    asked: Callable[[Row], str]
    wordings: tuple[Wording, ...]
    question: tuple[str, ...]


def _prompts(source: _Source, seen: set[str], came_from: Callable[[Row, Row, tuple[str, ...]], None]) -> list[Row]:
    made = []
    for row in sorted(source.rows(), key=doc_hash):
        if (key := _key(source.asked(row))) not in seen:
            seen.add(key)
            made.append({"text": word(row, source.wordings), "domain": source.domain, "source": source.name})
            came_from(made[-1], row, source.question)
        if len(made) == _ENOUGH:
            break
    return made


def _key(text: str) -> str:
    """The words of a text, by which two prompts ask the same."""
    return " ".join(re.findall(r"\w+", text.lower()))


def _listed(row: Row, mark: str) -> str:
    return "\n".join(f"{a}{mark}{b}" for a, b in zip(row["choices"]["label"], row["choices"]["text"], strict=True))


def _tests(row: Row) -> str:
    return "\n".join(row["test_list"])


def _stub(row: Row, example: bool = False) -> str:
    """The head of the function that an MBPP test calls, with the problem and maybe a test as its docstring."""
    test = str(row["test_list"][0])
    called = re.search(r"(\w+)\s*\(", test.removeprefix("assert"))
    head = re.search(rf"def {called[1] if called else ''}\w*\s*\([^)]*\)", row["code"])
    wanted = re.sub(r"^write a (python )?function (to|that|which) ", "", row["text"], flags=re.IGNORECASE)
    lines = [f"{head[0] if head else 'def solve(*args)'}:", f'    """ {wanted[:1].upper()}{wanted[1:]}']
    call, equals, result = test.removeprefix("assert").strip().partition("==")
    if example and equals:
        lines += [f"    >>> {call.strip()}", f"    {result.strip()}"]
    return "\n".join([*lines, '    """', ""])


def _split(dataset: Callable[[], splits.Splits], split: str) -> Callable[[], Iterable[Row]]:
    return lambda: [dict(row) for row in dataset()[split]]


def _file(dataset: str, split: str) -> Callable[[], Iterable[Row]]:
    return lambda: load_rows(dataset, split)


def _field(name: str) -> Callable[[Row], str]:
    return lambda row: str(row[name])


_SOURCES = (
    _Source(
        "mbpp",
        "code",
        _split(splits.mbpp, "train"),
        _file("mbpp", "test"),
        _field("text"),
        _PROGRAM,
        ("text", "test_list"),
    ),
    _Source(
        "gsm8k",
        "math",
        _split(splits.gsm8k, "train"),
        _file("gsm8k", "test"),
        _field("question"),
        _problem("question"),
        ("question",),
    ),
    _Source(
        "math",
        "math",
        _split(splits.math, "train"),
        _file("math", "test"),
        _field("problem"),
        _problem("problem"),
        ("problem",),
    ),
    *(
        _Source(
            name,
            "reasoning",
            _split(partial(splits.arc, name), "train"),
            _file(name, "test"),
            _field("question"),
            _SCIENCE,
            ("question", "choices"),
        )
        for name in ("arc_easy", "arc_challenge")
    ),
    _Source(
        "hellaswag",
        OTHERS,
        _file("hellaswag", "train"),
        _file("hellaswag", "validation"),
        _field("text"),
        _CONTINUATION,
        ("text",),
    ),
    _Source(
        "boolq",
        OTHERS,
        _file("boolq", "train"),
        _file("boolq", "validation"),
        _field("passage"),
        _PASSAGE,
        ("passage", "question"),
    ),
)
