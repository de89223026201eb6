"""The file of a run comes back as it was, and is taken in no other form."""

from __future__ import annotations

import random

import pytest

from t2.core.digests import sha256
from t2.core.errors import ResultsError
from t2.core.results import read_results
from t2.core.runfile import MAX_HEADER_BYTES, decode_run, encode_run, header_of, read_samples
from tests.results import Evaluated


def test_what_is_written_is_read(evaluated: Evaluated) -> None:
    for folder in (evaluated.hf, evaluated.expert, evaluated.mixed):
        for result in read_results(folder):
            file = decode_run(encode_run(result), "here")
            assert file.run == result.run
            assert file.run.digest() == result.run.digest()
            assert read_samples(file.samples) == result.samples
            assert sha256(file.samples) == result.run.samples_digest
            assert file.values == {
                score.key: result.values(score) for score in result.run.scores if result.values(score)
            }


def test_a_changed_file_is_refused_or_says_so(evaluated: Evaluated) -> None:
    good = encode_run(read_results(evaluated.mixed)[0])
    header = good.index(b"\n")
    rng = random.Random(0)
    told: list[str] = []
    for _ in range(1500):
        at = rng.randrange(len(good))
        change = rng.choice([bytes([rng.randrange(256)]), b"", good[at : at + 1] * 2])
        bad = good[:at] + change + good[at + 1 :]
        try:
            file = decode_run(bad, "here")
        except ResultsError as error:
            told.append(str(error))
            continue
        # Only what cannot be computed from the samples may be another, and the file still keeps the form.
        assert bad == good or at < header
        assert header_of(file.run).encode() + b"\n" + file.samples == bad
    assert len(told) > 1000
    assert all(len(line.splitlines()) == 1 for line in told)


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", "does not begin with a line"),
        (b"x" * 100, "does not begin with a line"),
        (b" " * (MAX_HEADER_BYTES + 1) + b"\n", "its first line has"),
        (b"[" * 100_000 + b"\n", "line 1"),
        (b'{"task": "\xff"}\n', "line 1"),
        (b"{}\n{}\n", "line 1: task: Field required"),
    ],
)
def test_what_is_no_run_is_refused_in_one_line(data: bytes, told: str) -> None:
    with pytest.raises(ResultsError, match=told) as caught:
        decode_run(data, "here")
    assert len(str(caught.value)) < 300
