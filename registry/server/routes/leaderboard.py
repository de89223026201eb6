"""``/v1/runs``, ``/v1/boards`` and ``/v1/leaderboard``: what was measured, and who is best."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query
from starlette.requests import Request
from starlette.responses import Response

from t2.core.references import DIGEST_PATTERN, NAME_PATTERN
from t2.registry.schemas import (
    AliasRun,
    Board,
    BoardPage,
    BoardQuery,
    Judgement,
    Page,
    Run,
    RunDetail,
    RunQuery,
    VerdictQuery,
)
from t2.registry.server.bodies import MAX_INT, NO_NUL
from t2.registry.server.limits import Workers
from t2.registry.server.operations import BINARY, Operation, answer, done, expert_name, owner_of, registry
from t2.registry.server.parameters import AliasPath, Cursor, DigestPath, Limit, NamePath, NamespacePath
from t2.registry.server.routes.content import content_operations, send
from t2.registry.server.uploads import Uploads

Label = Annotated[str | None, Query(min_length=1, max_length=200, pattern=NO_NUL)]
Base = Annotated[
    str,
    Query(min_length=1, max_length=200, pattern=NO_NUL, description="A model's name, identity or fingerprint."),
]
OptionalBase = Annotated[
    str | None,
    Query(min_length=1, max_length=200, pattern=NO_NUL, description="A model's name, identity or fingerprint."),
]


Named = Annotated[
    str,
    Query(
        min_length=1,
        max_length=300,
        pattern=NO_NUL,
        description="A run, by its digest or the first characters of it, or an expert, by its newest runs.",
    ),
]


async def push_run(request: Request, namespace: NamespacePath) -> Response:
    """Put a run on the boards: 201 when it is new, 200 when it was there already.

    The body is a line of canonical JSON that tells the run, then a line for each sample.
    """
    service = registry(request)
    uploads: Uploads = request.app.state.uploads
    run = await uploads.take(request, lambda data: service.push_run(namespace, data))
    return answer(run, 201 if run.created else 200)


def list_runs(
    request: Request,
    namespace: Annotated[str | None, Query(pattern=NAME_PATTERN)] = None,
    task: Label = None,
    base: OptionalBase = None,
    expert: Annotated[
        str | None,
        Query(
            min_length=1,
            max_length=300,
            pattern=NO_NUL,
            description="A reference to a version, `@sha256:…`, or a name for any of its versions.",
        ),
    ] = None,
    strategy: Label = None,
    digest: Annotated[
        str | None, Query(pattern=r"^[0-9a-f]{6,64}$", description="Of the run; its first characters will do.")
    ] = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Response:
    """List runs, newest first."""
    query = RunQuery(namespace=namespace, task=task, base=base, expert=expert, strategy=strategy, digest=digest)
    return answer(registry(request).list_runs(query, cursor=cursor, limit=limit))


def get_run(request: Request, namespace: NamespacePath, digest: DigestPath) -> Response:
    """Show a run with all that was told of it."""
    return answer(registry(request).get_run(namespace, digest))


def delete_run(request: Request, namespace: NamespacePath, digest: DigestPath) -> Response:
    """Take a run off the boards, for ever; it can be pushed again."""
    registry(request).delete_run(namespace, digest)
    return done()


def get_samples(request: Request, namespace: NamespacePath, digest: DigestPath) -> Response:
    """Download a run's samples, a line of JSON each."""
    run = registry(request).get_run(namespace, digest)
    return send(request, run.samples_digest, run.samples_size, f"{namespace}-{digest}.jsonl", immutable=True)


def list_boards(
    request: Request, task: Label = None, base: OptionalBase = None, cursor: Cursor = None, limit: Limit = 50
) -> Response:
    """List boards: what can be compared; the newest first."""
    return answer(registry(request).list_boards(task=task, base=base, cursor=cursor, limit=limit))


