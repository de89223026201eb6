"""Runs: what an evaluation measured, pushed whole, and found by task, base model, expert and alias."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Select, and_, case, delete, func, or_, select, update
from sqlalchemy.orm import Session

from t2.core.errors import ArgumentError, DataError, InvalidRequestError, NotFoundError
from t2.core.manifest import NO_FINGERPRINT, BaseModelRef
from t2.core.references import ExpertName, is_digest, parse_reference
from t2.core.results import NO_METRIC, Score
from t2.core.runfile import RunFile
from t2.core.statistics import mean_interval
from t2.registry.db import models
from t2.registry.db.database import VARIED, insert_once
from t2.registry.db.lookups import any_of, columns
from t2.registry.schemas import AliasRun, Page, Run, RunDetail, RunExpert, RunQuery, RunScore, known
from t2.registry.services import audit, base_models, experts, namespaces, versions
from t2.registry.services.actor import Actor
from t2.registry.services.paging import Order, fetch_page

REFERENCES = 20
"""How many of the versions with an expert's content are told."""
RESAMPLED = 2000
"""Scores that are not 0 or 1 and fewer than this are resampled for an interval; of more the mean is normal enough."""
_Z = 1.959963984540054
_LONGEST_REFERENCE = 300

_RUN, _SCORE, _EXPERT = (columns(table) for table in (models.Run, models.RunScore, models.RunExpert))
_BOARD, _BLOB, _BASE = (columns(table) for table in (models.Board, models.Blob, models.BaseModel))
_NAMESPACE, _EVENT, _VERSION = (columns(table) for table in (models.Namespace, models.AliasEvent, models.Version))
_FIELDS = {
    "namespace": _NAMESPACE.name,
    "digest": _RUN.digest,
    "task": _RUN.task,
    "task_version": _BOARD.task_version,
    "n_shot": _BOARD.n_shot,
    "docs": _BOARD.docs,
    "docs_digest": _BOARD.docs_digest,
    "prompts_digest": _RUN.prompts_digest,
    "samples_digest": _RUN.samples,
    "samples_size": _BLOB.size,
    "model": _RUN.model,
    "base": func.coalesce(_RUN.base_name, _RUN.base),
    "base_revision": _RUN.base_revision,
    "base_fingerprint": _BASE.fingerprint,
    "base_identity": func.nullif(_RUN.base, func.coalesce(_RUN.base_name, _RUN.base)),
    "strategy": _RUN.strategy,
    "control": _RUN.control,
    "seed": _RUN.seed,
    "record_digest": _RUN.record_digest,
    "evaluated_at": _RUN.evaluated_at,
    "created_at": _RUN.created_at,
    "created_by": _RUN.created_by,
}
"""The fields of a run that are columns, in their order in a row, after its id."""
_JOINED = (
    select(_RUN.id, *_FIELDS.values())
    .join_from(models.Run.__table__, models.Board.__table__, _RUN.board_id == _BOARD.id)
    .join(models.Namespace.__table__, _RUN.namespace_id == _NAMESPACE.id)
    .join(models.Blob.__table__, _RUN.samples == _BLOB.digest)
    .outerjoin(models.BaseModel.__table__, _RUN.base_model_id == _BASE.id)
)
_SCORES = tuple(RunScore.model_fields)
_SCORES_OF = select(_SCORE.run_id, *(_SCORE[name] for name in _SCORES)).order_by(_SCORE.run_id, _SCORE.position)
_EXPERTS_OF = select(_EXPERT.run_id, _EXPERT.name, _EXPERT.digest, _EXPERT.domain, _EXPERT.reference).order_by(
    _EXPERT.run_id, _EXPERT.position
)


def push(session: Session, actor: Actor, namespace: str, file: RunFile) -> Run:
    """Insert a run whose samples are already in the store, or return the existing same run.

    Raises:
        InvalidRequestError: it was evaluated with ``--predict_only``, so it has no score.
    """
    if any(score.metric == NO_METRIC for score in file.run.scores):
        raise InvalidRequestError(
            f"a run of {namespace}: {file.run.task} was evaluated with --predict_only, so it has no score; evaluate "
            "without the flag"
        )
    owner = namespaces.ensure(session, actor, namespace)
    new = insert(session, owner.id, file, created_at=audit.now(), created_by=str(actor))
    if new:
        digest = file.run.digest()
        audit.record(session, actor, "run.create", f"{namespace}/runs/{digest}", task=file.run.task)
    return get(session, namespace, file.run.digest()).model_copy(update={"created": new})


