"""Lists of experts narrow by every filter, and take as many statements for a long page as for a short one."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy
from sqlalchemy import event

from t2.core.references import ExpertName
from t2.registry.blobs.local import LocalBlobs
from t2.registry.db import migrate
from t2.registry.db.database import Database
from t2.registry.schemas import Expert, ExpertQuery, MetricRange, Version, VersionQuery
from t2.registry.services import experts
from t2.registry.services.actor import Actor
from t2.registry.services.service import Service
from tests.registry import samples, servers

COUNT = 12


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def filled(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A registry of twelve experts, which stay as they are."""
    folder = tmp_path_factory.mktemp("lists")
    with contextlib.ExitStack() as stack:
        url = f"sqlite:///{folder / 'registry.db'}"
        if request.param == "postgresql":
            url = stack.enter_context(servers.new_database(request.getfixturevalue("postgres_server")))
        database = Database(url)
        migrate.migrate(database)
        service = stack.enter_context(Service(database, LocalBlobs(folder / "blobs"), Actor("embedded", "tests")))
        for i in range(COUNT):
            name = ExpertName("team" if i % 2 else "other", f"expert-{i:02}")
            data = samples.expert_bytes(i, task="gsm8k" if i % 3 else "mbpp", domain="math" if i % 3 else "code")
            service.publish(name, data)
            service.set_metrics(name, 1, {"validation.score": i / COUNT, "latency": 10.0 * i})
            service.change_tags(name, add=["all", f"run:{i // 4}"])
        yield service


def names(service: Service, query: ExpertQuery) -> set[int]:
    return {int(expert.name[-2:]) for expert in service.list_experts(query).items}


@contextlib.contextmanager
def selects(service: Service) -> Iterator[list[str]]:
    """The queries that reach the database in the block."""
    found: list[str] = []

    def listen(*args: Any) -> None:
        if args[2].startswith("SELECT"):
            found.append(args[2])

    event.listen(service.database.engine, "before_cursor_execute", listen)
    yield found
    event.remove(service.database.engine, "before_cursor_execute", listen)


@pytest.mark.parametrize("few", [1, 1000])
@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (ExpertQuery(metrics=(MetricRange(name="latency", minimum=95),)), {10, 11}),
        (ExpertQuery(metrics=(MetricRange(name="latency", maximum=10),)), {0, 1}),
        (ExpertQuery(metrics=(MetricRange(name="latency", minimum=20, maximum=30),)), {2, 3}),
        (ExpertQuery(metrics=(MetricRange(name="latency", minimum=1e9),)), set()),
        (ExpertQuery(metrics=(MetricRange(name="unheard-of"),)), set()),
        (
            ExpertQuery(
                metrics=(MetricRange(name="latency", minimum=35), MetricRange(name="validation.score", maximum=0.5))
            ),
            {4, 5, 6},
        ),
    ],
)
def test_a_metric_range_narrows_by_the_latest_version_however_many_lie_in_it(
    filled: Service, monkeypatch: pytest.MonkeyPatch, few: int, query: ExpertQuery, expected: set[int]
) -> None:
    monkeypatch.setattr(experts, "_FEW", few)
    assert names(filled, query) == expected


def test_metrics_of_earlier_versions_do_not_count(filled: Service) -> None:
    name = ExpertName("other", "expert-10")
    filled.publish(name, samples.expert_bytes(100))
    assert names(filled, ExpertQuery(metrics=(MetricRange(name="latency", minimum=95),))) == {11}
    filled.delete(name, 2)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        (ExpertQuery(namespace="team"), {1, 3, 5, 7, 9, 11}),
        (ExpertQuery(namespace="nobody"), set()),
        (ExpertQuery(base="org/model"), set(range(COUNT))),
        (ExpertQuery(base=samples.FINGERPRINT), set(range(COUNT))),
        (ExpertQuery(base="org/other"), set()),
        (ExpertQuery(task="mbpp", domain="code"), {0, 3, 6, 9}),
        (ExpertQuery(task="mbpp", domain="math"), set()),
        (ExpertQuery(tags=("all", "run:1")), {4, 5, 6, 7}),
        (ExpertQuery(text="EXPERT-1"), {10, 11}),
        (ExpertQuery(text="%"), set()),
        (ExpertQuery(text="_xpert"), set()),
    ],
)
def test_filters_narrow(filled: Service, query: ExpertQuery, expected: set[int]) -> None:
    assert names(filled, query) == expected


def test_deleted_experts_are_in_a_list_of_their_own(filled: Service) -> None:
    filled.delete(ExpertName("team", "expert-05"))
    assert names(filled, ExpertQuery(deleted=True)) == {5}
    assert 5 not in names(filled, ExpertQuery())
    filled.restore(ExpertName("team", "expert-05"))


@pytest.mark.parametrize("sort", ["-updated", "name", "-score"])
def test_a_page_takes_as_many_statements_for_many_experts_as_for_one(filled: Service, sort: str) -> None:
    query = ExpertQuery(sort=sort)  # type: ignore[arg-type]
    counts = []
    for limit in (1, COUNT):
        with selects(filled) as statements:
            assert len(filled.list_experts(query, limit=limit).items) == limit
        counts.append(len(statements))
    assert counts[0] == counts[1] <= 4


def test_what_is_listed_is_as_if_it_had_been_checked(filled: Service) -> None:
    for expert in filled.list_experts().items:
        assert expert.latest is not None
        assert Expert.model_validate(expert.model_dump()) == expert
        assert Version(**expert.latest.model_dump()).model_dump_json() == expert.latest.model_dump_json()
        assert expert.latest.model_fields_set == set(Version.model_fields)


def test_a_page_reads_no_manifest(filled: Service) -> None:
    with selects(filled) as statements:
        filled.list_experts()
        filled.search_versions(VersionQuery(kind="expert"))
    assert not [statement for statement in statements if "manifest" in statement]


def test_a_search_by_text_can_use_trigrams(postgres_url: str) -> None:
    database = Database(postgres_url)
    migrate.migrate(database)
    with database.engine.connect() as connection:
        connection.exec_driver_sql("SET enable_seqscan = off")
        plan = connection.exec_driver_sql("EXPLAIN SELECT id FROM expert WHERE search_text LIKE '%%gsm8k%%'").all()
    assert any("ix_expert_search" in line for (line,) in plan)
    database.close()


def test_where_trigrams_are_not_allowed_the_migration_says_what_is_missing(
    postgres_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    role = "t2_limited"
    parsed = sqlalchemy.make_url(postgres_url)
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"DROP ROLE IF EXISTS {role}".encode())
        connection.execute(f"CREATE ROLE {role} LOGIN PASSWORD 'limited'".encode())
        connection.execute(f"GRANT ALL ON SCHEMA public TO {role}".encode())
    database = Database(parsed.set(username=role, password="limited").render_as_string(hide_password=False))
    try:
        with caplog.at_level(logging.WARNING, logger="t2.registry"):
            migrate.migrate(database)
        assert migrate.current(database) == migrate.head()
        assert "CREATE EXTENSION pg_trgm" in caplog.text
        migrate.migrate(database, "base")
    finally:
        database.close()
        with psycopg.connect(postgres_url, autocommit=True) as connection:
            connection.execute(f"DROP OWNED BY {role}".encode())
            connection.execute(f"DROP ROLE {role}".encode())
