"""Gold answers score 1, wrong ones 0, whatever form the answer has; on real HumanEval, MBPP, MATH and GSM8K."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from t2.core.errors import TaskError
from t2.harness.data import load_rows
from t2.harness.math_answers import _JUDGE, last_boxed, math_equal
from t2.harness.scoring import INVALID, extract_letter, extract_number, pass_at_1, program

HUMANEVAL_IDS = (0, 1, 10, 32, 38, 50, 83, 163)
MBPP_IDS = (11, 57, 145, 222, 300, 367, 444, 510)


@pytest.fixture(scope="module")
def humaneval() -> list[dict[str, Any]]:
    rows = load_rows("humaneval", "test")
    return [rows[number] for number in HUMANEVAL_IDS]


@pytest.fixture(scope="module")
def mbpp() -> list[dict[str, Any]]:
    return [row for row in load_rows("mbpp", "test") if row["task_id"] in MBPP_IDS]


def test_humaneval_gold_passes_in_every_form(humaneval: list[dict[str, Any]]) -> None:
    for doc in humaneval:
        body, whole = doc["canonical_solution"], doc["prompt"] + doc["canonical_solution"]
        forms = {
            "continuation": body,
            "continuation that runs on": f"{body}\n\n\ndef another(x):\n    return x +",
            "continuation closed by a fence": f"{body}```\nThis works because …",
            "continuation, then prose": f"{body}\nThe function above is right.",
            "whole functions": whole,
            "fenced": f"Sure!\n\n```python\n{whole}\n```\nThat is it.",
            "fence left open": f"```python\n{whole}",
            "fenced body": f"```\n{body}```",
            "with a trial": f"```python\n{whole}\nprint(undefined)\nassert False\n```",
        }
        for form, completion in forms.items():
            assert pass_at_1(doc, completion, "humaneval") == 1.0, (doc["task_id"], form)


def test_humaneval_wrong_code_fails(humaneval: list[dict[str, Any]]) -> None:
    for doc in humaneval:
        for wrong in (
            "",
            "    pass\n",
            "    return None\n",
            "    import sys; sys.exit(0)\n",
            "I do not know.",
            "```\n```",
        ):
            assert pass_at_1(doc, wrong, "humaneval") == 0.0, (doc["task_id"], wrong)


def test_mbpp_gold_passes_and_wrong_code_fails(mbpp: list[dict[str, Any]]) -> None:
    assert len(mbpp) == len(MBPP_IDS)
    for doc in mbpp:
        for form in ("{}", "```python\n{}\n```", "{}\n```\nExplanation.", "Here:\n\n```\n{}\n```"):
            assert pass_at_1(doc, form.format(doc["code"].replace("\r\n", "\n")), "mbpp") == 1.0, (doc["task_id"], form)
        for wrong in ("", "import sys\nsys.exit(0)", "def unrelated():\n    return 1", "no code at all"):
            assert pass_at_1(doc, wrong, "mbpp") == 0.0, (doc["task_id"], wrong)


def test_a_sandbox_that_does_not_start_is_told_and_not_scored_as_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    doc = {"test_setup_code": "", "test_list": ["assert f() == 1"]}
    assert pass_at_1(doc, "def f(): return 1", "mbpp") == 1.0
    monkeypatch.setattr("sys.executable", "/does/not/exist/python")
    with pytest.raises(TaskError, match="programs cannot be scored on this machine: cannot start"):
        pass_at_1(doc, "def f(): return 1", "mbpp")


def test_statements_that_only_try_the_code_out_are_left_out(mbpp: list[dict[str, Any]]) -> None:
    source = program(
        mbpp[0], "def f():\n    return 1\nprint(f())\nassert f() == 2\nif __name__ == '__main__':\n    f()", "mbpp"
    )
    assert source is not None
    code = source.split("assert")[0]
    assert "def f()" in code
    assert "print" not in code
    assert "__main__" not in code


def test_math_gold_solutions_score_one_and_wrong_answers_zero() -> None:
    rows = load_rows("math500", "test")[:60]
    answers = [last_boxed(row["solution"]) for row in rows]
    for row, answer in zip(rows, answers, strict=True):
        assert answer is not None
        assert math_equal(row["solution"], row["solution"])
        assert math_equal(f"Thus the answer is $\\boxed{{{answer}}}$.", row["solution"])
        assert not math_equal("The answer is $\\boxed{123456789}$.", row["solution"])
        assert not math_equal("", row["solution"])


@pytest.mark.parametrize(
    ("answer", "solution", "equal"),
    [
        (r"\boxed{0.5}", r"so $\boxed{\frac12}$", True),
        (r"\boxed{\dfrac{1}{2}}", r"\boxed{\frac{1}{2}}", True),
        (r"\boxed{x+1}", r"\boxed{1+x}", True),
        (r"\boxed{(3, \pi/2)}", r"\boxed{\left( 3, \frac{\pi}{2} \right)}", True),
        (r"\boxed{Evelyn}", r"\boxed{\text{Evelyn}}", True),
        ("The final answer is $7$.", r"\boxed{7}", True),
        ("I get 12 and then 7", r"\boxed{7}", True),
        (r"\boxed{7}, no, \boxed{8}", r"\boxed{7}", False),
        (r"\boxed{(2,3)}", r"\boxed{(3,2)}", False),
        (r"\boxed{\frac{1}{3}}", r"\boxed{0.3}", False),
        (r"\boxed{", r"\boxed{7}", False),
        ("I do not know", r"\boxed{7}", False),
    ],
)
def test_math_answers_count_by_value(answer: str, solution: str, equal: bool) -> None:
    assert math_equal(answer, solution) is equal


def test_last_boxed_matches_braces() -> None:
    assert last_boxed(r"\boxed{1} then \boxed{\frac{a}{b}} end") == r"\frac{a}{b}"
    assert last_boxed(r"\boxed{\{1, 2\}}") == r"\{1, 2\}"
    assert last_boxed(r"\boxed 7") == "7"
    assert last_boxed(r"\boxed{1} and \boxed{2") == "1"
    assert last_boxed("none") is None


def test_math_is_judged_in_threads_and_after_the_judge_died() -> None:
    found: list[bool] = []

    def ask() -> None:
        found.append(math_equal(r"\boxed{2x+2}", r"\boxed{2(x+1)}"))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _JUDGE.close()
    ask()
    assert found == [True] * 5


def test_a_runaway_simplification_ends() -> None:
    assert not math_equal(r"\boxed{((9^{9^{9^9}})! + 1)^{9^{99}} - x^{9^{9^9}}}", r"\boxed{7^{7^{7^7}}}")
    assert math_equal(r"\boxed{1+1}", r"\boxed{2}")


@pytest.mark.parametrize(
    ("text", "strict", "lenient"),
    [
        ("She has 3 left.\n#### 18", "18", "18"),
        ("It costs $1,234.50.", INVALID, "1234.5"),
        ("#### -7\nQuestion 2", "-7", "2"),
        ("#### 1,000", "1000", "1000"),
        ("The answer is 12.", INVALID, "12"),
        ("#### 20.00", "20", "20"),
        ("nothing", INVALID, INVALID),
    ],
)
def test_numbers(text: str, strict: str, lenient: str) -> None:
    assert extract_number(text, strict=True) == strict
    assert extract_number(text, strict=False) == lenient


def test_every_gsm8k_answer_is_read_alike_by_both_rules() -> None:
    for row in load_rows("gsm8k", "test"):
        number = extract_number(row["answer"], strict=True)
        assert number != INVALID
        assert number == extract_number(row["answer"], strict=False)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        (" B", "B"),
        ("B. iron", "B"),
        ("(C) wood", "C"),
        ("**D**", "D"),
        ("The answer is B.", "B"),
        ("The correct answer is: C", "C"),
        ("Answer: A", "A"),
        (r"\boxed{D}", "D"),
        ("The right option is $\\boxed{B}$", "B"),
        ("I think (D) is right", "D"),
        ("A student would rub", INVALID),
        ("The answer is a plant", INVALID),
        ("Because iron conducts", INVALID),
        ("", INVALID),
    ],
)
def test_letters(text: str, letter: str) -> None:
    assert extract_letter(text) == letter
