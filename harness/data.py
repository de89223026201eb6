"""Where benchmark documents come from: ``T2_DATA_DIR``, the folder of ``t2 data fetch``, then the Hugging Face Hub.

The same documents in the same order result whichever source answers, so that scored documents and adaptation pools
do not depend on the machine.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetsError

from t2.core.errors import ArgumentError, DataError, nearest
from t2.core.settings import data_dir, data_home
from t2.harness.data_features import FEATURES
from t2.harness.data_schema import ROWS, Row, RowError, in_order
from t2.harness.data_wheels import DATASETS, fetch

__all__ = ["DATASETS", "SOURCES", "Source", "fetch", "load_rows", "load_split"]

_MATH_SUBJECTS = (
    "algebra",
    "counting_and_probability",
    "geometry",
    "intermediate_algebra",
    "number_theory",
    "prealgebra",
    "precalculus",
)


@dataclass(frozen=True)
class Source:
    """One benchmark: its id and configurations on the Hub, and the number of rows of each split."""

    hub: str
    configurations: tuple[str | None, ...]
    rows: Mapping[str, int]


SOURCES: dict[str, Source] = {
    "arc_easy": Source("allenai/ai2_arc", ("ARC-Easy",), {"train": 2251, "validation": 570, "test": 2376}),
    "arc_challenge": Source("allenai/ai2_arc", ("ARC-Challenge",), {"train": 1119, "validation": 299, "test": 1172}),
    "gsm8k": Source("openai/gsm8k", ("main",), {"train": 7473, "test": 1319}),
    "math": Source("EleutherAI/hendrycks_math", _MATH_SUBJECTS, {"train": 7500, "test": 5000}),
    "math500": Source("HuggingFaceH4/MATH-500", (None,), {"test": 500}),
    "mbpp": Source(
        "google-research-datasets/mbpp", ("full",), {"prompt": 10, "test": 500, "validation": 90, "train": 374}
    ),
    "humaneval": Source("openai/openai_humaneval", (None,), {"test": 164}),
    "hellaswag": Source("Rowan/hellaswag", (None,), {"train": 39905, "validation": 10042}),
    "boolq": Source("google/boolq", (None,), {"train": 9427, "validation": 3270}),
    "winogrande": Source("allenai/winogrande", ("winogrande_xl",), {"validation": 1267}),
}
MBPP_TASK_IDS = {
    "prompt": range(1, 11),
    "test": range(11, 511),
    "validation": range(511, 601),
    "train": range(601, 975),
}


def load_split(dataset: str, split: str) -> Dataset:
    """One split of a benchmark as a ``datasets.Dataset`` of the columns in ``data_features.FEATURES``.

    Raises:
        DataError: the split is in none of the places, or its file is truncated or malformed.
        ArgumentError: there is no such data set or split.
    """
    return Dataset.from_list(load_rows(dataset, split), features=FEATURES[dataset])


def load_rows(dataset: str, split: str) -> list[Row]:
    """The rows of :func:`load_split` as dictionaries.

    Raises:
        DataError, ArgumentError: as :func:`load_split`.
    """
    if dataset not in SOURCES:
        raise ArgumentError(f"unknown data set {dataset!r}{nearest(dataset, SOURCES)}")
    if split not in SOURCES[dataset].rows:
        raise ArgumentError(f"data set {dataset!r} has no split {split!r}{nearest(split, SOURCES[dataset].rows)}")
    looked: list[str] = []
    for folder in _folders():
        for name in _file_names(dataset, split):
            path = folder / name
            if path.is_file():
                return in_order(dataset, _from_file(path, dataset, split))
            looked.append(str(path))
    try:
        return in_order(dataset, _from_hub(dataset, split))
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"no {split} split of {dataset}: not at {', '.join(looked)}, nor on the Hugging Face Hub "
            f"({SOURCES[dataset].hub}: {_first_line(error)}); {_advice(dataset, split)}"
        ) from error


def _folders() -> Iterator[Path]:
    chosen = data_dir()
    if chosen is not None:
        if not chosen.is_dir():
            raise DataError(f"T2_DATA_DIR={chosen} is not a folder; set it to a folder of JSON-lines files or unset it")
        yield chosen
    yield data_home()


def _file_names(dataset: str, split: str) -> list[str]:
    return [f"{dataset}_{split}.jsonl"] + (["mbpp.jsonl"] if dataset == "mbpp" else [])


def _from_file(path: Path, dataset: str, split: str) -> list[Row]:
    rows = []
    for number, line in enumerate(_lines(path), start=1):
        try:
            value = json.loads(line)
            if not isinstance(value, dict):
                raise RowError("not a JSON object")
            rows.append(ROWS[dataset](value))
        except (json.JSONDecodeError, RowError) as error:
            cause = "not whole JSON" if isinstance(error, json.JSONDecodeError) else str(error)
            raise DataError(f"{path}, line {number}: {cause}; {_advice(dataset, split)}") from error
    if path.name == "mbpp.jsonl":
        rows = [row for row in rows if row["task_id"] in MBPP_TASK_IDS[split]]
    expected = SOURCES[dataset].rows[split]
    # A shorter training set is a user's choice; a shorter scored set or pool is another benchmark under the same name.
    if len(rows) != expected and (split != "train" or not rows):
        raise DataError(f"{path} has {len(rows)} rows of {dataset} {split}, not {expected}; {_advice(dataset, split)}")
    return rows


def _lines(path: Path) -> Iterator[str]:
    try:
        # Not splitlines(): JSON strings may hold U+2028, which that takes for a line end.
        yield from (line for line in path.read_text(encoding="utf-8").split("\n") if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read {path}: {_first_line(error)}; replace the file") from error


def _from_hub(dataset: str, split: str) -> list[Row]:
    source = SOURCES[dataset]
    rows: list[Row] = []
    for configuration in source.configurations:
        part: Any = load_dataset(source.hub, configuration, split=split)
        try:
            rows += [ROWS[dataset](row) for row in part]
        except RowError as error:
            raise DataError(f"{source.hub} on the Hub, split {split}: {error}; {_advice(dataset, split)}") from error
    return rows


def _advice(dataset: str, split: str) -> str:
    name = dataset if split in ("validation", "test") else f"{dataset}_{split}"
    fetchable = name in DATASETS and not (dataset == "mbpp" and split == "validation")
    offline = "unset HF_HUB_OFFLINE, " if os.environ.get("HF_HUB_OFFLINE") not in (None, "", "0") else ""
    file = f"set T2_DATA_DIR to a folder with a whole {_file_names(dataset, split)[-1]}"
    return f"run `t2 data fetch {name}`, or {file}" if fetchable else f"{offline}or {file}".removeprefix("or ")


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