def get_board(
    request: Request,
    task: Annotated[str, Query(min_length=1, max_length=200, pattern=NO_NUL)],
    base: Base,
    task_version: Label = None,
    n_shot: Annotated[int | None, Query(ge=0, le=10_000)] = None,
    docs_digest: Annotated[
        str | None, Query(pattern=DIGEST_PATTERN, description="Which documents; without, the most.")
    ] = None,
    metric: Annotated[
        str | None, Query(min_length=1, max_length=200, pattern=NO_NUL, description="Without, the task's first one.")
    ] = None,
    filter: Label = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Response:
    """List the runs of a task by a base model, the best first, with 95% intervals."""
    query = BoardQuery(
        task=task,
        base=base,
        task_version=task_version,
        n_shot=n_shot,
        docs_digest=docs_digest,
        metric=metric,
        filter=filter,
    )
    return answer(registry(request).board(query, cursor=cursor, limit=limit))


def list_alias_runs(
    request: Request,
    namespace: NamespacePath,
    name: NamePath,
    alias: AliasPath,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Response:
    """List runs of the versions that an alias points or pointed to, newest first."""
    return answer(registry(request).alias_runs(expert_name(namespace, name), alias, cursor=cursor, limit=limit))


async def get_verdict(
    request: Request,
    baseline: Named,
    candidate: Named,
    margin: Annotated[
        float,
        Query(ge=0, allow_inf_nan=False, description="The largest drop that does not matter, in the score's unit."),
    ],
    noise: Annotated[
        list[Named] | None, Query(max_length=20, description="Repeats of one evaluation, at least two.")
    ] = None,
    task: Annotated[
        list[Annotated[str, Query(min_length=1, max_length=200, pattern=NO_NUL)]] | None,
        Query(max_length=100, description="All without."),
    ] = None,
    metric: Label = None,
    filter: Label = None,
    level: Annotated[float, Query(gt=0, lt=1, description="Of the intervals.")] = 0.95,
    power: Annotated[float, Query(gt=0.5, lt=1, description="Of the smallest drop.")] = 0.8,
    seed: Annotated[int, Query(ge=-MAX_INT, le=MAX_INT, description="Of the bootstrap.")] = 0,
) -> Response:
    """Judge a candidate beside a baseline, document by document: REGRESSED, IMPROVED, NO CHANGE or UNDERPOWERED."""
    query = VerdictQuery(
        baseline=baseline,
        candidate=candidate,
        margin=margin,
        noise=tuple(noise or ()),
        tasks=tuple(task or ()),
        metric=metric,
        filter=filter,
        level=level,
        power=power,
        seed=seed,
    )
    verdicts: Workers = request.app.state.verdicts
    return answer(await verdicts.run(owner_of(request), lambda: registry(request).verdict(query)))


_RUN = "/v1/runs/{namespace}/{digest}"
_ALIAS = "/v1/experts/{namespace}/{name}/aliases/{alias}"
OPERATIONS = (
    Operation("list_runs", "GET", "/v1/runs", "read", list_runs, Page[Run], errors=(404,)),
    Operation(
        "push_run",
        "POST",
        "/v1/runs/{namespace}",
        "write",
        push_run,
        Run,
        201,
        (409,),
        takes=BINARY,
        responses={200: {"model": Run, "description": "The run was there already"}},
    ),
    Operation("get_run", "GET", _RUN, "read", get_run, RunDetail),
    Operation("delete_run", "DELETE", _RUN, "write", delete_run, status=204),
    *content_operations("samples", f"{_RUN}/samples", get_samples),
    Operation("list_boards", "GET", "/v1/boards", "read", list_boards, Page[Board], errors=(404,)),
    Operation("get_board", "GET", "/v1/leaderboard", "read", get_board, BoardPage, errors=(404,)),
    Operation("get_verdict", "GET", "/v1/verdict", "read", get_verdict, Judgement, errors=(404, 409, 413)),
    Operation("list_alias_runs", "GET", f"{_ALIAS}/runs", "read", list_alias_runs, Page[AliasRun]),
)
