"""What names runs on a leaderboard: a digest, or an expert with a selector."""

from __future__ import annotations

import re
from typing import Protocol

from t2.core.errors import ArgumentError, NotFoundError
from t2.core.references import NAME_PATTERN, PRODUCTION, Reference, parse_reference
from t2.registry.schemas import MAX_PAGE, Page, Run, RunQuery

_RUN = re.compile(rf"(?:(?P<namespace>{NAME_PATTERN.strip('^$')})/)?(?P<digest>[0-9a-f]{{6,64}})")


class RunLister(Protocol):
    """What has runs: any :class:`~t2.registry.client.base.RegistryClient`, and the registry itself."""

    def list_runs(self, query: RunQuery | None = None, *, cursor: str | None = None, limit: int = 50) -> Page[Run]: ...


def find_run(runs: RunLister, text: str) -> Run:
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
    found = runs.list_runs(RunQuery(namespace=match["namespace"], digest=match["digest"]), limit=2).items
    if not found:
        raise NotFoundError(f"there is no run {text}; t2 leaderboard list shows those there are")
    if len(found) > 1:
        more = "its namespace before it" if found[0].digest == found[1].digest else "more of it"
        raise ArgumentError(f"{text} is more than one run: {found[0].reference} and {found[1].reference}; write {more}")
    return found[0]


def parse_expert(text: str) -> Reference | None:
    """The expert whose runs a text means, by its alias ``production`` where it says no other; None where it is a run.

    Raises:
        ArgumentError: it is neither.
    """
    if _RUN.fullmatch(text):
        return None
    reference = parse_reference(text)
    if reference.expert is not None and not reference.pinned and reference.alias is None:
        return Reference(reference.expert, alias=PRODUCTION)
    return reference


def runs_of(runs: RunLister, text: str) -> list[Run]:
    """A run, or the newest runs of an expert by itself, one of each task, sorted by task.

    A run with an unconfirmed first score is used only if the task has no other.

    Args:
        text: a run as :func:`find_run` takes it, or an expert: ``team/math@production``, ``team/math@3``, or
            ``@sha256:…``; a name alone is its alias ``production``. Runs with other experts, or with a control, are not
            its own.

    Raises:
        ArgumentError: it names neither, or more than one run.
        NotFoundError: there is no such run, expert, version or alias, or no run of it.
    """
    reference = parse_expert(text)
    if reference is None:
        return [find_run(runs, text)]
    query = RunQuery(expert=str(reference))
    newest: dict[str, Run] = {}
    cursor: str | None = None
    while True:
        page = runs.list_runs(query, cursor=cursor, limit=MAX_PAGE)
        for run in page.items:
            if len(run.experts) != 1 or run.control != "none":
                continue
            before = newest.setdefault(run.task, run)
            if run.scores[0].confirmed and not before.scores[0].confirmed:
                newest[run.task] = run
        cursor = page.next
        if cursor is None:
            break
    if not newest:
        raise NotFoundError(f"there is no run of {reference} by itself; score it, then: t2 leaderboard push")
    return [newest[task] for task in sorted(newest)]
