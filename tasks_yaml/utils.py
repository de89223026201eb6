"""What the YAML files of this folder call: data, prompts and scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from t2.adapters.strategies.question import question
from t2.harness import domains as labelled
from t2.harness import humaneval_examples, scoring, splits

Doc = Mapping[str, Any]


# lm-eval passes the task's metadata and every model argument to these.
def arc_easy(**_: Any) -> splits.Splits:
    return splits.arc("arc_easy")


def arc_challenge(**_: Any) -> splits.Splits:
    return splits.arc("arc_challenge")


def gsm8k(**_: Any) -> splits.Splits:
    return splits.gsm8k()


def gsm8k_steps(**_: Any) -> splits.Splits:
    return splits.gsm8k_steps()


def mbpp_programs(**_: Any) -> splits.Splits:
    return splits.mbpp_programs()


def math(**_: Any) -> splits.Splits:
    return splits.math()


def math500(**_: Any) -> splits.Splits:
    return splits.math500()


def mbpp(**_: Any) -> splits.Splits:
    return splits.mbpp()


def humaneval(**_: Any) -> splits.Splits:
    return splits.humaneval()


def domains(**_: Any) -> splits.Splits:
    return labelled.domains()


ArcEasyFewshot = splits.fewshot_sampler("ArcEasyFewshot", lambda: arc_easy()["fewshot"])
ArcChallengeFewshot = splits.fewshot_sampler("ArcChallengeFewshot", lambda: arc_challenge()["fewshot"])
Gsm8kFewshot = splits.fewshot_sampler("Gsm8kFewshot", lambda: gsm8k()["fewshot"])
MathFewshot = splits.fewshot_sampler("MathFewshot", lambda: math()["fewshot"])
Math500Fewshot = splits.fewshot_sampler("Math500Fewshot", lambda: math500()["fewshot"])
Gsm8kStepsFewshot = splits.fewshot_sampler("Gsm8kStepsFewshot", lambda: gsm8k_steps()["fewshot"])
MbppProgramsFewshot = splits.fewshot_sampler("MbppProgramsFewshot", lambda: mbpp_programs()["fewshot"])
MbppFewshot = splits.fewshot_sampler("MbppFewshot", lambda: mbpp()["fewshot"])
HumanEvalFewshot = splits.fewshot_sampler("HumanEvalFewshot", lambda: humaneval_examples.EXAMPLES)


def letter_prompt(doc: Doc) -> str:
    options = zip(doc["choices"]["label"], doc["choices"]["text"], strict=True)
    lines = [f"{label}. {text}" for label, text in options]
    return "\n".join([f"Question: {doc['question']}", *lines, "Answer with the letter of the right option.", "Answer:"])


def domain_question(doc: Doc) -> str:
    return question(doc["text"], labelled.LABELS)


def domain_labels(doc: Doc) -> list[str]:
    return list(labelled.LABELS)


def letters(answers: Sequence[Sequence[str]], docs: Sequence[Doc]) -> list[list[str]]:
    return [[scoring.extract_letter(answer) for answer in row] for row in answers]


def last_numbers(answers: Sequence[Sequence[str]], docs: Sequence[Doc]) -> list[list[str]]:
    return [[scoring.extract_number(answer, strict=False) for answer in row] for row in answers]


def marked_numbers(answers: Sequence[Sequence[str]], docs: Sequence[Doc]) -> list[list[str]]:
    return [[scoring.extract_number(answer, strict=True) for answer in row] for row in answers]


def gsm8k_score(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    return {"exact_match": float(results[0] == scoring.extract_number(doc["answer"], strict=True))}


def math_score(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    return {"math_verify": float(scoring.math_equal(results[0], doc["solution"]))}


def humaneval_score(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    return {"pass_at_1": scoring.pass_at_1(doc, results[0], "humaneval")}


def mbpp_prompt(doc: Doc) -> str:
    tests = "\n".join(doc["test_list"])
    return f"{doc['text']}\nThe code must pass these tests:\n```python\n{tests}\n```\nSolution:\n```python\n"


def mbpp_target(doc: Doc) -> str:
    return str(doc["code"]).replace("\r\n", "\n").strip("\n") + "\n```"


def mbpp_score(doc: Doc, results: Sequence[str]) -> dict[str, float]:
    return {"pass_at_1": scoring.pass_at_1(doc, results[0], "mbpp")}
