from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lm_eval.models.huggingface import HFLM

from t2.core.errors import ArgumentError, TaskError
from t2.harness.tasks import TaskDocs
from t2.training.rewards import credit_by_number, credit_by_overlap, credit_by_tests, reward_of, shaped, well_formed
from tests.training import planted
from tests.training.test_gradients import problem_of


@pytest.mark.parametrize(
    ("score", "reward"), [(1, 1), (0, -1), (0.5, 0), (0.75, 0.5), (7, 1), (-3, -1), (float("nan"), -1)]
)
def test_a_score_between_0_and_1_lies_between_minus_1_and_1(score: float, reward: float) -> None:
    assert reward_of(score) == reward


def test_the_ends_can_be_moved() -> None:
    assert [reward_of(score, right=1.0, wrong=-0.1) for score in (0, 1)] == [-0.1, 1.0]


@given(st.floats(0, 1), st.floats(0, 1))
def test_where_lower_is_better_the_order_is_reversed(first: float, second: float) -> None:
    higher = reward_of(first) - reward_of(second)
    lower = reward_of(first, higher_is_better=False) - reward_of(second, higher_is_better=False)
    assert higher == pytest.approx(-lower, abs=1e-12)


def text_docs(lm: HFLM, **config: Any) -> TaskDocs:
    return TaskDocs(planted.texts(**config), lm)


def test_partial_credit_for_numbers(tiny_lm: HFLM) -> None:
    docs = text_docs(tiny_lm, doc_to_target="{{q}}")
    expected = {"100": 1.0, "so 90": 0.9, "80 or 125": 0.8, "-100": 0.0, "0": 0.0, "none": 0.0, "1,000": 0.1}
    for text in ("100", "5 and 3 #### 100", "it is 100"):
        for answer, credit in expected.items():
            assert credit_by_number(docs, {"q": text}, answer) == pytest.approx(credit), (text, answer)
    assert credit_by_number(docs, {"q": "0"}, "0.0") == 1
    with pytest.raises(TaskError, match="reward=number needs right answers with a number"):
        credit_by_number(docs, {"q": "nothing"}, "1")


def test_partial_credit_for_words(tiny_lm: HFLM) -> None:
    docs = text_docs(tiny_lm, doc_to_target="{{q}}")
    assert credit_by_overlap(docs, {"q": "The red fox"}, "the RED fox!") == 1
    assert credit_by_overlap(docs, {"q": "the red fox"}, "a fox, a fox") == pytest.approx(2 / 7)
    assert credit_by_overlap(docs, {"q": "the red fox"}, "") == 0


def test_partial_credit_for_tests_is_the_share_that_passes(tiny_lm: HFLM) -> None:
    docs = text_docs(tiny_lm)
    doc = {"test_list": ["assert f(1) == 1", "assert f(2) == 4", "assert f(-1) == 1"], "test_setup_code": ""}
    assert credit_by_tests(docs, doc, "def f(x):\n    return x * x") == 1
    assert credit_by_tests(docs, doc, "def f(x):\n    return x") == pytest.approx(1 / 3)
    assert credit_by_tests(docs, doc, "I cannot.") == 0
    assert [well_formed(docs, doc, text) for text in ("def f(x):\n    return x", "I cannot.")] == [True, False]
    with pytest.raises(TaskError, match="reward=tests needs documents with a test_list"):
        credit_by_tests(docs, {"q": "x"}, "x = 1")


def test_no_wrong_answer_is_worth_a_right_one() -> None:
    assert shaped(0.0, 1.0, 0.5) == 0.5
    assert shaped(0.0, 0.4, 0.5) == 0.2
    assert shaped(0.7, 1.0, 0.5) == 0.7


def test_a_generated_answer_is_judged_by_metric_credit_and_form(tiny_lm: HFLM) -> None:
    """Answers are numbers by a filter that may find none; 40 is right."""
    task = planted.texts(
        doc_to_target="40",
        process_results=lambda doc, results: {"vowel": float(results[0] == "40")},
        filter_list=[
            {"name": "number", "filter": [{"function": "regex", "regex_pattern": r"(\d+)"}, {"function": "take_first"}]}
        ],
    )
    values = {"reward": "number", "reward_partial": 0.5, "reward_format": 0.25, "reward_wrong": -0.1}
    problem = problem_of(tiny_lm, task, **values)
    doc = problem.setup.train[0]
    (instance,) = problem._prepare([doc])
    earned = {text: problem.setup.judge(doc, instance, text) for text in ("is 40.", "maybe 20", "no idea")}
    assert [metrics["vowel"] for metrics, _ in earned.values()] == [1, 0, 0]
    assert [reward for _, reward in earned.values()] == pytest.approx([1.25, -0.1 + 1.1 * 0.25 + 0.25, -0.1])
    plain = problem_of(tiny_lm, task, reward_wrong=-0.1)
    assert [plain.setup.judge(doc, instance, text)[1] for text in earned] == pytest.approx([1, -0.1, -0.1])


def test_rewards_that_do_not_suit_the_task_are_named(tiny_lm: HFLM) -> None:
    with pytest.raises(ArgumentError, match="reward=number is for generated answers"):
        problem_of(tiny_lm, planted.choices(), reward="number")
    with pytest.raises(ArgumentError, match="reward_format is for generated answers"):
        problem_of(tiny_lm, planted.choices(), reward_format=0.1)
    with pytest.raises(ArgumentError, match="reward_format needs a filter"):
        problem_of(tiny_lm, planted.texts(), reward_format=0.1)