def insert(session: Session, namespace_id: int, file: RunFile, *, created_at: datetime, created_by: str) -> bool:
    """Insert the rows of a run, its board, scores and experts; return whether the run is new.

    For an existing run, scores that its samples confirm are marked: an older t2 may have confirmed fewer.
    """
    run = file.run
    key = {
        "task": run.task,
        "base": run.base.identity or run.base.id,
        "task_version": run.task_version,
        "n_shot": run.n_shot,
        "docs_digest": run.docs_digest,
    }
    insert_once(session, models.Board, **key, base_name=run.base.id, docs=run.docs)
    board = session.scalars(select(models.Board.id).filter_by(**key)).one()
    base = None
    if run.base.fingerprint not in (None, NO_FINGERPRINT):
        base = base_models.ensure(
            session, BaseModelRef(id=run.base.id, revision=run.base.revision, fingerprint=run.base.fingerprint)
        )
    digest = run.digest()
    if not insert_once(
        session,
        models.Run,
        namespace_id=namespace_id,
        digest=digest,
        board_id=board,
        task=run.task,
        base=key["base"],
        base_name=run.base.id,
        base_revision=run.base.revision,
        base_model_id=base.id if base is not None else None,
        samples=run.samples_digest,
        prompts_digest=run.prompts_digest,
        model=run.model,
        strategy=run.strategy,
        control=run.control,
        seed=run.seeds.get("adapt"),
        record_digest=run.record.digest() if run.record is not None else None,
        header=file.header,
        evaluated_at=run.evaluated_at,
        created_at=created_at,
        created_by=created_by,
    ):
        there = select(_RUN.id).where(_RUN.namespace_id == namespace_id, _RUN.digest == digest).scalar_subquery()
        agreeing = [place for place, score in enumerate(run.scores) if score.key in file.confirmed]
        session.execute(
            update(models.RunScore)
            .where(
                _SCORE.run_id == there,
                _SCORE.position.in_(agreeing),
                _SCORE.confirmed.is_(False),
            )
            .values(confirmed=True)
            .execution_options(synchronize_session=False)
        )
        return False
    run_id = session.scalars(select(_RUN.id).where(_RUN.namespace_id == namespace_id, _RUN.digest == digest)).one()
    for position, score in enumerate(run.scores):
        low, high = interval(score, file.values.get(score.key, []))
        told = score.model_dump(exclude={"aggregation"})
        if score.metric == NO_METRIC:  # of an archive
            told["score"] = low = high = None
        confirmed = score.key in file.confirmed
        session.add(
            models.RunScore(
                run_id=run_id, board_id=board, position=position, low=low, high=high, confirmed=confirmed, **told
            )
        )
    session.add_all(
        models.RunExpert(
            run_id=run_id,
            position=position,
            digest=expert.digest,
            name=expert.name,
            domain=expert.domain,
            reference=expert.reference if len(expert.reference or "") <= _LONGEST_REFERENCE else None,
        )
        for position, expert in enumerate(run.experts)
    )
    session.flush()
    return True


def interval(score: Score, values: Sequence[float]) -> tuple[float | None, float | None]:
    """The ends of a score's 95% interval.

    Of a mean of zeros and ones, and of any mean of few documents, by :func:`t2.core.statistics.mean_interval`; else
    the normal one, of the samples' own standard error or of the one that lm-eval told.

    Args:
        values: the score of each document; the mean for a repeated document.
    """
    if score.score is None:
        return None, None
    stderr = score.stderr
    if score.aggregation == "mean":
        if len(values) <= RESAMPLED or set(values) <= {0.0, 1.0}:
            try:
                found = mean_interval(values)
            except DataError:  # a single score that is not 0 or 1
                return None, None
            # With repeated documents the score, a mean over samples, can be outside the interval over documents.
            return min(found.low, score.score), max(found.high, score.score)
        mean = math.fsum(values) / len(values)
        stderr = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1) / len(values))
    if stderr is None:
        return None, None
    low, high = score.score - _Z * stderr, score.score + _Z * stderr
    return (low, high) if math.isfinite(low) and math.isfinite(high) and low <= high else (None, None)


def get(session: Session, namespace: str, digest: str) -> Run:
    """A run."""
    return shape(session, session.execute(_JOINED.where(_RUN.id == id_of(session, namespace, digest))).all())[0]


def detail(session: Session, namespace: str, digest: str) -> RunDetail:
    """A run with its header."""
    run = get(session, namespace, digest)
    header = session.scalars(select(_RUN.header).where(_RUN.id == id_of(session, namespace, digest))).one()
    return known(RunDetail, {**vars(run), "header": json.loads(header)})


