"""Tasks with something to learn: the right choice is always the same letter, among letters in random order."""

from __future__ import annotations

from typing import Any

import numpy as np
from lm_eval.api.task import ConfigurableTask

from tests.harness import tiny

LETTERS = list("abcdefgh")


def rows(count: int, right: str = "e", start: int = 0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(start + 1)
    made = []
    for i in range(start, start + count):
        wrong = rng.choice([letter for letter in LETTERS if letter != right], 3, replace=False)
        choices = [str(letter) for letter in rng.permutation([right, *wrong])]
        made.append({"q": f"{i} of {rng.integers(90)}", "choices": choices, "gold": choices.index(right)})
    return made


def choices(count: int = 48, **config: Any) -> ConfigurableTask:
    """A likelihood task whose right answer is the letter e."""
    data = {"training": rows(count), "test": rows(8, start=1000)}
    return tiny.choice_task("planted", data, **{"metadata": {"t2": {"domain": "letters"}}, **config})


def texts(count: int = 16, **config: Any) -> ConfigurableTask:
    """A generation task that rewards an early vowel."""
    data = {"training": rows(count), "test": rows(8, start=1000)}
    return tiny.text_task("vowels", data, **config)
