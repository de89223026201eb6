"""Runs of a registry's leaderboard: pushed from what lm-eval wrote, found by what names them, and read back whole.

Nothing here needs PyTorch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from t2.core.comparison import compare_results
from t2.core.digests import canonical_json
from t2.core.errors import NotFoundError, ResultsError
from t2.core.references import ExpertName
from t2.core.results import TaskResult, find_results, read_results
from t2.core.runfile import RunFile, decode_run, encode_run, read_samples
from t2.core.verdicts import Verdict
from t2.harness.registry import find, with_nearest
from t2.registry import run_references
from t2.registry.client.base import RegistryClient
from t2.registry.schemas import Run, RunDetail


def push_results(client: RegistryClient, namespace: str, path: Path) -> list[Run]:
    """Put every task of every ``results_*.json`` on the boards, the oldest evaluation first.

    All of them are read before the first is pushed; the same again does nothing more.

    Args:
        path: a results file, or a folder that holds some.

    Raises:
        ResultsError: as :func:`t2.core.results.read_results`.
        RegistryError: as :meth:`t2.registry.client.base.RegistryClient.push_run`.
    """
    files = [encode_run(result) for file in find_results(path) for result in read_results(file)]
    return [client.push_run(namespace, data) for data in files]


def find_run(client: RegistryClient, text: str) -> RunDetail:
    """The run that a text names, as :func:`t2.registry.run_references.find_run` takes it.

    Raises:
        ArgumentError: it names none, or more than one.
        NotFoundError: there is none.
    """
    with _told_where(client):
        found = run_references.find_run(client, text)
        return client.get_run(found.namespace, found.digest)


def fetch_file(client: RegistryClient, run: RunDetail) -> tuple[bytes, RunFile]:
    """The file of a run, with its samples, checked against what the registry says of it.

    Raises:
        ResultsError: the registry tells other than the samples do.
    """
    data = canonical_json(run.header).encode() + b"\n" + client.download(run.samples_digest)
    file = decode_run(data, run.reference)
    if file.run.digest() != run.digest:
        raise ResultsError(f"{run.reference}: the registry gave another run, of the digest {file.run.digest()}")
    return data, file


def fetch_run(client: RegistryClient, text: str) -> TaskResult:
    """A run of the leaderboard in the shape of results that lm-eval wrote.

    Raises:
        ArgumentError, NotFoundError: as :func:`find_run`.
        ResultsError: as :func:`fetch_file`.
    """
    return _fetch(client, find_run(client, text))


def runs_of(client: RegistryClient, text: str) -> list[TaskResult]:
    """What a run, or the newest runs of an expert by itself, measured.

    Args:
        text: as :func:`t2.registry.run_references.runs_of` takes it.

    Raises:
        ArgumentError: it names neither, or more than one run.
        NotFoundError: there is no such run, expert, version or alias, or no run of it.
        ResultsError: as :func:`fetch_file`.
    """
    named = run_references.parse_expert(text)
    if named is None:
        return [fetch_run(client, text)]
    digest = named.digest or find(client, named).digest
    with with_nearest(client, named):
        found = run_references.runs_of(client, text)
        results = [_fetch(client, client.get_run(run.namespace, run.digest)) for run in found]
    for result in results:
        if [expert.digest for expert in result.run.experts] != [digest]:
            raise ResultsError(
                f"{client.location}: asked for runs of {named}, it answers with a run that is not of sha256:{digest} "
                f"alone: {result.run.digest()}; try again if the alias was just moved, else ask who runs this registry"
            )
    return results


def _fetch(client: RegistryClient, run: RunDetail) -> TaskResult:
    _, file = fetch_file(client, run)
    return TaskResult(file.run, read_samples(file.samples))


@contextlib.contextmanager
def _told_where(client: RegistryClient) -> Iterator[None]:
    try:
        yield
    except NotFoundError as error:
        raise NotFoundError(f"{client.location}: {error}") from error


def require_verdict(client: RegistryClient, name: ExpertName, alias: str, version: int, margin: float) -> str:
    """Check by their newest runs that a version is no worse than the one that an alias points to.

    The version must have runs of every task that the alias's version has runs of. Tasks whose score is not a mean over
    documents are skipped, unless all are such.

    Args:
        margin: the largest drop that does not matter, in the unit of the scores.

    Returns:
        What was found, for the alias's history.

    Raises:
        ResultsError: the verdict is neither NO CHANGE nor IMPROVED, or the runs cannot be compared.
        NotFoundError: one of them does not exist, or has no run.
    """
    baseline = runs_of(client, f"{name}@{alias}")
    every = [result.run.task for result in baseline]
    tasks = [result.run.task for result in baseline if result.run.score().aggregation == "mean"] or every
    found = compare_results(runs_of(client, f"{name}@{version}"), baseline, margin=margin, tasks=tasks)
    told = f"{found.verdict} beside the former one, margin {margin:g}, on {', '.join(tasks)}"
    if found.verdict not in (Verdict.NO_CHANGE, Verdict.IMPROVED):
        raise ResultsError(
            f"{name}@{alias} was not moved: version {version} is {told}; see t2 leaderboard check "
            f"--baseline {name}@{alias} --candidate {name}@{version} --margin {margin:g}"
        )
    return told