def id_of(session: Session, namespace: str, digest: str) -> int:
    """The id of a run.

    Raises:
        NotFoundError: there is none.
    """
    found: int | None = session.scalar(
        select(_RUN.id).where(_RUN.namespace_id == namespaces.find(session, namespace).id, _RUN.digest == digest)
    )
    if found is None:
        raise NotFoundError(f"there is no run {digest[:80]} in {namespace}")
    return found


def remove(session: Session, actor: Actor, namespace: str, digest: str) -> None:
    """Delete a run; its samples go with the next collection of garbage where no other run has them."""
    session.execute(delete(models.Run).where(models.Run.id == id_of(session, namespace, digest)))
    audit.record(session, actor, "run.delete", f"{namespace}/runs/{digest}")


def list_runs(session: Session, query: RunQuery, *, cursor: str | None, limit: int) -> Page[Run]:
    """Runs, newest first."""
    statement = _JOINED
    if query.namespace is not None:
        statement = statement.where(_RUN.namespace_id == namespaces.id_of(session, query.namespace))
    if query.base is not None:
        statement = statement.where(_of_base(session, query.base))
    if query.digest is not None:
        # "g" comes after all hex digits.
        statement = statement.where(_RUN.digest >= query.digest, _RUN.digest < f"{query.digest}g")
    for column, wanted in ((_RUN.task, query.task), (_RUN.strategy, query.strategy)):
        if wanted is not None:
            statement = statement.where(column == wanted)
    if query.expert is not None:
        statement = statement.where(_RUN.id.in_(_with_expert(session, query.expert)))
    rows, next_cursor = fetch_page(
        session,
        statement.execution_options(**{VARIED: True}),
        Order(models.Run.id, models.Run.id, descending=True),
        query=["runs", query.model_dump(mode="json")],
        cursor=cursor,
        limit=limit,
        position=lambda row: (row.id, row.id),
    )
    queried = (query.expert or "").partition("@")[0] or None
    return Page(items=shape(session, rows, queried=queried), next=next_cursor)


def alias_runs(session: Session, name: ExpertName, alias: str, *, cursor: str | None, limit: int) -> Page[AliasRun]:
    """Runs of the versions that an alias points or pointed to, newest first."""
    expert_id = experts.id_of(session, name)
    pointed = (_EVENT.expert_id == expert_id, _EVENT.alias == alias)
    if session.scalar(select(_EVENT.id).where(*pointed).limit(1)) is None:
        raise NotFoundError(f"{name} never had an alias {alias}")
    statement = (
        _JOINED.add_columns(_VERSION.number, func.max(_EVENT.at, type_=models.Utc()).label("since"))
        .join(models.RunExpert.__table__, _EXPERT.run_id == _RUN.id)
        .join(models.Version.__table__, _VERSION.digest == _EXPERT.digest)
        .join(
            models.AliasEvent.__table__,
            (_EVENT.expert_id == _VERSION.expert_id) & (_EVENT.number == _VERSION.number),
        )
        .where(*pointed)
        .group_by(_RUN.id, *_FIELDS.values(), _VERSION.number)
    )
    rows, next_cursor = fetch_page(
        session,
        statement,
        Order(models.Run.id, models.Version.number, descending=True),
        query=["alias-runs", expert_id, alias],
        cursor=cursor,
        limit=limit,
        position=lambda row: (row.id, row.number),
    )
    now = session.scalar(
        select(models.Alias.number).where(models.Alias.expert_id == expert_id, models.Alias.alias == alias)
    )
    items = [
        AliasRun(version=row.number, since=row.since, current=row.number == now, run=run)
        for row, run in zip(rows, shape(session, rows, queried=str(name)), strict=True)
    ]
    return Page(items=items, next=next_cursor)


def joined() -> Select[*tuple[Any, ...]]:
    """Runs with what :func:`shape` needs from other tables."""
    return _JOINED


