"""Squares of one colour with noise, and a lenient score: the answer holds a letter of the colour's name."""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
from PIL import Image

COLOURS = {"red": (220, 20, 20), "green": (20, 220, 20), "blue": (20, 20, 220), "grey": (128, 128, 128)}


def pictures(**_: Any) -> dict[str, datasets.Dataset]:
    features = datasets.Features(
        {"number": datasets.Value("int64"), "colour": datasets.Value("string"), "image": datasets.Image()}
    )
    docs: dict[str, list[dict[str, Any]]] = {"validation": [], "test": []}
    rng = np.random.default_rng(0)
    for number in range(20):
        colour = list(COLOURS)[number % 4]
        pixels = np.clip(np.array(COLOURS[colour]) + rng.integers(-60, 60, (8, 8, 3)), 0, 255).astype(np.uint8)
        split = "validation" if number < 12 else "test"
        docs[split].append({"number": number, "colour": colour, "image": Image.fromarray(pixels)})
    return {split: datasets.Dataset.from_list(rows, features=features) for split, rows in docs.items()}


def a_letter_of_it(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    return {"letter": float(any(letter in doc["colour"] for letter in results[0][:5].lower()))}
