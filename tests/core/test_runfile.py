"""The file of a run comes back as it was, and is taken in no other form."""

from __future__ import annotations

import math
import random
from dataclasses import replace

import pytest

from t2.core.digests import sha256
from t2.core.errors import ResultsError
from t2.core.results import TaskResult, read_results, samples_digests
from t2.core.runfile import MAX_HEADER_BYTES, decode_run, encode_run, header_of, read_samples
from tests.results import Evaluated, vary


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


def with_repeats(evaluated: Evaluated) -> TaskResult:
    """A result whose data set repeats a document, with the same prompt and another answer."""
    (plain,) = (result for result in read_results(evaluated.hf) if result.run.task == "tiny_choice")
    first = plain.samples[0]
    again = first.model_copy(
        update={
            "answers": {"none": sha256(b"another")},
            "scores": {key: 1 - value for key, value in first.scores.items()},
        }
    )
    return vary(replace(plain, samples=(again, *plain.samples)), wrong=None)


def test_a_document_that_the_data_set_repeats_is_written_and_read(evaluated: Evaluated) -> None:
    result = with_repeats(evaluated)
    assert result.run.docs == 13
    file = decode_run(encode_run(result), "here")
    assert file.run == result.run
    assert file.confirmed == {"acc,none", "acc_norm,none"}
    # The repeated document has the mean of its two scores.
    assert (len(file.values["acc,none"]), 0.5 in file.values["acc,none"]) == (12, True)
    for order in (result.samples, tuple(reversed(result.samples))):
        assert encode_run(replace(result, samples=order)) == encode_run(result)
        assert samples_digests(order)[2] == result.run.samples_digest


def test_only_what_the_samples_give_is_confirmed(evaluated: Evaluated) -> None:
    (plain,) = (result for result in read_results(evaluated.hf) if result.run.task == "tiny_choice")
    score = plain.run.scores[0]
    values = plain.values(score)
    mean = sum(values) / len(values)
    for change, confirmed in (
        ({}, True),
        ({"aggregation": "other", "score": 0.999}, False),
        ({"aggregation": "other"}, True),
        ({"aggregation": "other", "metric": "perplexity", "score": math.exp(-mean)}, True),
        ({"aggregation": "other", "metric": "perplexity", "score": 1.5}, False),
        ({"aggregation": "other", "metric": "perplexity", "score": math.exp(-mean), "n": 3}, False),
        ({"aggregation": "other", "score": None}, False),
    ):
        claimed = score.model_copy(update=change)
        samples = tuple(
            sample.model_copy(update={"scores": {claimed.key: sample.scores[score.key]}}) for sample in plain.samples
        )
        run = plain.run.model_copy(update={"scores": (claimed,), "samples_digest": samples_digests(samples)[2]})
        assert (claimed.key in decode_run(encode_run(TaskResult(run, samples)), "here").confirmed) is confirmed
