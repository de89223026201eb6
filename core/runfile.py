"""A run in one file, as a registry takes it: a line of canonical JSON that tells the run, then a line for each sample.

The lines of the samples are those of :func:`t2.core.results.samples_bytes`, so that their SHA-256 is the digest that
the first line names. Whoever reads such a file believes nothing in it that can be computed from the samples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise
from operator import attrgetter

import pydantic

from t2.core.digests import canonical_json, digest_of, sha256
from t2.core.errors import ResultsError
from t2.core.results import Sample, TaskResult, TaskRun, samples_bytes
from t2.core.validation import first_fault

MAX_HEADER_BYTES = 4 * 1024 * 1024
"""Of the first line: a record lists the hashes of its adaptation docs and the history of its search."""


@dataclass(frozen=True)
class RunFile:
    """A run that was checked against its samples.

    Attributes:
        run: what the first line tells.
        header: that line.
        samples: the other lines.
        values: scores of the documents, by ``metric,filter``; the mean for a repeated document. Documents without a
            number are left out.
        confirmed: the scores, as ``metric,filter``, that follow from the samples.
    """

    run: TaskRun
    header: str
    samples: bytes
    values: dict[str, list[float]]
    confirmed: frozenset[str]


def header_of(run: TaskRun) -> str:
    """The first line.

    Raises:
        ResultsError: a number in it is not finite.
    """
    try:
        return canonical_json(run.model_dump(mode="json"))
    except ValueError as error:
        raise ResultsError(f"{run.task}: its settings or its record hold a number that is not finite") from error


def encode_run(result: TaskResult) -> bytes:
    """The file of a run.

    Raises:
        ResultsError: a number in it is not finite.
    """
    return header_of(result.run).encode() + b"\n" + samples_bytes(result.samples)


def decode_run(data: bytes, source: str) -> RunFile:
    """Read the file of a run, one sample at a time, and check it.

    Args:
        data: the file's bytes.
        source: for errors.

    Raises:
        ResultsError: it is cut or malformed, or its first line contradicts its samples.
    """
    header, newline, samples = data.partition(b"\n")
    if not newline:
        raise ResultsError(f"{source}: it does not begin with a line that tells a run")
    run = decode_header(header, source)
    values, docs, prompts = _read_samples(samples, source)
    for name, found in (
        ("docs", len(docs)),
        ("samples_digest", sha256(samples)),
        ("docs_digest", digest_of(docs)),
        ("prompts_digest", digest_of(prompts)),
    ):
        if found != getattr(run, name):
            raise ResultsError(f"{source}: {name} is not that of its samples")
    if len({score.key for score in run.scores}) != len(run.scores):
        raise ResultsError(f"{source}: a score is told twice")
    confirmed = set()
    for score in run.scores:
        if score.n > len(docs):
            raise ResultsError(f"{source}: {score.key} has {score.n} documents, but only {len(docs)} samples")
        if score.agrees_with(values.get(score.key, [])):
            confirmed.add(score.key)
        elif score.aggregation == "mean":
            raise ResultsError(f"{source}: {score.key} is not the mean of its samples")
    record = run.record
    stated = (run.task, run.base.fingerprint, run.base.identity)
    if record is not None and stated != (record.task, record.base.fingerprint, record.base.identity):
        raise ResultsError(f"{source}: its record is of another task or base model")
    if any(one == other for one, other in pairwise(docs)):
        values = _document_means(samples)
    return RunFile(run, header.decode(), samples, values, frozenset(confirmed))


def read_samples(samples: bytes) -> tuple[Sample, ...]:
    """Parse the samples of a run's file that was checked before.

    Raises:
        ResultsError: an older t2 checked it, which accepted larger scores.
    """
    try:
        return tuple(Sample.model_validate_json(line) for line in samples.splitlines())
    except pydantic.ValidationError as error:
        raise ResultsError(f"samples: {first_fault(error)}") from error


def decode_header(header: bytes, source: str) -> TaskRun:
    """Read the first line, by itself.

    Raises:
        ResultsError: it tells no run, is too long, or is not canonical.
    """
    if len(header) > MAX_HEADER_BYTES:
        raise ResultsError(f"{source}: its first line has {len(header)} bytes, the limit is {MAX_HEADER_BYTES}")
    try:
        run = TaskRun.model_validate_json(header)
    except pydantic.ValidationError as error:
        raise ResultsError(f"{source}: line 1: {first_fault(error)}") from error
    if header_of(run).encode() != header:
        raise ResultsError(f"{source}: line 1 is not written as canonical JSON")
    return run


def _read_samples(data: bytes, source: str) -> tuple[dict[str, list[float]], list[str], list[list[str]]]:
    """The values, and what the digests of documents and prompts are of."""
    values: dict[str, list[float]] = {}
    docs: list[str] = []
    prompts: list[list[str]] = []
    last: tuple[str, str, str, str] | None = None
    if not data.endswith(b"\n"):
        raise ResultsError(f"{source}: it is cut, or has no samples")
    for number, line in enumerate(_lines(data), start=2):
        try:
            sample = Sample.model_validate_json(line)
        except pydantic.ValidationError as error:
            raise ResultsError(f"{source}: line {number}: {first_fault(error)}") from error
        if sample.line.encode() != line:
            raise ResultsError(f"{source}: line {number} is not written as canonical JSON")
        place = sample.doc_hash, sample.prompt_hash, sample.target_hash, sample.line
        if last is not None and place < last:
            raise ResultsError(f"{source}: line {number}: its document is out of order")
        last = place
        docs.append(sample.doc_hash)
        prompts.append([sample.doc_hash, sample.prompt_hash])
        for key, value in sample.scores.items():
            values.setdefault(key, []).append(value)
    return values, docs, prompts


def _document_means(data: bytes) -> dict[str, list[float]]:
    """Return the mean score of each document, by ``metric,filter``, from checked lines."""
    means: dict[str, list[float]] = {}
    samples = (Sample.model_validate_json(line) for line in _lines(data))
    for _, repeats in groupby(samples, key=attrgetter("doc_hash")):
        scores: dict[str, list[float]] = {}
        for sample in repeats:
            for key, value in sample.scores.items():
                scores.setdefault(key, []).append(value)
        for key, some in scores.items():
            means.setdefault(key, []).append(math.fsum(some) / len(some))
    return means


def _lines(data: bytes) -> Iterator[bytes]:
    """The lines of what ends with one, one at a time: all at once would be the file in memory once more."""
    start = 0
    while start < len(data):
        end = data.index(b"\n", start)
        yield data[start:end]
        start = end + 1
