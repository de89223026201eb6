"""Publishing from below: what happens between a check and a commit, and what it costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import event, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from t2.core.errors import ConflictError, InvalidRequestError, NotFoundError, TooLargeError
from t2.core.references import parse_name, parse_reference
from t2.registry.blobs.local import LocalBlobs
from t2.registry.db import models
from t2.registry.db.database import Database, insert_once
from t2.registry.services import aliases, audit, base_models, blobs, versions
from t2.registry.services.actor import Actor, Limits
from t2.registry.services.service import Service
from tests.registry.cells import open_database
from tests.registry.samples import FINGERPRINT, expert_bytes

NAME = parse_name("team/math")
RANKS = {f"model.layers.{layer}.mlp.up_proj.weight": 8 for layer in range(4)}


@pytest.fixture(params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Database]:
    with open_database(request.param, tmp_path, request) as opened:
        yield opened


@pytest.fixture
def service(database: Database, tmp_path: Path) -> Service:
    return Service(database, LocalBlobs(tmp_path / "blobs"), Actor("cli", "tester"))


def wait_for(database: Database, future: Future[object]) -> None:
    """Return when the future is done, or its transaction waits for a lock; SQLite does not tell, and gets a moment."""
    for _ in range(20 if database.is_sqlite else 2000):
        if future.done():
            return
        if not database.is_sqlite:
            with database.engine.connect() as connection:
                waiting = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
                if connection.execute(waiting).scalar():
                    return
        time.sleep(0.01)


def test_ranks_are_not_told_between_the_check_of_an_upload_and_its_commit(database: Database, service: Service) -> None:
    service.publish(parse_name("team/other"), expert_bytes(1))
    data = expert_bytes(0, rank=7)
    file = service.validate(data, "it")
    with database.write() as session:
        blobs.reserve(session, file.digest, len(data))
    service.store.put(file.digest, data)
    with ThreadPoolExecutor(1) as pool:
        with database.write() as session:
            base_models.check_ranks(base_models.ensure(session, file.manifest.base), file.manifest)
            told: Future[object] = pool.submit(service.put_base_model, FINGERPRINT, "m", None, RANKS)
            wait_for(database, told)
            versions.publish(
                session, service.actor, NAME, file, description="", key=None, request="", limits=service.limits
            )
        with pytest.raises(ConflictError, match="disagrees"):
            told.result(60)
    assert service.get_base_model(FINGERPRINT).targets is None


def test_a_read_sees_one_moment(database: Database, service: Service) -> None:
    for seed in range(2):
        service.publish(NAME, expert_bytes(seed))
    service.set_alias(NAME, "best", 1)
    with database.read() as session:
        (before,) = aliases.list_aliases(session, NAME)
        service.set_alias(NAME, "best", 2)
        service.delete(NAME, 1)
        seen = versions.resolve(session, parse_reference("team/math@best"))
        assert (before.version, seen.version, seen.aliases) == (1, 1, ("best",))
    assert service.resolve(parse_reference("team/math@best")).version == 2


def test_a_row_is_inserted_once(database: Database) -> None:
    values = {"name": "team", "description": "", "created_at": audit.now()}
    with database.write() as session:
        assert insert_once(session, models.Namespace, **values)
        assert not insert_once(session, models.Namespace, **values)
    with database.write() as session:
        assert not insert_once(session, models.Namespace, **values)


def test_an_upload_that_fails_leaves_no_row_but_the_blobs(database: Database, service: Service) -> None:
    service.put_base_model(FINGERPRINT, "m", None, RANKS)
    with pytest.raises(InvalidRequestError):
        service.publish(NAME, expert_bytes(0, rank=7), idempotency_key="key")
    with database.read() as session:
        for table in (models.Namespace, models.Expert, models.Version, models.IdempotencyKey):
            assert session.scalars(select(table)).all() == []
        assert len(session.scalars(select(models.Blob)).all()) == 1
    assert service.publish(NAME, expert_bytes(0), idempotency_key="key").version == 1


def test_a_key_is_an_actors_own(service: Service) -> None:
    other = service.acting_for(Actor("cli", "other"))
    service.publish(NAME, expert_bytes(0), idempotency_key="key")
    assert other.publish(parse_name("team/other"), expert_bytes(1), idempotency_key="key").created
    with pytest.raises(ConflictError, match="idempotency key"):
        service.publish(parse_name("team/other"), expert_bytes(1), idempotency_key="key")


def test_a_key_is_forgotten(database: Database, tmp_path: Path) -> None:
    service = Service(
        database, LocalBlobs(tmp_path / "blobs"), Actor("cli", "tester"), limits=Limits(idempotency_hours=2.0)
    )
    service.publish(NAME, expert_bytes(0), idempotency_key="key")
    with database.write() as session:
        session.execute(update(models.IdempotencyKey).values(created_at=audit.now() - timedelta(hours=1.9)))
    with pytest.raises(ConflictError):
        service.publish(NAME, expert_bytes(1), idempotency_key="key")
    with database.write() as session:
        session.execute(update(models.IdempotencyKey).values(created_at=audit.now() - timedelta(hours=2.1)))
    assert service.publish(NAME, expert_bytes(1), idempotency_key="key").version == 2


def test_the_thousandth_version_costs_what_the_first_costs(database: Database, service: Service) -> None:
    for seed in range(3):
        service.publish(NAME, expert_bytes(seed))
    service.set_alias(NAME, "best", 1)
    few = _cost(database, lambda: _change_everything(service, 10))
    with database.write() as session:
        row = session.scalars(select(models.Version).where(models.Version.number == 3)).one()
        expert = session.get_one(models.Expert, row.expert_id)
        kept = {column.key: getattr(row, column.key) for column in models.Version.__table__.columns}
        for number in range(100, 600):
            digest = f"{number:064d}"
            session.add(models.Blob(digest=digest, size=1, created_at=row.created_at, touched_at=row.created_at))
            session.flush()
            session.add(models.Version(**{**kept, "id": None, "number": number, "digest": digest}))
        expert.last, expert.live = 599, expert.live + 500
    many = _cost(database, lambda: _change_everything(service, 20))
    assert many == few
    assert service.get_expert(NAME).versions == 3 + 500 + 2


def _change_everything(service: Service, seed: int) -> None:
    number = service.publish(NAME, expert_bytes(seed)).version
    service.set_metrics(NAME, number, {"a": 1.0})
    service.describe_expert(NAME, str(seed))
    service.delete(NAME, number)
    service.restore(NAME, number)
    service.set_alias(NAME, "best", number)
    service.resolve(parse_reference("team/math@best"))


def _cost(database: Database, work: object) -> tuple[int, int]:
    """Statements, and rows read into objects."""
    counted = {"statements": 0, "rows": 0}

    def statement(*_: object) -> None:
        counted["statements"] += 1

    def row(*_: object) -> None:
        counted["rows"] += 1

    event.listen(database.engine, "before_cursor_execute", statement)
    event.listen(Session, "loaded_as_persistent", row)
    try:
        assert callable(work)
        work()
    finally:
        event.remove(database.engine, "before_cursor_execute", statement)
        event.remove(Session, "loaded_as_persistent", row)
    return counted["statements"], counted["rows"]


def test_a_blob_that_vanished_meanwhile_is_put_again(database: Database, tmp_path: Path) -> None:
    class Forgetful(LocalBlobs):
        """Loses the blob's row, as a collection of garbage would, while the bytes are being put."""

        left = 2

        def put(self, digest: str, data: bytes) -> bool:
            if self.left:
                self.left -= 1
                with database.write() as session:
                    session.execute(text("DELETE FROM blob WHERE digest NOT IN (SELECT digest FROM version)"))
            return super().put(digest, data)

    store = Forgetful(tmp_path / "blobs")
    service = Service(database, store, Actor("cli", "tester"))
    assert service.publish(NAME, expert_bytes(0)).version == 1
    store.left = 3
    with pytest.raises(ConflictError, match="try again"):
        service.publish(NAME, expert_bytes(1))
    with pytest.raises(NotFoundError):
        service.resolve(parse_reference("team/math@2"))


