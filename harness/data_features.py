"""The columns of each benchmark as ``datasets`` types; apart from the rows, so that fetching needs no ``datasets``."""

from __future__ import annotations

from datasets import Features, Value
from datasets import Sequence as ListOf

_TEXT = Value("string")
_MATH = Features({"problem": _TEXT, "level": _TEXT, "type": _TEXT, "solution": _TEXT})
_ARC = Features(
    {"id": _TEXT, "question": _TEXT, "choices": {"text": ListOf(_TEXT), "label": ListOf(_TEXT)}, "answerKey": _TEXT}
)

FEATURES: dict[str, Features] = {
    "arc_easy": _ARC,
    "arc_challenge": _ARC,
    "gsm8k": Features({"question": _TEXT, "answer": _TEXT}),
    "math": _MATH,
    "math500": _MATH,
    "mbpp": Features(
        {
            "task_id": Value("int32"),
            "text": _TEXT,
            "code": _TEXT,
            "test_setup_code": _TEXT,
            "test_list": ListOf(_TEXT),
            "challenge_test_list": ListOf(_TEXT),
        }
    ),
    "gsm8k_steps": Features({"question": _TEXT, "prefix": _TEXT, "choices": ListOf(_TEXT), "label": Value("int32")}),
    "mbpp_programs": Features({"text": _TEXT, "test": _TEXT, "choices": ListOf(_TEXT), "label": Value("int32")}),
    "hellaswag": Features({"text": _TEXT, "endings": ListOf(_TEXT), "label": Value("int32")}),
    "boolq": Features({"passage": _TEXT, "question": _TEXT, "answer": Value("bool")}),
    "winogrande": Features(dict.fromkeys(("sentence", "option1", "option2", "answer"), _TEXT)),
    "domains": Features({"text": _TEXT, "domain": _TEXT, "source": _TEXT}),
    "humaneval": Features(dict.fromkeys(("task_id", "prompt", "canonical_solution", "test", "entry_point"), _TEXT)),
}
