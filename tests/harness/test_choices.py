"""The likelihood forms of GSM8K and MBPP: the right choice is the dataset's, the wrong ones differ, and they stay."""

from __future__ import annotations

import ast
import re
from collections import Counter
from typing import Any

import pytest

from t2.harness.choices import CHOICES, MAX_CODE, gsm8k_steps, mbpp_programs
from t2.harness.data import load_rows

STEP = re.compile(r"<<([^<>=]+)=(-?[\d.,]+)>>")


@pytest.fixture(scope="module")
def steps() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of GSM8K's test set with the choice made from each."""
    return [(dict(row), doc) for row in load_rows("gsm8k", "test") if (doc := gsm8k_steps(row)) is not None]


@pytest.fixture(scope="module")
def programs() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Rows of MBPP's test set with the choice made from each."""
    return [(dict(row), doc) for row in load_rows("mbpp", "test") if (doc := mbpp_programs(row)) is not None]


def number(text: str) -> float:
    return float(text.lstrip("$").replace(",", ""))


def test_the_right_result_is_that_of_the_solution(steps: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for row, doc in steps:
        right = doc["choices"][doc["label"]]
        assert doc["question"] == row["question"]
        # The solution goes on with the result that it computed at this place.
        plain = STEP.sub("", row["answer"])
        assert plain.startswith(doc["prefix"])
        assert doc["prefix"].endswith("=")
        rest = plain[len(doc["prefix"]) :].lstrip(" $")
        written = re.match(r"-?[\d.,]*\d", rest)
        results = [number(match[2]) for match in STEP.finditer(row["answer"])]
        assert min(abs(number(right) - result) for result in results) < 0.006
        assert written is None or abs(number(written[0]) - number(right)) < 0.51, (doc, rest[:30])


def test_wrong_results_differ_from_the_right_one_and_from_each_other(
    steps: list[tuple[dict[str, Any], dict[str, Any]]],
) -> None:
    for _, doc in steps:
        assert len({number(choice) for choice in doc["choices"]}) == len(set(doc["choices"])) == CHOICES
        assert len({choice.startswith("$") for choice in doc["choices"]}) == 1
        assert all(number(choice) >= 0 for i, choice in enumerate(doc["choices"]) if i != doc["label"])


@pytest.mark.filterwarnings("ignore:invalid escape sequence")
def test_the_right_program_is_that_of_the_dataset(programs: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for row, doc in programs:
        right = doc["choices"][doc["label"]]
        assert ast.dump(ast.parse(right)) == ast.dump(ast.parse(row["code"].replace("\r", "")))
        assert len(right) <= MAX_CODE
        assert (doc["text"], doc["test"]) == (row["text"], row["test_list"][0])


def test_wrong_programs_parse_and_differ_in_more_than_layout(
    programs: list[tuple[dict[str, Any], dict[str, Any]]],
) -> None:
    for _, doc in programs:
        trees = {ast.dump(ast.parse(choice)) for choice in doc["choices"]}
        assert len(trees) == CHOICES
        # One layout for all, so that it does not give the right one away.
        assert all(ast.unparse(ast.parse(choice)) == choice for choice in doc["choices"])


@pytest.mark.parametrize("form", ["steps", "programs"])
def test_labels_are_spread_over_the_positions(form: str, request: pytest.FixtureRequest) -> None:
    docs = [doc for _, doc in request.getfixturevalue(form)]
    counts = Counter(doc["label"] for doc in docs)
    expected = len(docs) / CHOICES
    # Four standard deviations of a fair draw.
    assert all(abs(counts[position] - expected) < 4 * (expected * 0.75) ** 0.5 for position in range(CHOICES))


@pytest.mark.parametrize("form", ["steps", "programs"])
def test_the_right_choice_is_not_given_away_by_its_length(form: str, request: pytest.FixtureRequest) -> None:
    docs = [doc for _, doc in request.getfixturevalue(form)]
    for pick in (min, max):
        hits = sum(pick(range(CHOICES), key=lambda i: (len(doc["choices"][i]), i)) == doc["label"] for doc in docs)
        assert hits < 0.45 * len(docs)


@pytest.mark.parametrize(("name", "make"), [("gsm8k", gsm8k_steps), ("mbpp", mbpp_programs)])
def test_a_document_gives_the_same_choices_each_time(name: str, make: Any) -> None:
    rows = [dict(row) for row in load_rows(name, "test")][:50]
    docs = [make(row) for row in rows]
    assert [make({key: row[key] for key in reversed(row)}) for row in reversed(rows)] == docs[::-1]


def test_choices_are_made_from_the_calculation() -> None:
    doc = gsm8k_steps({"question": "How many?", "answer": "He has 7*6 = $<<7*6=42>>42 now.\n#### 42"})
    assert doc is not None
    assert doc["prefix"] == "He has 7*6 ="
    assert doc["choices"][doc["label"]] == "$42"
    operations, digits = {"$13", "$1", "$1.17"}, {"$24"}
    near = {f"${42 + shift}" for shift in (-10, -5, -2, -1, 1, 2, 5, 10)}
    assert set(doc["choices"]) - {"$42"} <= operations | digits | near


def test_places_of_a_program_are_changed_one_at_a_time() -> None:
    code = "def f(a, b):\r\n    return a + b > 3"
    doc = mbpp_programs({"text": "Compare.", "code": code, "test_list": ["assert f(2, 2)", "assert True"]})
    assert doc is not None
    assert doc["choices"][doc["label"]] == "def f(a, b):\n    return a + b > 3"
    changed = {"a - b > 3", "a + b < 3", "a + b > 4", "a + b > 2"}
    assert {choice.partition("return ")[2] for choice in doc["choices"]} - {"a + b > 3"} <= changed


@pytest.mark.parametrize(
    "answer",
    [
        "No calculation is written out.\n#### 3",
        # The annotation stands apart from an equals sign.
        "He has <<2+3=5>>5 apples.\n#### 5",
        "It is 1/3 = <<1/3=1.2.3>>1.2.3\n#### 1",
    ],
)
def test_a_solution_without_a_calculation_gives_nothing(answer: str) -> None:
    assert gsm8k_steps({"question": "?", "answer": answer}) is None


@pytest.mark.parametrize(
    "code",
    [
        "def f(:\n",
        "print(1 +",
        "def f(x):\n    return x",
        "def f(a, b):\n    return a + b > 3  # short\n" + "x = 1\n" * 100,
    ],
)
def test_a_program_that_cannot_be_used_gives_nothing(code: str) -> None:
    assert mbpp_programs({"text": "?", "code": code, "test_list": ["assert True"]}) is None