def test_a_file_of_exactly_the_limit_is_taken(database: Database, tmp_path: Path) -> None:
    data, longer = expert_bytes(0), expert_bytes(1, matrices=5)
    limits = Limits(upload_bytes=len(data))
    service = Service(database, LocalBlobs(tmp_path / "blobs"), Actor("cli", "tester"), limits=limits)
    assert service.publish(NAME, data).version == 1
    with pytest.raises(TooLargeError):
        service.publish(NAME, longer)


def test_the_database_holds_to_what_rows_refer_to(database: Database, service: Service) -> None:
    service.publish(NAME, expert_bytes(0))
    service.set_alias(NAME, "best", 1)
    for statement in (
        "DELETE FROM blob",
        "DELETE FROM version",
        "DELETE FROM expert",
        "UPDATE alias SET number = 2",
        "UPDATE version SET digest = 'x'",
        "UPDATE expert SET live = 2",
        "UPDATE expert SET kind = 'other'",
        "INSERT INTO expert SELECT * FROM expert",
    ):
        with pytest.raises(IntegrityError), database.write() as session:
            session.execute(text(statement))
    assert service.resolve(parse_reference("team/math@best")).version == 1


def test_sqlite_syncs_each_commit(tmp_path: Path) -> None:
    with Database(f"sqlite:///{tmp_path / 'registry.db'}").read() as session:
        assert session.scalar(text("PRAGMA synchronous")) == 2  # FULL; less loses what was acknowledged in a power cut
        assert session.scalar(text("PRAGMA journal_mode")) == "wal"


def test_changes_of_one_expert_take_turns(database: Database, service: Service) -> None:
    for seed in range(3):
        service.publish(NAME, expert_bytes(seed))
    service.set_alias(NAME, "best", 1)
    with ThreadPoolExecutor(1) as pool:
        with database.write() as session:
            aliases.set_alias(session, service.actor, NAME, "best", 2, "")
            session.flush()
            later: Future[object] = pool.submit(service.set_alias, NAME, "best", 3)
            wait_for(database, later)
        later.result(60)
        assert [(each.version, each.previous) for each in service.alias_history(NAME).items] == [
            (3, 2),
            (2, 1),
            (1, None),
        ]
        with database.write() as session:
            versions.delete(session, service.actor, NAME, 2)
            session.flush()
            late: Future[object] = pool.submit(service.set_alias, NAME, "best", 2)
            wait_for(database, late)
        with pytest.raises(NotFoundError, match="is deleted"):
            late.result(60)
    assert service.get_expert(NAME).versions == 2
