"""Unconfirmed scores are marked, follow confirmed ones and do not affect verdicts."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy

from t2.core.digests import sha256
from t2.core.errors import ConflictError, InvalidRequestError, NotFoundError
from t2.core.record import ExpertRef
from t2.core.references import parse_name
from t2.core.results import TaskResult, samples_digests
from t2.core.runfile import decode_run, encode_run, read_samples
from t2.registry.blobs.local import LocalBlobs
from t2.registry.db import migrate, models
from t2.registry.db.database import Database
from t2.registry.schemas import BoardQuery, RunQuery, VerdictQuery
from t2.registry.services import blobs, namespaces, runs
from t2.registry.services.actor import Actor, Limits
from t2.registry.services.service import Service
from tests.registry.samples import expert_bytes, run_bytes

BOARD = BoardQuery(task="t2_gsm8k", base="org/model")
MATH = parse_name("team/math")


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    url = f"sqlite:///{tmp_path / 'r.db'}" if request.param == "sqlite" else request.getfixturevalue("postgres_url")
    opened = Database(url, pool=3)
    migrate.migrate(opened)
    yield opened
    opened.close()


@pytest.fixture
def service(database: Database, tmp_path: Path) -> Service:
    return Service(database, LocalBlobs(tmp_path / "blobs"), Actor("cli", "tester"), limits=Limits())


def changed(data: bytes, **score: Any) -> bytes:
    """The file of a run with a changed score."""
    file = decode_run(data, "here")
    scores = (file.run.scores[0].model_copy(update=score),)
    return encode_run(TaskResult(file.run.model_copy(update={"scores": scores}), read_samples(file.samples)))


def claim(seed: int, score: float, **fields: Any) -> bytes:
    """A run whose samples do not confirm its score."""
    return changed(run_bytes(seed, **fields), aggregation="other", score=score)


def shown(service: Service, limit: int = 50, **query: Any) -> list[tuple[float | None, bool]]:
    found, cursor = [], None
    while True:
        page = service.board(BOARD.model_copy(update=query), cursor=cursor, limit=limit)
        assert 0 < len(page.items) <= limit
        found += [(entry.score.score, entry.score.confirmed) for entry in page.items]
        cursor = page.next
        if cursor is None:
            return found


@pytest.mark.parametrize("higher", [True, False])
def test_what_the_samples_do_not_confirm_is_marked_and_never_ranked_above(service: Service, higher: bool) -> None:
    honest = [
        service.push_run("team", changed(run_bytes(answers, answers=answers), higher_is_better=higher))
        for answers in range(4)
    ]
    values = sorted((run.scores[0].score or 0 for run in honest), reverse=higher)
    claimed = [0.999, 0.0, 0.45]
    for seed, score in enumerate(claimed):
        run = service.push_run("evil", changed(claim(seed, score), higher_is_better=higher))
        assert not run.scores[0].confirmed
    wanted = [(value, True) for value in values] + [(value, False) for value in sorted(claimed, reverse=higher)]
    # Pages that end inside and at the end of both parts.
    for limit in (1, 2, 3, 4, 5, 7, 50):
        assert shown(service, limit) == wanted


def test_a_page_that_ends_with_the_last_confirmed_score_says_whether_there_is_more(service: Service) -> None:
    service.push_run("team", run_bytes(0))
    assert service.board(BOARD, limit=1).next is None
    service.push_run("evil", claim(1, 0.9))
    page = service.board(BOARD, limit=1)
    assert page.next is not None
    assert [entry.score.score for entry in service.board(BOARD, cursor=page.next, limit=1).items] == [0.9]
    for forged in ("unconfirmed.x", "unconfirmed.unconfirmed.", page.next + page.next):
        with pytest.raises(InvalidRequestError, match="cursor"):
            service.board(BOARD, cursor=forged)


def test_an_unconfirmed_metric_does_not_become_what_a_board_ranks_by(service: Service) -> None:
    confirmed = service.push_run("team", run_bytes(0))
    service.push_run("evil", changed(run_bytes(1), metric="zzz", aggregation="other", score=3.0))
    page = service.board(BOARD)
    assert (page.metric, [entry.run.digest for entry in page.items]) == ("acc", [confirmed.digest])
    assert service.board(BOARD.model_copy(update={"metric": "zzz"})).items[0].score.score == 3.0


def test_a_board_of_claims_alone_is_shown_and_marked(service: Service) -> None:
    service.push_run("team", claim(0, 12.5))
    assert shown(service) == [(12.5, False)]


def test_a_run_of_predict_only_is_refused_and_one_of_an_archive_has_no_score(
    service: Service, database: Database
) -> None:
    service.push_run("team", run_bytes(0))
    data = changed(run_bytes(1), metric="bypass", aggregation="other", score=999.0)
    with pytest.raises(InvalidRequestError, match="t2_gsm8k was evaluated with --predict_only, so it has no score"):
        service.push_run("team", data)
    # As an older registry stores it.
    file = decode_run(data, "here")
    with database.write() as session:
        blobs.reserve(session, file.run.samples_digest, len(file.samples))
        owner = namespaces.find(session, "team")
        assert runs.insert(session, owner.id, file, created_at=datetime.now(UTC), created_by="cli:before")
    assert [entry.score.metric for entry in service.board(BOARD).items] == ["acc"]
    with pytest.raises(NotFoundError, match=r"no run of t2_gsm8k has a score bypass"):
        service.board(BOARD.model_copy(update={"metric": "bypass"}))


def test_a_claim_does_not_stand_for_an_expert_and_does_not_block_its_verdict(service: Service) -> None:
    digests = [service.publish(MATH, expert_bytes(seed)).digest for seed in range(2)]
    service.set_alias(MATH, "production", 1)
    honest = [
        service.push_run("team", run_bytes(seed, answers=seed, docs=40, experts=(digests[seed],))) for seed in range(2)
    ]
    query = VerdictQuery(baseline="team/math@production", candidate="team/math@2", margin=0.9)
    before = service.verdict(query)
    for seed in range(2):
        service.push_run("evil", claim(9, 0.999, docs=40, experts=(digests[seed],)))
        service.push_run("evil", claim(9, 0.999, docs=40, task="invented", experts=(digests[0],)))
    after = service.verdict(query)
    assert [(task.baseline_run, task.candidate_run) for task in after.tasks] == [
        (honest[0].reference, honest[1].reference)
    ]
    assert after.unpaired == ["invented"]
    assert after.model_copy(update={"unpaired": []}) == before
    claimed = service.list_runs(RunQuery(namespace="evil")).items[0].reference
    with pytest.raises(ConflictError, match="no mean over documents"):
        service.verdict(query.model_copy(update={"baseline": claimed, "tasks": ()}))


def test_the_same_run_again_is_confirmed_where_an_older_version_did_not(service: Service, database: Database) -> None:
    run = service.push_run("team", run_bytes(0))
    with database.write() as session:
        session.execute(sqlalchemy.update(models.RunScore).values(confirmed=False))
    assert not service.get_run("team", run.digest).scores[0].confirmed
    again = service.push_run("team", run_bytes(0))
    assert (again.created, again.scores[0].confirmed) == (False, True)


def test_a_run_with_a_repeated_document_is_pushed_with_an_interval_of_its_documents(service: Service) -> None:
    file = decode_run(run_bytes(0, docs=6), "here")
    samples = read_samples(file.samples)
    many = tuple(sample for sample in samples for _ in range(50))
    plain = service.push_run("team", encode_run(TaskResult(file.run, samples)))
    docs, prompts, digest = samples_digests(many)
    score = file.run.scores[0].model_copy(update={"n": 300})
    repeated = file.run.model_copy(
        update={
            "docs": 300,
            "docs_digest": docs,
            "prompts_digest": prompts,
            "samples_digest": digest,
            "scores": (score,),
        }
    )
    run = service.push_run("team", encode_run(TaskResult(repeated, many)))
    assert (run.docs, run.scores[0].confirmed) == (300, True)
    # Fifty repeats of six documents are no more evidence than six documents.
    assert (run.scores[0].low, run.scores[0].high) == (plain.scores[0].low, plain.scores[0].high)
    verdict = service.verdict(VerdictQuery(baseline=run.reference, candidate=run.reference, margin=0.5))
    assert verdict.tasks[0].n == 6


def named_by(reference: str | None, digest: str, answers: int) -> bytes:
    """A run that names its expert by this reference."""
    file = decode_run(run_bytes(answers, answers=answers), "here")
    expert = ExpertRef(name="math", digest=digest, reference=reference)
    return encode_run(TaskResult(file.run.model_copy(update={"experts": (expert,)}), read_samples(file.samples)))


def test_an_expert_of_several_names_is_shown_by_the_one_that_was_meant(service: Service) -> None:
    data = expert_bytes(3)
    digest = sha256(data)
    for name in ("zoo/first", "team/math", "zoo/newest"):
        service.publish(parse_name(name), data)

    def first(namespace: str, reference: str | None, answers: int) -> str:
        run = service.push_run(namespace, named_by(reference, digest, answers))
        assert sorted(run.experts[0].references) == ["team/math@1", "zoo/first@1", "zoo/newest@1"]
        return run.experts[0].references[0]

    assert first("team", "zoo/first@1", 0) == "zoo/first@1"
    assert first("team", f"zoo/first@sha256:{digest}", 1) == "zoo/first@1"
    assert first("team", None, 2) == "team/math@1"
    assert first("team", "gone/away@7", 3) == "team/math@1"
    assert first("others", None, 4) == "zoo/newest@1"
    board = service.board(BOARD).items
    assert {entry.run.experts[0].references[0] for entry in board} == {"zoo/first@1", "team/math@1", "zoo/newest@1"}
    # A query by name shows that name.
    service.set_alias(parse_name("zoo/newest"), "production", 1)
    history = service.alias_runs(parse_name("zoo/newest"), "production").items
    assert {each.run.experts[0].references[0] for each in history} == {"zoo/newest@1"}
    asked = service.list_runs(RunQuery(expert="zoo/first@1")).items
    assert {run.experts[0].references[0] for run in asked} == {"zoo/first@1"}


def test_the_name_that_a_run_gave_is_among_twenty_of_a_hundred(service: Service) -> None:
    data = expert_bytes(4)
    for number in range(30):
        service.publish(parse_name(f"many/e{number}"), data)
    run = service.push_run("team", named_by("many/e3@1", sha256(data), 0))
    references = run.experts[0].references
    assert (references[0], references[1], len(references)) == ("many/e3@1", "many/e29@1", 20)


def test_runs_of_before_are_confirmed_and_named_by_the_migration(service: Service, database: Database) -> None:
    service.push_run("team", named_by("zoo/first@1", "ab" * 32, 0))
    service.push_run("evil", claim(1, 0.9))
    migrate.migrate(database, "0008")
    migrate.migrate(database)
    assert shown(service) == [(service.board(BOARD).items[0].score.score, True), (0.9, False)]
    with database.read() as session:
        assert session.scalars(sqlalchemy.select(models.RunExpert.reference)).all() == ["zoo/first@1"]
