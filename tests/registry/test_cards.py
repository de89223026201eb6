"""The card in an expert's row says what the tables say, whatever was done to the expert."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import select, text

from t2.core.errors import T2Error
from t2.core.references import ExpertName, parse_name
from t2.registry.db import migrate, models
from t2.registry.portable.exporting import export
from t2.registry.portable.importing import restore
from t2.registry.schemas import Expert, ExpertQuery, Page
from t2.registry.services import cards
from t2.registry.services.garbage import Policy, collect
from t2.registry.services.service import Service
from tests.registry.registries import ACTOR, STORAGES, fill, registry
from tests.registry.samples import FINGERPRINT, expert_bytes

NAMES = [ExpertName("team", "a"), ExpertName("team", "b")]
FILES = [expert_bytes(seed) for seed in range(3)]


@pytest.fixture(params=STORAGES)
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    with registry(request.param, tmp_path, request) as made:
        yield made


def agree(service: Service) -> int:
    """Check all experts; how many there are."""
    with service.database.read() as session:
        rows = session.execute(select(models.Expert.id, models.Expert.path, cards.CARD)).all()
        said = cards.made(session, [row.id for row in rows])
    for row in rows:
        assert row.card is not None, row.path
        assert Expert.model_validate_json(row.card) == said[row.id]
    listed = [*service.list_experts().items, *service.list_experts(ExpertQuery(deleted=True)).items]
    for each in listed:
        if each.deleted_at is None:
            assert each.aliases == {one.alias: one.version for one in service.list_aliases(parse_name(each.name))}
            assert service.get_expert(parse_name(each.name)) == each
    plain = [each.model_copy(update={"aliases": None}) for each in listed]
    assert sorted(plain, key=lambda each: each.name) == sorted(said.values(), key=lambda each: each.name)
    return len(rows)


def again(service: Service) -> None:
    """Take the registry's own archive in."""
    file = io.BytesIO()
    export(service.database, service.store, file)
    file.seek(0)
    restore(service.database, service.store, ACTOR, file)


def changes() -> st.SearchStrategy[tuple[str, tuple[Any, ...]]]:
    name, number = st.sampled_from(NAMES), st.integers(1, 3)
    alias, tag = st.sampled_from(["production", "next"]), st.lists(st.sampled_from(["x", "y:z", "w"]), max_size=2)
    return st.one_of(
        st.tuples(st.just("publish"), st.tuples(name, st.sampled_from(FILES))),
        st.tuples(st.just("set_metrics"), st.tuples(name, number, st.just({"validation.score": 0.5, "k": 0.1}))),
        st.tuples(st.just("set_alias"), st.tuples(name, alias, number)),
        st.tuples(st.just("delete_alias"), st.tuples(name, alias)),
        st.tuples(st.just("change_tags"), st.tuples(name, tag, tag)),
        st.tuples(st.just("describe_expert"), st.tuples(name, st.sampled_from(["", 'Grüße \\ "✓"']))),
        st.tuples(st.sampled_from(["delete", "restore"]), st.tuples(name, st.none() | number)),
        st.tuples(st.just("put_base_model"), st.just((FINGERPRINT, "other/name", None, {"a.weight": 1}))),
        st.tuples(st.sampled_from(["collect", "again"]), st.just(())),
    )


def apply(service: Service, what: str, arguments: tuple[Any, ...]) -> None:
    if what == "collect":
        now = timedelta(0)
        collect(service.database, service.store, ACTOR, Policy(grace=now, retention=now, keys=now))
    elif what == "again":
        again(service)
    elif what == "change_tags":
        service.change_tags(arguments[0], add=arguments[1], remove=arguments[2])
    else:
        # Some ask for what is not there, and must change nothing.
        with contextlib.suppress(T2Error):
            getattr(service, what)(*arguments)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(changes(), min_size=1, max_size=12))
def test_after_any_changes_a_card_says_what_the_tables_say(
    service: Service, done: list[tuple[str, tuple[Any, ...]]]
) -> None:
    for name in NAMES:
        try:
            service.restore(name)
        except T2Error:
            service.publish(name, FILES[0])
    for what, arguments in done:
        try:
            apply(service, what, arguments)
        except T2Error:
            assert what == "change_tags"
        agree(service)


def test_every_change_of_an_expert_is_in_its_card(service: Service) -> None:
    fill(service)
    assert agree(service) == 3
    (math,) = (each for each in service.list_experts().items if each.name == "team/math")
    assert math.latest is not None
    assert (math.latest.version, math.latest.aliases, math.tags) == (2, ("production",), ("best", "team:ours"))
    assert math.latest.metrics == {"validation.score": 0.1 + 0.2, "x": -1e-300}
    assert math == service.get_expert(ExpertName("team", "math"))


def test_an_import_makes_the_cards(service: Service, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    fill(service)
    file = io.BytesIO()
    export(service.database, service.store, file)
    (tmp_path / "other").mkdir()
    with registry("sqlite+folder", tmp_path / "other", request) as other:
        # What is there already gets the archive's tags and aliases.
        other.publish(ExpertName("team", "math"), expert_bytes(0))
        file.seek(0)
        restore(other.database, other.store, ACTOR, file)
        assert agree(other) == 3
        assert other.get_expert(ExpertName("team", "math")).tags == ("best", "team:ours")


def test_a_card_that_an_older_server_left_behind_is_passed_over(service: Service) -> None:
    fill(service)
    with service.database.write() as session:
        # As an older t2 moves an alias: it knows of no cards.
        session.execute(text("UPDATE alias SET number = 1"))
        later = (
            "datetime(updated_at, '+1 second')" if service.database.is_sqlite else "updated_at + interval '1 second'"
        )
        session.execute(text(f"UPDATE expert SET updated_at = {later} WHERE path = 'team/math'"))
        session.execute(text("UPDATE expert SET card = NULL, carded_at = NULL WHERE path = 'team/mix'"))
    listed = {each.name: each for each in service.list_experts().items}
    assert listed["team/math"].latest is not None
    assert listed["team/math"].latest.aliases == ()
    assert listed["team/math"] == service.get_expert(ExpertName("team", "math"))
    assert listed["team/mix"] == service.get_expert(ExpertName("team", "mix"))
    service.change_tags(ExpertName("team", "math"), add=["new"])
    service.change_tags(ExpertName("team", "mix"), add=["new"])
    assert agree(service) == 3


def test_the_migration_writes_the_cards(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(service)
    for seed in range(5):
        service.publish(ExpertName("many", f"e{seed}"), expert_bytes(seed))
    service.delete(ExpertName("many", "e1"), 1)
    before = Page[Expert].model_validate_json(service.list_experts_json(ExpertQuery(sort="name")))
    migrate.migrate(service.database, "0003")
    assert "card" not in {
        column["name"] for column in sqlalchemy.inspect(service.database.engine).get_columns("expert")
    }
    migrate.migrate(service.database)
    assert agree(service) == 8
    assert service.list_experts(ExpertQuery(sort="name")) == before


def test_the_answer_of_the_server_is_the_one_of_the_shapes(service: Service) -> None:
    fill(service)
    page = service.list_experts(ExpertQuery(sort="name"), limit=1)
    assert page.next is not None
    assert service.list_experts_json(ExpertQuery(sort="name"), limit=1) == page.model_dump_json()
    assert (
        service.get_expert_json(ExpertName("team", "mix"))
        == service.get_expert(ExpertName("team", "mix")).model_dump_json()
    )
