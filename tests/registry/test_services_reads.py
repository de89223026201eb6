"""Pages, curves and lineage from below: forged cursors, downsampling, and trees of any form."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2.core.curve import CurvePoint
from t2.core.digests import canonical_json, digest_of, sha256
from t2.core.errors import InvalidRequestError, TooLargeError
from t2.core.manifest import Parent
from t2.core.references import parse_name
from t2.registry.blobs.local import LocalBlobs
from t2.registry.db.database import Database
from t2.registry.names import MAX_ALIASES
from t2.registry.schemas import ExpertQuery
from t2.registry.services.actor import Actor, Limits
from t2.registry.services.curves import downsample
from t2.registry.services.lineage import EDGES_A_NODE, REFERENCES_A_NODE
from t2.registry.services.service import Service
from tests.registry.cells import open_database
from tests.registry.samples import expert_bytes

NAME = parse_name("team/math")
LIMITS = Limits(points=50, points_a_call=40, lineage_nodes=3)


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def database(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Database]:
    with open_database(request.param, tmp_path_factory.mktemp("database"), request) as opened:
        yield opened


@pytest.fixture
def service(database: Database, tmp_path: Path) -> Service:
    return Service(database, LocalBlobs(tmp_path / "blobs"), Actor("cli", "tester"), limits=LIMITS)


def forged(query: Any, kind: Any, value: Any, last: Any) -> str:
    """A cursor that the registry did not make."""
    text = canonical_json([digest_of(query)[:16], kind, value, last])
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


_NOW = datetime.now(UTC).isoformat()


@pytest.mark.parametrize(
    ("kind", "value", "last"),
    [
        ("s", "text", 1),
        ("n", 1.5, 1),
        ("i", 1, 1),
        ("t", "0001-01-01T00:00:00+14:00", 1),
        ("t", "9999-12-31T23:59:59-14:00", 1),
        ("t", "yesterday", 1),
        ("t", 5, 1),
        ("t", None, 1),
        ("t", _NOW, 2**63),
        ("t", _NOW, -(2**70)),
        ("t", _NOW, True),
        ("t", _NOW, "1"),
        ("t", _NOW, None),
        ("x", _NOW, 1),
        (None, _NOW, 1),
        ([], _NOW, 1),
    ],
)
def test_a_forged_cursor_does_no_harm(service: Service, kind: Any, value: Any, last: Any) -> None:
    cursor = forged(ExpertQuery().model_dump(mode="json"), kind, value, last)
    with pytest.raises(InvalidRequestError, match="cursor: it is damaged"):
        service.list_experts(cursor=cursor)


def test_a_forged_cursor_that_fits_is_a_position(service: Service) -> None:
    for sort, kind, value in [
        ("-updated", "t", "1970-01-01T00:00:00+00:00"),
        ("-score", "n", -1e300),
        ("name", "s", "~"),
    ]:
        query = ExpertQuery(sort=sort)  # type: ignore[arg-type]
        assert service.list_experts(query, cursor=forged(query.model_dump(mode="json"), kind, value, 1)).items == []


def test_a_cursor_with_a_character_that_no_database_holds(service: Service) -> None:
    query = ExpertQuery(sort="name")
    cursor = forged(query.model_dump(mode="json"), "s", "nul \x00", 1)
    with pytest.raises(InvalidRequestError, match="cursor: it is damaged"):
        service.list_experts(query, cursor=cursor)


@given(st.lists(st.floats(-1e6, 1e6), max_size=60), st.integers(3, 20))
def test_downsampling(rewards: list[float], wanted: int) -> None:
    kept = downsample([3.0 * step for step in range(len(rewards))], rewards, wanted)
    assert len(kept) == min(len(rewards), wanted)
    assert kept == sorted(set(kept))
    if rewards:
        assert (kept[0], kept[-1]) == (0, len(rewards) - 1)


def test_a_curve_grows_to_its_limit_in_any_order(service: Service) -> None:
    name = parse_name("curves/any-order")
    service.publish(name, expert_bytes(0))
    points = [
        CurvePoint(step=step, split=split, reward=0.0, score=0.0, seconds=0.0)
        for step in range(25)
        for split in ("train", "validation")
    ]
    added = sum(service.add_points(name, 1, points[start::7]) for start in (3, 0, 6, 1, 5, 2, 4))
    assert added == 50
    assert service.curve(name, 1).points == tuple(points)
    assert service.add_points(name, 1, points[10:50]) == 0
    beyond = points[0].model_copy(update={"step": 1000})
    with pytest.raises(TooLargeError, match="a curve of 51 points, the limit is 50"):
        service.add_points(name, 1, [points[3], beyond])
    with pytest.raises(TooLargeError, match="41 points in one request"):
        service.add_points(name, 1, points[:41])


def test_a_mixture_of_many_is_cut(service: Service) -> None:
    many = EDGES_A_NODE * LIMITS.lineage_nodes + 5
    parents = tuple(Parent(digest=sha256(str(i).encode()), alpha=1.0) for i in range(many))
    mixture = service.publish(parse_name("lineage/many"), expert_bytes(0, kind="mixture", parents=parents))
    tree = service.lineage(mixture.digest)
    assert tree.truncated
    assert len(tree.nodes) == LIMITS.lineage_nodes
    assert len(tree.edges) == LIMITS.lineage_nodes - 1


def test_a_long_chain_is_cut_at_its_ends(service: Service) -> None:
    digests = [service.publish(parse_name("lineage/c0"), expert_bytes(100)).digest]
    for i in range(1, 8):
        parents = (Parent(digest=digests[-1], alpha=0.5),)
        data = expert_bytes(100 + i, kind="mixture", parents=parents)
        digests.append(service.publish(parse_name(f"lineage/c{i}"), data).digest)
    tree = service.lineage(digests[4])
    assert tree.truncated
    assert [node.digest for node in tree.nodes] == [digests[4], digests[3], digests[2]]
    whole = service.lineage(digests[0]).nodes
    assert [node.digest for node in whole] == digests[:3]


def test_a_content_under_many_names_is_told_with_the_oldest_of_them(service: Service) -> None:
    data = expert_bytes(77)
    names = [parse_name(f"many/n{i}") for i in range(REFERENCES_A_NODE + 2)]
    for name in reversed(names):
        digest = service.publish(name, data).digest
    (node,) = service.lineage(digest).nodes
    assert node.references == tuple(f"{name}@1" for name in names[:1:-1])


def test_an_expert_has_so_many_aliases_and_no_more(service: Service) -> None:
    name = parse_name("many/aliases")
    for seed in (1, 2):
        service.publish(name, expert_bytes(seed))
    for i in range(MAX_ALIASES):
        service.set_alias(name, f"a{i}", 1)
    with pytest.raises(InvalidRequestError, match=str(MAX_ALIASES)):
        service.set_alias(name, "one-more", 1)
    service.set_alias(name, "a0", 2)
    service.delete_alias(name, "a1")
    service.set_alias(name, "one-more", 1)
    assert len(service.list_aliases(name)) == MAX_ALIASES