def shape(session: Session, rows: Sequence[Any], *, queried: str | None = None) -> list[Run]:
    """Runs as clients see them, in three more queries however many they are.

    Args:
        queried: the ``namespace/name`` of the expert in the query, if any.
    """
    if not rows:
        return []
    ids = {"runs": list({row.id for row in rows})}
    scores: dict[int, list[RunScore]] = {run_id: [] for run_id in ids["runs"]}
    for run_id, *fields in session.execute(_SCORES_OF.where(any_of(_SCORE.run_id, "runs")), ids):
        scores[run_id].append(known(RunScore, dict(zip(_SCORES, fields, strict=True))))
    took_part = session.execute(_EXPERTS_OF.where(any_of(_EXPERT.run_id, "runs")), ids).all()
    owners = {row.id: dict(zip(_FIELDS, row[1:], strict=False))["namespace"] for row in rows}
    named = {row.reference.partition("@")[0] for row in took_part if row.reference}
    named |= {queried} if queried is not None else set()
    references = _references(session, {row.digest for row in took_part}, named, set(owners.values()))
    of_runs: dict[int, list[RunExpert]] = {run_id: [] for run_id in ids["runs"]}
    for row in took_part:
        known_as = _sort_by_relevance(references.get(row.digest, ()), queried, row.reference, owners[row.run_id])
        of_runs[row.run_id].append(
            RunExpert(name=row.name, digest=row.digest, domain=row.domain, references=tuple(known_as))
        )
    found = []
    for row in rows:
        values: dict[str, Any] = dict(zip(_FIELDS, row[1:], strict=False))
        values |= {"scores": tuple(scores[row.id]), "experts": tuple(of_runs[row.id]), "created": True}
        found.append(known(Run, {name: values[name] for name in Run.model_fields}))
    return found


def _references(
    session: Session, digests: set[str], named: set[str], namespaces: set[str]
) -> dict[str, list[tuple[str, int]]]:
    """Find the live versions of each content, as pairs of path and number.

    Args:
        digests: digests of the contents.
        named: paths of experts that are preferred if there are more than :data:`REFERENCES`.
        namespaces: namespaces whose experts are preferred next; then the newest.
    """
    if not digests:
        return {}
    nearness = case((models.Expert.path.in_(named), 0), (models.Namespace.name.in_(namespaces), 1), else_=2)
    place = func.row_number().over(partition_by=models.Version.digest, order_by=(nearness, models.Version.id.desc()))
    live = (
        select(
            models.Version.digest, models.Expert.path, models.Version.number, models.Version.id, place.label("place")
        )
        .join(models.Expert, models.Version.expert_id == models.Expert.id)
        .join(models.Namespace, models.Expert.namespace_id == models.Namespace.id)
        .where(
            models.Version.digest.in_(digests), models.Version.deleted_at.is_(None), models.Expert.deleted_at.is_(None)
        )
        .subquery()
    )
    found: dict[str, list[tuple[str, int]]] = {}
    first = select(live).where(live.c.place <= REFERENCES).order_by(live.c.digest, live.c.id.desc())
    for row in session.execute(first):
        found.setdefault(row.digest, []).append((row.path, row.number))
    return found


def _sort_by_relevance(
    versions: Iterable[tuple[str, int]], queried: str | None, reference: str | None, namespace: str
) -> list[str]:
    """Sort versions of one content, given newest first, by what a reader of the run knows best.

    The order is: versions of the queried expert, the version that the run named, other versions of that expert,
    versions in the run's namespace, the rest.
    """
    named = (reference or "").partition("@")[0]

    def distance(version: tuple[str, int]) -> int:
        path, number = version
        conditions = (
            path == queried,
            f"{path}@{number}" == reference,
            path == named,
            path.startswith(f"{namespace}/"),
            True,
        )
        return conditions.index(True)

    return [f"{path}@{number}" for path, number in sorted(versions, key=distance)]


def _of_base(session: Session, base: str) -> ColumnElement[bool]:
    if is_digest(base):
        return or_(_RUN.base == base, _RUN.base_model_id.in_(base_models.ids_of(session, base)))
    return or_(_RUN.base_name == base, and_(_RUN.base_name.is_(None), _RUN.base == base))


def _with_expert(session: Session, expert: str) -> Select[int]:
    """The runs with an expert, by whatever way it is named.

    Raises:
        InvalidRequestError: it is no reference.
        NotFoundError: there is no such expert or version.
    """
    try:
        reference = parse_reference(expert)
    except ArgumentError as error:
        raise InvalidRequestError(f"expert: {error}") from error
    if reference.digest is not None:
        wanted: Any = [reference.digest]
    elif reference.version is not None or reference.alias is not None:
        wanted = [versions.resolve(session, reference).digest]
    else:
        assert reference.expert is not None
        wanted = select(_VERSION.digest).where(_VERSION.expert_id == experts.id_of(session, reference.expert))
    return select(_EXPERT.run_id).where(_EXPERT.digest.in_(wanted))
