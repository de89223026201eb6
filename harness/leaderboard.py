"""Runs of a registry's leaderboard: pushed from what lm-eval wrote, found by what names them, and read back whole.

Nothing here needs PyTorch.
"""

from __future__ import annotations

import re
from pathlib import Path

from t2.core.comparison import compare_results
from t2.core.digests import canonical_json
from t2.core.errors import ArgumentError, NotFoundError, ResultsError
from t2.core.references import PRODUCTION, ExpertName, parse_reference
from t2.core.results import TaskResult, find_results, read_results
from t2.core.runfile import RunFile, decode_run, encode_run, read_samples
from t2.core.verdicts import Verdict
from t2.harness.registry import every
from t2.registry.client.base import RegistryClient
from t2.registry.schemas import MAX_PAGE, Run, RunDetail, RunQuery

_RUN = re.compile(r"(?:(?P<namespace>[a-z0-9._-]+)/)?(?P<digest>[0-9a-f]{6,64})")


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
    """The run that a text names: its digest or the first characters of it, with or without ``namespace/`` before.

    Raises:
        ArgumentError: it names none, or more than one.
        NotFoundError: there is none.
    """
    match = _RUN.fullmatch(text)
    if match is None:
        raise ArgumentError(
            f"{text[:150]!r} is no run: write its digest, or at least 6 of its characters: team/3f1b6ba3"
        )
    found = client.list_runs(RunQuery(namespace=match["namespace"], digest=match["digest"]), limit=2).items
    if not found:
        raise NotFoundError(f"{client.location}: there is no run {text}; see t2 leaderboard list")
    if len(found) > 1:
        raise ArgumentError(
            f"{text} is more than one run: {found[0].reference} and {found[1].reference}; write more of it"
        )
    return client.get_run(found[0].namespace, found[0].digest)


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
    _, file = fetch_file(client, find_run(client, text))
    return TaskResult(file.run, read_samples(file.samples))


def runs_of(client: RegistryClient, text: str) -> list[TaskResult]:
    """What a run, or the newest runs of an expert by itself, measured.

    Args:
        text: a run as :func:`find_run` takes it, or an expert: ``team/math@production``, ``team/math@3``, or
            ``@sha256:…``; a name alone is its alias ``production``. Runs with other experts, or with a control, are not
            its own.

    Raises:
        ArgumentError: it names neither, or more than one run.
        NotFoundError: there is no such run, expert, version or alias, or no run of it.
        ResultsError: as :func:`fetch_file`.
    """
    if _RUN.fullmatch(text):
        return [fetch_run(client, text)]
    reference = parse_reference(text)
    if reference.expert is not None and reference.version is None and reference.alias is None:
        reference = parse_reference(f"{reference.expert}@{PRODUCTION}")
    query = RunQuery(expert=str(reference))
    newest: dict[str, Run] = {}
    for run in every(lambda cursor: client.list_runs(query, cursor=cursor, limit=MAX_PAGE)):
        if len(run.experts) == 1 and run.control == "none":
            newest.setdefault(run.task, run)
    if not newest:
        raise NotFoundError(
            f"{client.location}: there is no run of {reference} by itself; score it, then: t2 leaderboard push"
        )
    return [fetch_run(client, newest[task].reference) for task in sorted(newest)]


def require_verdict(client: RegistryClient, name: ExpertName, alias: str, version: int, margin: float) -> str:
    """Check by their newest runs that a version is no worse than the one that an alias points to.

    Every task that the one has runs of, the other must have too.

    Args:
        margin: the largest drop that does not matter, in the unit of the scores.

    Returns:
        What was found, for the alias's history.

    Raises:
        ResultsError: the verdict is neither NO CHANGE nor IMPROVED, or the runs cannot be compared.
        NotFoundError: one of them does not exist, or has no run.
    """
    baseline = runs_of(client, f"{name}@{alias}")
    tasks = [result.run.task for result in baseline]
    found = compare_results(runs_of(client, f"{name}@{version}"), baseline, margin=margin, tasks=tasks)
    told = f"{found.verdict} beside the former one, margin {margin:g}, on {', '.join(tasks)}"
    if found.verdict not in (Verdict.NO_CHANGE, Verdict.IMPROVED):
        raise ResultsError(
            f"{name}@{alias} was not moved: version {version} is {told}; see t2 leaderboard check "
            f"--baseline {name}@{alias} --candidate {name}@{version} --margin {margin:g}"
        )
    return told
