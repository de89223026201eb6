"""What every registry client must do, on every kind of storage: one test per promise of the protocol."""

from __future__ import annotations

import math
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol, TypeVar

import pytest

from t2.core.comparison import compare_results
from t2.core.comparison_summary import as_json
from t2.core.curve import CurvePoint
from t2.core.digests import sha256
from t2.core.errors import (
    ConflictError,
    InvalidRequestError,
    NotFoundError,
    RegistryError,
    TooLargeError,
)
from t2.core.expertfile import decode_expert
from t2.core.manifest import BaseModelRef, Parent, pack_hashes
from t2.core.record import ExpertRef
from t2.core.references import ExpertName, Reference, parse_reference
from t2.core.results import EvaluatedBase, TaskResult, read_results, samples_bytes
from t2.core.runfile import encode_run, header_of
from t2.core.statistics import mean_interval
from t2.registry.client.base import RegistryClient
from t2.registry.schemas import (
    MAX_PAGE,
    VALIDATION_SCORE,
    BoardQuery,
    ExpertQuery,
    MetricRange,
    Page,
    Run,
    RunQuery,
    VerdictQuery,
    Version,
    VersionQuery,
)
from tests.registry.cells import LIMITS, Cell, open_cell
from tests.registry.samples import expert_bytes
from tests.results import Evaluated, vary

CELLS = ["sqlite+folder-embedded", "sqlite+folder-http", "postgres+s3-embedded", "postgres+s3-http"]
T = TypeVar("T")


@pytest.fixture(scope="module", params=CELLS)
def cell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cell]:
    storage, access = request.param.rsplit("-", 1)
    with open_cell(storage, access, tmp_path_factory.mktemp("cell"), request) as opened:
        yield opened


@pytest.fixture
def client(cell: Cell) -> RegistryClient:
    return cell.client


@dataclass(frozen=True)
class Team:
    """A namespace and a base model of a test's own, so that tests share a registry and do not meet."""

    namespace: str
    fingerprint: str

    def name(self, name: str = "math") -> ExpertName:
        return ExpertName(self.namespace, name)

    def file(self, seed: int = 0, **fields: Any) -> bytes:
        base = BaseModelRef(id=self.model, fingerprint=self.fingerprint)
        return expert_bytes(seed, **{"base": base, **fields})

    def mixture(self, seed: int, parents: dict[str, float], **fields: Any) -> bytes:
        of = tuple(Parent(digest=digest, alpha=alpha) for digest, alpha in parents.items())
        return self.file(seed, kind="mixture", parents=of, **fields)

    @property
    def model(self) -> str:
        return f"org/{self.namespace}"


@pytest.fixture
def team() -> Team:
    return Team(f"team-{uuid.uuid4().hex[:12]}", sha256(uuid.uuid4().bytes))


class Fetch(Protocol[T]):
    def __call__(self, *, cursor: str | None, limit: int) -> Page[T]: ...


def walk(fetch: Callable[[str | None, int], Page[T]], limit: int) -> list[list[T]]:
    """All pages."""
    pages, cursor = [], None
    while True:
        page = fetch(cursor, limit)
        pages.append(list(page.items))
        cursor = page.next
        if cursor is None:
            return pages


def points(count: int, split: Any = "train", start: int = 0) -> list[CurvePoint]:
    return [
        CurvePoint(
            step=step,
            split=split,
            reward=math.sin(step / 50),
            score=step / 7,
            kl=None,
            learning_rate=1e-3,
            seconds=step,
        )
        for step in range(start, start + count)
    ]


class TestPublish:
    def test_it_tells_everything_about_the_new_version(self, client: RegistryClient, team: Team) -> None:
        data = team.file(matrices=3, rank=5, training_docs=pack_hashes(["0123456789ab", "ba9876543210"]))
        version = client.publish(team.name(), data, description="first of all")
        assert version.name == f"{team.namespace}/math"
        assert version.reference == f"{team.namespace}/math@1"
        assert (version.version, version.digest, version.size) == (1, sha256(data), len(data))
        assert (version.kind, version.task, version.domain) == ("expert", "t2_gsm8k", "math")
        assert (version.method, version.description) == ("reinforce", "first of all")
        assert (version.base_model, version.base_fingerprint) == (team.model, team.fingerprint)
        assert (version.matrices, version.values, version.training_docs) == (3, 15, 2)
        assert (version.aliases, version.metrics, version.deleted_at) == ((), {}, None)
        assert version.created
        assert abs(datetime.now(UTC) - version.created_at) < timedelta(minutes=5)
        source, _, subject = version.created_by.partition(":")
        assert source in ("embedded", "api")
        assert subject

    def test_versions_are_numbered_from_one(self, client: RegistryClient, team: Team) -> None:
        assert [client.publish(team.name(), team.file(seed)).version for seed in range(3)] == [1, 2, 3]
        assert client.publish(team.name("other"), team.file(7)).version == 1

    def test_the_same_content_again_is_the_version_that_is_there(self, client: RegistryClient, team: Team) -> None:
        first = client.publish(team.name(), team.file(0))
        client.publish(team.name(), team.file(1))
        again = client.publish(team.name(), team.file(0), description="another note")
        assert again == first.model_copy(update={"created": False})
        assert client.get_expert(team.name()).versions == 2

    def test_the_same_content_may_have_two_names(self, client: RegistryClient, team: Team) -> None:
        one, two = (client.publish(team.name(name), team.file()) for name in ("one", "two"))
        assert one.digest == two.digest
        assert two.created

    def test_a_key_makes_an_upload_happen_once(self, client: RegistryClient, team: Team) -> None:
        first = client.publish(team.name(), team.file(0), description="a", idempotency_key=f"{team.namespace}-1")
        client.publish(team.name(), team.file(1))
        again = client.publish(team.name(), team.file(0), description="a", idempotency_key=f"{team.namespace}-1")
        assert again == first
        found = client.publish(team.name(), team.file(1), idempotency_key=f"{team.namespace}-2")
        assert not found.created
        assert client.publish(team.name(), team.file(1), idempotency_key=f"{team.namespace}-2") == found

    def test_a_key_is_for_one_upload(self, client: RegistryClient, team: Team) -> None:
        key = f"{team.namespace}-1"
        client.publish(team.name(), team.file(0), description="a", idempotency_key=key)
        for name, data, description in [
            (team.name("other"), team.file(0), "a"),
            (team.name(), team.file(1), "a"),
            (team.name(), team.file(0), "b"),
        ]:
            with pytest.raises(ConflictError, match="idempotency key was used for another upload"):
                client.publish(name, data, description=description, idempotency_key=key)
        assert client.get_expert(team.name()).versions == 1
        with pytest.raises(NotFoundError):
            client.get_expert(team.name("other"))

    @pytest.mark.parametrize("key", ["", "two words", "x" * 101, "tür", "a\nb"])
    def test_a_key_is_plain(self, client: RegistryClient, team: Team, key: str) -> None:
        with pytest.raises(InvalidRequestError, match="idempotency key"):
            client.publish(team.name(), team.file(), idempotency_key=key)

    def test_a_file_that_breaks_the_profile_is_refused(self, client: RegistryClient, team: Team) -> None:
        good = team.file()
        for bad in (b"", b"x", good[:-1], good + b"\0", good[:8], b"\xff" * 200):
            with pytest.raises(InvalidRequestError):
                client.publish(team.name(), bad)
        with pytest.raises(NotFoundError):
            client.get_expert(team.name())

    def test_a_file_over_the_limit_is_refused(self, client: RegistryClient, team: Team) -> None:
        with pytest.raises(TooLargeError, match=str(LIMITS.upload_bytes)):
            client.publish(team.name(), bytes(LIMITS.upload_bytes + 1))
        assert client.publish(team.name(), team.file(matrices=8, rank=6000)).size > LIMITS.upload_bytes * 0.9

    @pytest.mark.parametrize("bad", ["x" * 201, "nul \x00"])
    def test_labels_have_limits(self, client: RegistryClient, team: Team, bad: str) -> None:
        for field in ("task", "domain", "method"):
            fields: dict[str, Any] = {field: bad}
            with pytest.raises(InvalidRequestError, match=f"manifest field {field}"):
                client.publish(team.name(), team.file(**fields))
        base = BaseModelRef(id=team.model, revision=bad, fingerprint=team.fingerprint)
        with pytest.raises(InvalidRequestError, match=r"manifest field base\.revision"):
            client.publish(team.name(), team.file(base=base))
        assert client.publish(team.name(), team.file(task="x" * 200)).task == "x" * 200

    @pytest.mark.parametrize("bad", ["x" * 2001, "é" * 1001, "😀" * 4000, "nul \x00"])
    def test_a_description_has_limits(self, client: RegistryClient, team: Team, bad: str) -> None:
        with pytest.raises(InvalidRequestError, match="description"):
            client.publish(team.name(), team.file(), description=bad)

    def test_a_description_is_any_text(self, client: RegistryClient, team: Team) -> None:
        text = "Zeile 1\nline 2 — 数学 & 50% + #1?" + "😀" * 480
        assert client.publish(team.name(), team.file(), description=text).description == text

    @pytest.mark.parametrize(("namespace", "name"), [("Team", "x"), ("..", "x"), ("t", "a b"), ("t", ""), ("t", "a/b")])
    def test_a_name_follows_the_rules(self, client: RegistryClient, team: Team, namespace: str, name: str) -> None:
        with pytest.raises(InvalidRequestError, match="does not match"):
            client.publish(ExpertName(namespace, name), team.file())

    def test_a_name_keeps_its_kind(self, client: RegistryClient, team: Team) -> None:
        client.publish(team.name(), team.file(0))
        with pytest.raises(ConflictError, match="is of kind expert, the file of kind classifier"):
            client.publish(team.name(), team.file(1, kind="classifier"))

    def test_what_was_deleted_is_restored_and_not_uploaded_again(self, client: RegistryClient, team: Team) -> None:
        client.publish(team.name(), team.file(0))
        client.delete(team.name(), 1)
        with pytest.raises(ConflictError, match="restore it"):
            client.publish(team.name(), team.file(0))
        client.publish(team.name(), team.file(1))
        client.delete(team.name())
        with pytest.raises(ConflictError, match="restore it"):
            client.publish(team.name(), team.file(2))

    def test_ranks_agree_with_the_base_model(self, client: RegistryClient, team: Team) -> None:
        ranks = {f"model.layers.{layer}.mlp.up_proj.weight": 8 for layer in range(4)}
        client.put_base_model(team.fingerprint, team.model, None, ranks)
        assert client.publish(team.name(), team.file(0, matrices=3)).version == 1
        for bad in (team.file(1, rank=7), team.file(1, matrices=5)):
            with pytest.raises(InvalidRequestError, match="does not fit its base model"):
                client.publish(team.name("odd"), bad)
        with pytest.raises(NotFoundError):
            client.get_expert(team.name("odd"))


class TestTogether:
    """Several at once, by one client in many threads."""

    def test_the_same_content_becomes_one_version(self, client: RegistryClient, team: Team) -> None:
        got = together(8, lambda _: client.publish(team.name(), team.file()))
        assert {version.version for version in got} == {1}
        assert sum(version.created for version in got) == 1
        assert [item.version for item in client.list_versions(team.name()).items] == [1]

    def test_different_contents_get_different_numbers(self, client: RegistryClient, team: Team) -> None:
        got = together(8, lambda i: client.publish(team.name(), team.file(i)))
        assert sorted(version.version for version in got) == list(range(1, 9))
        for i, version in enumerate(got):
            assert client.download(version.digest) == team.file(i)
        expert = client.get_expert(team.name())
        assert expert.versions == 8
        assert expert.latest is not None
        assert expert.latest.version == 8

    def test_one_key_makes_one_version(self, client: RegistryClient, team: Team) -> None:
        got = together(8, lambda _: client.publish(team.name(), team.file(), idempotency_key=team.namespace))
        assert len({version.model_dump_json() for version in got}) == 1

    def test_one_key_for_many_names_serves_one(self, client: RegistryClient, team: Team) -> None:
        def publish(i: int) -> str:
            try:
                client.publish(team.name(f"n{i}"), team.file(), idempotency_key=team.namespace)
            except ConflictError:
                return "conflict"
            return "done"

        assert sorted(together(6, publish)) == ["conflict"] * 5 + ["done"]
        assert len(client.list_experts(ExpertQuery(namespace=team.namespace)).items) == 1

    def test_an_alias_has_one_history(self, client: RegistryClient, team: Team) -> None:
        for seed in range(4):
            client.publish(team.name(), team.file(seed))
        together(8, lambda i: client.set_alias(team.name(), "best", i % 4 + 1))
        events = client.alias_history(team.name()).items[::-1]
        assert [event.previous for event in events] == [None, *(event.version for event in events[:-1])]
        assert client.list_aliases(team.name())[0].version == events[-1].version

    def test_no_alias_points_to_what_is_deleted(self, client: RegistryClient, team: Team) -> None:
        for round_ in range(3):
            version = client.publish(team.name(), team.file(round_)).version

            def race(i: int, version: int = version) -> None:
                try:
                    if i % 2:
                        client.delete(team.name(), version)
                    else:
                        client.set_alias(team.name(), f"a{i}", version)
                except (ConflictError, NotFoundError):
                    pass

            together(4, race)
            (row,) = (each for each in client.list_versions(team.name()).items if each.version == version)
            assert (row.deleted_at is None) == bool(row.aliases)

    def test_points_arrive_once(self, client: RegistryClient, team: Team) -> None:
        client.publish(team.name(), team.file())
        added = together(6, lambda i: client.add_points(team.name(), 1, points(100, start=50 * (i % 2))))
        assert sum(added) == 150
        assert client.curve(team.name(), 1).total == 150

    def test_deleting_and_restoring_keeps_count(self, client: RegistryClient, team: Team) -> None:
        for seed in range(4):
            client.publish(team.name(), team.file(seed))

        def race(i: int) -> None:
            for _ in range(3):
                try:
                    client.delete(team.name(), i % 2 + 1)
                except NotFoundError:
                    client.restore(team.name(), i % 2 + 1)

        together(4, race)
        live = [item.version for item in client.list_versions(team.name()).items if item.deleted_at is None]
        assert client.get_expert(team.name()).versions == len(live)


def together(count: int, action: Callable[[int], T]) -> list[T]:
    """Run the action in so many threads at once."""
    barrier = threading.Barrier(count)

    def run(i: int) -> T:
        barrier.wait(30)
        return action(i)

    with ThreadPoolExecutor(count) as pool:
        return list(pool.map(run, range(count)))


class TestExperts:
    def test_an_expert_tells_its_latest_version(self, client: RegistryClient, team: Team) -> None:
        first = client.publish(team.name(), team.file(0))
        second = client.publish(team.name(), team.file(1, task="t2_math", domain=None))
        expert = client.get_expert(team.name())
        assert (expert.name, expert.kind, expert.versions) == (str(team.name()), "expert", 2)
        assert (expert.description, expert.tags, expert.deleted_at) == ("", (), None)
        assert expert.latest == second
        assert expert.created_at <= first.created_at
        assert expert.updated_at >= second.created_at - timedelta(seconds=1)

    def test_an_expert_that_is_not_there(self, client: RegistryClient, team: Team) -> None:
        for name in (team.name("none"), ExpertName("..", ".."), ExpertName("A", "b/c")):
            for ask in (
                client.get_expert,
                client.list_versions,
                client.list_aliases,
                client.alias_history,
                client.delete,
                client.restore,
                lambda name: client.describe_expert(name, "x"),
                lambda name: client.change_tags(name, add=["x"]),
                lambda name: client.set_metrics(name, 1, {"a": 1.0}),
                lambda name: client.set_alias(name, "best", 1),
                lambda name: client.delete_alias(name, "best"),
                lambda name: client.add_points(name, 1, points(1)),
                lambda name: client.curve(name, 1),
            ):
                with pytest.raises(NotFoundError, match="expert"):
                    ask(name)

    @pytest.mark.parametrize("number", [0, -1, 2, 2**31, 2**70])
    def test_a_version_that_is_not_there(self, client: RegistryClient, team: Team, number: int) -> None:
        client.publish(team.name(), team.file())
        for ask in (
            lambda: client.set_metrics(team.name(), number, {"a": 1.0}),
            lambda: client.set_alias(team.name(), "best", number),
            lambda: client.delete(team.name(), number),
            lambda: client.restore(team.name(), number),
            lambda: client.add_points(team.name(), number, points(1)),
            lambda: client.curve(team.name(), number),
        ):
            with pytest.raises(NotFoundError, match="version"):
                ask()

    def test_a_description_is_set(self, client: RegistryClient, team: Team) -> None:
        client.publish(team.name(), team.file())
        assert client.describe_expert(team.name(), "solves sums ✓").description == "solves sums ✓"
        assert client.get_expert(team.name()).description == "solves sums ✓"
        for bad in ("x" * 4001, "\x00"):
            with pytest.raises(InvalidRequestError, match="description"):
                client.describe_expert(team.name(), bad)

    def test_tags_are_added_and_removed(self, client: RegistryClient, team: Team) -> None:
        client.publish(team.name(), team.file())
        assert client.change_tags(team.name(), add=["lang=en", "b", "A/1", "b"]).tags == ("A/1", "b", "lang=en")
        assert client.change_tags(team.name(), add=["c"], remove=["b", "never-there"]).tags == ("A/1", "c", "lang=en")
        assert client.get_expert(team.name()).tags == ("A/1", "c", "lang=en")

    @pytest.mark.parametrize("tag", ["", "two words", "x" * 101, "-x", "ü", "a\n"])
    def test_a_tag_follows_the_rules(self, client: RegistryClient, team: Team, tag: str) -> None:
        client.publish(team.name(), team.file())
        with pytest.raises(InvalidRequestError, match=r"tag|add"):
            client.change_tags(team.name(), add=["fine", tag])
        assert client.get_expert(team.name()).tags == ()

    def test_tags_have_a_limit(self, client: RegistryClient, team: Team) -> None:
        client.publish(team.name(), team.file())
        client.change_tags(team.name(), add=[f"t{i}" for i in range(50)])
        with pytest.raises(InvalidRequestError, match="50 tags"):
            client.change_tags(team.name(), add=["more"])
        assert len(client.get_expert(team.name()).tags) == 50


class TestLists:
    @pytest.fixture
    def some(self, client: RegistryClient, team: Team) -> Sequence[Version]:
        """Four experts: a, b and c of kind expert, d a mixture of another base model."""
        other = BaseModelRef(id=f"{team.model}-2", fingerprint=sha256(team.fingerprint.encode()))
        made = [
            client.publish(team.name("a"), team.file(0, task="t2_gsm8k", domain="math")),
            client.publish(team.name("b"), team.file(1, task="t2_mbpp", domain="code")),
            client.publish(team.name("c"), team.file(2, task=None, domain=None)),
            client.publish(team.name("d"), team.file(3, kind="mixture", domain="code", task="t2_mbpp", base=other)),
        ]
        client.change_tags(team.name("a"), add=["x", "y"])
        client.change_tags(team.name("b"), add=["y"])
        client.set_metrics(team.name("a"), 1, {VALIDATION_SCORE: 0.5, "loss:dev": -2.0})
        client.set_metrics(team.name("b"), 1, {VALIDATION_SCORE: 0.75, "loss:dev": 1e-300})
        client.describe_expert(team.name("c"), "100% of Ünïcode_sums/day")
        return made

    def test_a_query_narrows(self, client: RegistryClient, team: Team, some: Sequence[Version]) -> None:
        cases: list[tuple[dict[str, Any], str]] = [
            ({}, "abcd"),
            ({"kind": "expert"}, "abc"),
            ({"kind": "mixture"}, "d"),
            ({"kind": "classifier"}, ""),
            ({"task": "t2_mbpp"}, "bd"),
            ({"domain": "math"}, "a"),
            ({"domain": "code", "kind": "expert"}, "b"),
            ({"tags": ("y",)}, "ab"),
            ({"tags": ("x", "y")}, "a"),
            ({"tags": ("z",)}, ""),
            ({"text": "GSM8K"}, "a"),
            ({"text": "% of ünï"}, "c"),
            ({"text": "_sums/"}, "c"),
            ({"text": "1_0%"}, ""),
            ({"text": "-z"}, ""),
            ({"metrics": (MetricRange(name=VALIDATION_SCORE),)}, "ab"),
            ({"metrics": (MetricRange(name=VALIDATION_SCORE, minimum=0.75),)}, "b"),
            ({"metrics": (MetricRange(name=VALIDATION_SCORE, maximum=0.5),)}, "a"),
            ({"metrics": (MetricRange(name=VALIDATION_SCORE, minimum=0.5, maximum=0.75),)}, "ab"),
            ({"metrics": (MetricRange(name="loss:dev", maximum=-1.5), MetricRange(name=VALIDATION_SCORE))}, "a"),
            ({"metrics": (MetricRange(name="loss:dev", minimum=1e-300),)}, "b"),
            ({"metrics": (MetricRange(name="other"),)}, ""),
            ({"deleted": True}, ""),
        ]
        for query, found in cases:
            page = client.list_experts(ExpertQuery(namespace=team.namespace, sort="name", **query))
            assert "".join(item.name[-1] for item in page.items) == found, query
        for field in ("text", "task", "domain", "base"):
            with pytest.raises(InvalidRequestError):
                client.list_experts(ExpertQuery.model_validate({field: "nul \x00"}))

    def test_a_base_model_is_named_by_id_or_fingerprint(
        self, client: RegistryClient, team: Team, some: Sequence[Version]
    ) -> None:
        for base, found in [(team.model, "abc"), (team.fingerprint, "abc"), (some[3].base_model, "d"), ("none", "")]:
            page = client.list_experts(ExpertQuery(base=base, sort="name"))
            assert "".join(item.name[-1] for item in page.items) == found

    def test_conditions_are_about_the_latest_version(
        self, client: RegistryClient, team: Team, some: Sequence[Version]
    ) -> None:
        client.publish(team.name("a"), team.file(10, task="t2_new", domain="new"))
        for query in (
            ExpertQuery(namespace=team.namespace, domain="math"),
            ExpertQuery(namespace=team.namespace, task="t2_gsm8k"),
            ExpertQuery(namespace=team.namespace, metrics=(MetricRange(name="loss:dev", maximum=0.0),)),
        ):
            assert client.list_experts(query).items == []
        client.delete(team.name("a"), 2)
        assert len(client.list_experts(ExpertQuery(namespace=team.namespace, domain="math")).items) == 1

    def test_orders(self, client: RegistryClient, team: Team, some: Sequence[Version]) -> None:
        client.describe_expert(team.name("b"), "the last one changed")
        for sort, found in [
            ("name", "abcd"),
            ("-name", "dcba"),
            ("created", "abcd"),
            ("-created", "dcba"),
            ("-updated", "bcad"),
            ("updated", "dacb"),
            ("-score", "ba"),
            ("score", "ab"),
        ]:
            query = ExpertQuery(namespace=team.namespace, sort=sort)  # type: ignore[arg-type]
            for limit in (1, 3, 50):
                pages = walk(lambda cursor, n, q=query: client.list_experts(q, cursor=cursor, limit=n), limit)  # type: ignore[misc]
                assert "".join(item.name[-1] for page in pages for item in page) == found, (sort, limit)
                assert all(len(page) == limit for page in pages[:-1])

    def test_without_a_query_the_last_changed_comes_first(self, client: RegistryClient, team: Team) -> None:
        client.publish(team.name(), team.file())
        assert client.list_experts(limit=1).items[0].name == str(team.name())

    def test_pages_stand_still_while_experts_are_added(self, client: RegistryClient, team: Team) -> None:
        for i in range(9):
            client.publish(team.name(f"e{i}"), team.file(i))
        query = ExpertQuery(namespace=team.namespace)
        first = client.list_experts(query, limit=4)
        client.publish(team.name("new"), team.file(100))
        second = client.list_experts(query, cursor=first.next, limit=4)
        client.publish(team.name("newer"), team.file(101))
        third = client.list_experts(query, cursor=second.next, limit=4)
        seen = [item.name.rpartition("/")[2] for page in (first, second, third) for item in page.items]
        assert seen == [f"e{i}" for i in range(8, -1, -1)]
        assert third.next is None

    def test_a_last_page_that_is_full_has_no_next(self, client: RegistryClient, team: Team) -> None:
        for i in range(4):
            client.publish(team.name(), team.file(i))
        page = client.list_versions(team.name(), limit=2)
        assert page.next is not None
        assert client.list_versions(team.name(), cursor=page.next, limit=2).next is None

    def test_a_cursor_belongs_to_its_query(self, client: RegistryClient, team: Team) -> None:
        for i in range(3):
            client.publish(team.name(f"e{i}"), team.file(i))
            client.publish(team.name(), team.file(i))
        cursor = client.list_experts(ExpertQuery(namespace=team.namespace), limit=1).next
        versions = client.list_versions(team.name(), limit=1).next
        for ask in (
            lambda: client.list_experts(cursor=cursor),
            lambda: client.list_experts(ExpertQuery(namespace=team.namespace, sort="name"), cursor=cursor),
            lambda: client.list_versions(team.name(), cursor=cursor),
            lambda: client.list_versions(team.name("e0"), cursor=versions),
            lambda: client.search_versions(VersionQuery(), cursor=versions),
            lambda: client.audit(cursor=cursor),
            lambda: client.list_namespaces(cursor=cursor),
            lambda: client.list_base_models(cursor=cursor),
            lambda: client.alias_history(team.name(), cursor=versions),
        ):
            with pytest.raises(InvalidRequestError, match="cursor: it belongs to another query"):
                ask()

    @pytest.mark.parametrize("cursor", ["", "x", "!!!", "é", "bnVsbA", "W10", "A" * 3000])
    def test_a_damaged_cursor_is_told(self, client: RegistryClient, cursor: str) -> None:
        with pytest.raises(InvalidRequestError, match="cursor"):
            client.list_experts(cursor=cursor)

    @pytest.mark.parametrize("limit", [0, -1, MAX_PAGE + 1, 10**12])
    def test_a_page_has_limits(self, client: RegistryClient, team: Team, limit: int) -> None:
        client.publish(team.name(), team.file())
        for ask in (
            client.list_experts,
            client.audit,
            client.list_namespaces,
            client.list_base_models,
            lambda limit: client.list_versions(team.name(), limit=limit),
            lambda limit: client.search_versions(VersionQuery(), limit=limit),
            lambda limit: client.alias_history(team.name(), limit=limit),
        ):
            with pytest.raises(InvalidRequestError, match="limit"):
                ask(limit=limit)

    def test_deep_in_a_long_list(self, client: RegistryClient, team: Team) -> None:
        for i in range(39):
            client.publish(team.name(), team.file(i, matrices=1, rank=1))
        pages = walk(lambda cursor, limit: client.list_versions(team.name(), cursor=cursor, limit=limit), 7)
        assert [item.version for page in pages for item in page] == list(range(39, 0, -1))
        assert [len(page) for page in pages] == [7] * 5 + [4]

    def test_the_deleted_are_a_list_of_their_own(
        self, client: RegistryClient, team: Team, some: Sequence[Version]
    ) -> None:
        client.delete(team.name("b"))
        (gone,) = client.list_experts(ExpertQuery(namespace=team.namespace, deleted=True)).items
        assert gone.name == str(team.name("b"))
        assert gone.deleted_at is not None
        left = client.list_experts(ExpertQuery(namespace=team.namespace, sort="name")).items
        assert "".join(item.name[-1] for item in left) == "acd"


class TestVersions:
    def test_they_come_newest_first_with_the_deleted(self, client: RegistryClient, team: Team) -> None:
        for seed in range(3):
            client.publish(team.name(), team.file(seed))
        client.delete(team.name(), 2)
        items = client.list_versions(team.name()).items
        assert [(item.version, item.deleted_at is None) for item in items] == [(3, True), (2, False), (1, True)]

    def test_search(self, client: RegistryClient, team: Team) -> None:
        a1 = client.publish(team.name("a"), team.file(0, domain="math"))
        a2 = client.publish(team.name("a"), team.file(1, domain="code"))
        b1 = client.publish(team.name("b"), team.mixture(2, {a1.digest: 1.0}, domain="math"))
        c1 = client.publish(team.name("c"), team.file(0, domain="math"))
        client.set_alias(team.name("a"), team.namespace, 1)
        client.set_alias(team.name("b"), team.namespace, 1)

        def search(**query: Any) -> list[str]:
            return [item.reference for item in client.search_versions(VersionQuery(**query)).items]

        everything = [c1.reference, b1.reference, a2.reference, a1.reference]
        assert search(fingerprint=team.fingerprint) == everything
        assert search(fingerprint=team.fingerprint, kind="mixture") == [b1.reference]
        assert search(fingerprint=team.fingerprint, domain="math") == [c1.reference, b1.reference, a1.reference]
        assert search(digest=a1.digest) == [c1.reference, a1.reference]
        assert search(alias=team.namespace) == [b1.reference, a1.reference]
        assert search(alias=team.namespace, kind="expert", fingerprint=team.fingerprint) == [a1.reference]
        assert search(fingerprint="0" * 64) == []
        pages = walk(
            lambda cursor, limit: client.search_versions(
                VersionQuery(fingerprint=team.fingerprint), cursor=cursor, limit=limit
            ),
            3,
        )
        assert [item.reference for page in pages for item in page] == everything
        client.delete(team.name("a"), 2)
        client.delete(team.name("c"))
        assert search(fingerprint=team.fingerprint) == [b1.reference, a1.reference]
        assert search(digest=a1.digest) == [a1.reference]

    def test_metrics_are_set_one_by_one(self, client: RegistryClient, team: Team) -> None:
        client.publish(team.name(), team.file())
        client.set_metrics(team.name(), 1, {"a": 1, "acc,none@5/x:y-z.w": -0.1})
        version = client.set_metrics(team.name(), 1, {"a": 1e308, "b": 5e-324})
        assert version.metrics == {"a": 1e308, "acc,none@5/x:y-z.w": -0.1, "b": 5e-324}
        assert client.list_versions(team.name()).items[0] == version
        client.publish(team.name(), team.file(1))
        assert client.list_versions(team.name()).items[0].metrics == {}

    @pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
    def test_metrics_are_finite(self, client: RegistryClient, team: Team, value: float) -> None:
        client.publish(team.name(), team.file())
        with pytest.raises(InvalidRequestError, match="finite"):
            client.set_metrics(team.name(), 1, {"fine": 1.0, "odd": value})
        assert client.list_versions(team.name()).items[0].metrics == {}

    @pytest.mark.parametrize("name", ["", " ", "-a", "x" * 101, "é", "a\n"])
    def test_metrics_have_names(self, client: RegistryClient, team: Team, name: str) -> None:
        client.publish(team.name(), team.file())
        with pytest.raises(InvalidRequestError):
            client.set_metrics(team.name(), 1, {name: 1.0})

    def test_metrics_have_a_limit(self, client: RegistryClient, team: Team) -> None:
        client.publish(team.name(), team.file())
        client.set_metrics(team.name(), 1, {f"m{i}": float(i) for i in range(100)})
        client.set_metrics(team.name(), 1, {"m0": 7.0})
        with pytest.raises(InvalidRequestError, match="100 metrics"):
            client.set_metrics(team.name(), 1, {"more": 1.0})

    def test_content_comes_back(self, client: RegistryClient, team: Team) -> None:
        data = team.file()
        version = client.publish(team.name(), data)
        assert client.download(version.digest) == data
        assert decode_expert(client.download(version.digest), "it").digest == version.digest

    @pytest.mark.parametrize("digest", ["0" * 64, "", "..", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 65, "é"])
    def test_content_that_is_not_there(self, client: RegistryClient, digest: str) -> None:
        with pytest.raises(NotFoundError):
            client.download(digest)

    def test_content_of_deleted_versions_is_not_given(self, client: RegistryClient, team: Team) -> None:
        digest = client.publish(team.name(), team.file()).digest
        client.publish(team.name("other"), team.file())
        client.delete(team.name(), 1)
        client.download(digest)
        client.delete(team.name("other"))
        with pytest.raises(NotFoundError):
            client.download(digest)
        client.restore(team.name("other"))
        assert client.download(digest) == team.file()


class TestResolve:
    def test_every_form(self, client: RegistryClient, team: Team) -> None:
        one, two, three = (client.publish(team.name(), team.file(seed)) for seed in range(3))
        client.set_alias(team.name(), "staging", 1)
        name = str(team.name())
        assert self._number(client, name) == 3
        client.set_alias(team.name(), "production", 2)
        assert self._number(client, name) == 2
        assert self._number(client, f"{name}@staging") == 1
        assert self._number(client, f"{name}@3") == 3
        assert self._number(client, f"{name}@sha256:{one.digest}") == 1
        assert self._number(client, f"@sha256:{two.digest}") == 2
        assert client.resolve(parse_reference(name)).aliases == ("production",)
        assert three.aliases == ()

    def test_it_tells_the_manifest_without_the_training_docs(self, client: RegistryClient, team: Team) -> None:
        data = team.file(training={"steps": 7, "nested": {"rate": 0.1}}, training_docs=pack_hashes(["0123456789ab"]))
        version = client.publish(team.name(), data)
        detail = client.resolve(parse_reference(f"{team.name()}@1"))
        expected = decode_expert(data, "it").manifest.model_dump(mode="json", exclude={"training_docs"})
        assert detail.manifest == expected
        assert Version(**detail.model_dump(exclude={"manifest"})) == version

    def test_by_bare_digest_it_tells_the_first_upload(self, client: RegistryClient, team: Team) -> None:
        first = client.publish(team.name("b"), team.file())
        client.publish(team.name("a"), team.file())
        bare = Reference(None, digest=first.digest)
        assert client.resolve(bare).name == first.name
        client.delete(team.name("b"))
        assert client.resolve(bare).name == str(team.name("a"))
        client.delete(team.name("a"), 1)
        with pytest.raises(NotFoundError):
            client.resolve(bare)

    def test_what_does_not_exist(self, client: RegistryClient, team: Team) -> None:
        other = client.publish(team.name("other"), team.file(5))
        client.publish(team.name(), team.file())
        client.set_alias(team.name(), "production", 1)
        name = str(team.name())
        for reference, message in [
            (f"{team.namespace}/none", "there is no expert"),
            (f"{name}@2", "there is no version 2"),
            (f"{name}@prodction", "did you mean 'production'"),
            (f"{name}@sha256:{other.digest}", "there is no version"),
            (f"@sha256:{'0' * 64}", "there is no version"),
        ]:
            with pytest.raises(NotFoundError, match=message):
                client.resolve(parse_reference(reference))

    def test_what_is_deleted(self, client: RegistryClient, team: Team) -> None:
        for seed in range(3):
            client.publish(team.name(), team.file(seed))
        name = str(team.name())
        client.delete(team.name(), 3)
        assert self._number(client, name) == 2
        with pytest.raises(NotFoundError, match="is deleted; it can be restored"):
            client.resolve(parse_reference(f"{name}@3"))
        client.delete(team.name(), 2)
        client.delete(team.name(), 1)
        with pytest.raises(NotFoundError, match=r"all versions of .* are deleted"):
            client.resolve(parse_reference(name))
        client.delete(team.name())
        with pytest.raises(NotFoundError, match="is deleted; it can be restored"):
            client.resolve(parse_reference(name))

    @staticmethod
    def _number(client: RegistryClient, reference: str) -> int:
        return client.resolve(parse_reference(reference)).version


class TestAliases:
    def test_they_move_and_remember(self, client: RegistryClient, team: Team) -> None:
        versions = [client.publish(team.name(), team.file(seed)) for seed in range(2)]
        set_ = client.set_alias(team.name(), "best", 1, reason="first try")
        assert (set_.alias, set_.version, set_.digest) == ("best", 1, versions[0].digest)
        client.set_alias(team.name(), "best", 2, reason="0.7 → 0.8")
        client.set_alias(team.name(), "best", 2, reason="nothing new")
        client.set_alias(team.name(), "a", 1)
        client.delete_alias(team.name(), "best", reason="broken")
        assert [(each.alias, each.version) for each in client.list_aliases(team.name())] == [("a", 1)]
        history = client.alias_history(team.name(), "best").items
        assert [(e.version, e.previous, e.reason) for e in history] == [
            (None, 2, "broken"),
            (2, 1, "0.7 → 0.8"),
            (1, None, "first try"),
        ]
        assert all(event.alias == "best" and event.by and event.at.tzinfo is not None for event in history)
        assert [event.alias for event in client.alias_history(team.name()).items] == ["best", "a", "best", "best"]
        assert client.alias_history(team.name(), "never").items == []

    def test_a_history_has_pages(self, client: RegistryClient, team: Team) -> None:
        for seed in range(2):
            client.publish(team.name(), team.file(seed))
        for i in range(7):
            client.set_alias(team.name(), "best", i % 2 + 1, reason=str(i))
        pages = walk(lambda cursor, n: client.alias_history(team.name(), "best", cursor=cursor, limit=n), 3)
        assert [event.reason for page in pages for event in page] == list("6543210")
        cursor = client.alias_history(team.name(), "best", limit=2).next
        with pytest.raises(InvalidRequestError, match="another query"):
            client.alias_history(team.name(), cursor=cursor)

    def test_versions_tell_their_aliases(self, client: RegistryClient, team: Team) -> None:
        for seed in range(2):
            client.publish(team.name(), team.file(seed))
        for alias in ("z", "a", "m.1_x-2"):
            client.set_alias(team.name(), alias, 1)
        newest, oldest = client.list_versions(team.name()).items
        assert (oldest.aliases, newest.aliases) == (("a", "m.1_x-2", "z"), ())

    @pytest.mark.parametrize("alias", ["", "1", "A", "a b", "a/b", "..", "a" * 64, "sha256:00", "é", "a\n"])
    def test_an_alias_follows_the_rules(self, client: RegistryClient, team: Team, alias: str) -> None:
        client.publish(team.name(), team.file())
        with pytest.raises(InvalidRequestError, match="alias"):
            client.set_alias(team.name(), alias, 1)
        with pytest.raises(InvalidRequestError, match="alias"):
            client.delete_alias(team.name(), alias)

    def test_an_alias_that_is_not_there(self, client: RegistryClient, team: Team) -> None:
        client.publish(team.name(), team.file())
        client.set_alias(team.name(), "production", 1)
        with pytest.raises(NotFoundError, match="did you mean 'production'"):
            client.delete_alias(team.name(), "produktion")

    def test_a_deleted_version_gets_no_alias(self, client: RegistryClient, team: Team) -> None:
        client.publish(team.name(), team.file())
        client.delete(team.name(), 1)
        with pytest.raises(NotFoundError, match="is deleted"):
            client.set_alias(team.name(), "best", 1)

    def test_a_reason_has_limits(self, client: RegistryClient, team: Team) -> None:
        client.publish(team.name(), team.file())
        client.set_alias(team.name(), "best", 1, reason="x" * 4000)
        for bad in ("x" * 4001, "\x00"):
            with pytest.raises(InvalidRequestError, match="reason"):
                client.set_alias(team.name(), "best", 1, reason=bad)
            with pytest.raises(InvalidRequestError, match="reason"):
                client.delete_alias(team.name(), "best", reason=bad)


class TestDeletion:
    def test_a_version_goes_and_comes_back(self, client: RegistryClient, team: Team) -> None:
        for seed in range(2):
            client.publish(team.name(), team.file(seed))
        client.delete(team.name(), 2)
        expert = client.get_expert(team.name())
        assert expert.versions == 1
        assert expert.latest is not None
        assert expert.latest.version == 1
        with pytest.raises(NotFoundError, match="is deleted"):
            client.delete(team.name(), 2)
        client.restore(team.name(), 2)
        client.restore(team.name(), 2)
        expert = client.get_expert(team.name())
        assert expert.versions == 2
        assert expert.latest is not None
        assert expert.latest.version == 2
        client.delete(team.name(), 2)
        assert client.publish(team.name(), team.file(7)).version == 3

    def test_a_version_with_an_alias_stays(self, client: RegistryClient, team: Team) -> None:
        client.publish(team.name(), team.file())
        client.set_alias(team.name(), "best", 1)
        with pytest.raises(ConflictError, match="alias best"):
            client.delete(team.name(), 1)
        client.delete_alias(team.name(), "best")
        client.delete(team.name(), 1)
        assert client.get_expert(team.name()).latest is None

    def test_an_expert_goes_and_comes_back_with_everything(self, client: RegistryClient, team: Team) -> None:
        for seed in range(2):
            client.publish(team.name(), team.file(seed))
        client.set_alias(team.name(), "best", 1)
        client.change_tags(team.name(), add=["x"])
        client.set_metrics(team.name(), 1, {"a": 1.0})
        client.add_points(team.name(), 1, points(3))
        before = client.get_expert(team.name())
        client.delete(team.name())
        for ask in (
            client.get_expert,
            client.list_versions,
            client.list_aliases,
            client.delete,
            lambda name: client.curve(name, 1),
            lambda name: client.set_alias(name, "best", 2),
            lambda name: client.restore(name, 1),
        ):
            with pytest.raises(NotFoundError, match="is deleted"):
                ask(team.name())
        client.restore(team.name())
        client.restore(team.name())
        after = client.get_expert(team.name())
        assert after.model_dump(exclude={"updated_at"}) == before.model_dump(exclude={"updated_at"})
        assert [item.metrics for item in client.list_versions(team.name()).items] == [{}, {"a": 1.0}]
        assert client.curve(team.name(), 1).total == 3

    def test_nothing_of_a_deleted_version_is_changed(self, client: RegistryClient, team: Team) -> None:
        client.publish(team.name(), team.file())
        client.delete(team.name(), 1)
        for ask in (
            lambda: client.set_metrics(team.name(), 1, {"a": 1.0}),
            lambda: client.add_points(team.name(), 1, points(1)),
            lambda: client.curve(team.name(), 1),
        ):
            with pytest.raises(NotFoundError, match="is deleted"):
                ask()


class TestCurves:
    def test_points_come_back_in_order(self, client: RegistryClient, team: Team) -> None:
        client.publish(team.name(), team.file())
        train, validation = points(20), points(4, "validation", start=5)
        assert client.add_points(team.name(), 1, train[10:]) == 10
        assert client.add_points(team.name(), 1, validation + train) == 14
        assert client.add_points(team.name(), 1, train) == 0
        assert client.add_points(team.name(), 1, []) == 0
        curve = client.curve(team.name(), 1)
        assert curve.total == 24
        assert list(curve.points) == sorted(train + validation, key=lambda point: (point.step, point.split))
        assert client.curve(team.name(), 1, split="validation").points == tuple(validation)
        assert client.curve(team.name(), 1, split="validation").total == 4

    def test_a_point_never_changes(self, client: RegistryClient, team: Team) -> None:
        client.publish(team.name(), team.file())
        client.add_points(team.name(), 1, points(3))
        other = points(1)[0].model_copy(update={"score": 99.0})
        with pytest.raises(ConflictError, match="another train point at step 0"):
            client.add_points(team.name(), 1, [*points(2, start=5), other])
        assert client.curve(team.name(), 1).total == 3

    def test_all_values_are_kept(self, client: RegistryClient, team: Team) -> None:
        client.publish(team.name(), team.file())
        full = CurvePoint(
            step=2**31 - 1,
            split="train",
            reward=-1e-300,
            score=0.1 + 0.2,
            kl=5e-324,
            learning_rate=1e308,
            gradient_norm=0.0,
            seconds=1e9 + 1e-7,
        )
        client.add_points(team.name(), 1, [full])
        assert client.curve(team.name(), 1).points == (full,)

    def test_odd_points_are_refused(self, client: RegistryClient, team: Team) -> None:
        client.publish(team.name(), team.file())
        twice = points(1) + points(1)
        for bad in (twice, points(1, start=-1), points(1, start=2**31), points(1, start=2**70)):
            with pytest.raises(InvalidRequestError):
                client.add_points(team.name(), 1, bad)
        assert client.curve(team.name(), 1).points == ()

    def test_points_have_limits(self, client: RegistryClient, team: Team) -> None:
        client.publish(team.name(), team.file())
        with pytest.raises(TooLargeError, match="10001 points in one request, the limit is 10000"):
            client.add_points(team.name(), 1, points(10_001))
        assert client.add_points(team.name(), 1, points(10_000)) == 10_000
        with pytest.raises(TooLargeError, match=f"limit is {LIMITS.points}"):
            client.add_points(team.name(), 1, points(2_001, start=10_000))
        assert client.add_points(team.name(), 1, points(2_000, start=10_000)) == 2_000

    def test_downsampling_keeps_the_shape(self, client: RegistryClient, team: Team) -> None:
        client.publish(team.name(), team.file())
        train = points(1000)
        spike = train[500].model_copy(update={"reward": 50.0})
        train[500] = spike
        validation = points(10, "validation")
        client.add_points(team.name(), 1, train + validation)
        for wanted in (3, 50, 999):
            curve = client.curve(team.name(), 1, split="train", points=wanted)
            assert len(curve.points) == wanted
            assert curve.total == 1000
            assert (curve.points[0], curve.points[-1]) == (train[0], train[-1])
            assert spike in curve.points
            assert set(curve.points) <= set(train)
            assert [p.step for p in curve.points] == sorted({p.step for p in curve.points})
        both = client.curve(team.name(), 1, points=50)
        assert len(both.points) == 60
        assert both.total == 1010
        assert client.curve(team.name(), 1, points=10_000).points == client.curve(team.name(), 1).points

    def test_odd_questions_are_refused(self, client: RegistryClient, team: Team) -> None:
        client.publish(team.name(), team.file())
        for ask in (
            lambda: client.curve(team.name(), 1, points=2),
            lambda: client.curve(team.name(), 1, points=-5),
            lambda: client.curve(team.name(), 1, split="test"),
        ):
            with pytest.raises(InvalidRequestError):
                ask()


class TestLineage:
    def test_ancestors_and_descendants(self, client: RegistryClient, team: Team) -> None:
        a, b = (client.publish(team.name(name), team.file(seed)) for seed, name in enumerate("ab"))
        mix = client.publish(team.name("mix"), team.mixture(2, {a.digest: 0.25, b.digest: 0.75}))
        top = client.publish(team.name("top"), team.mixture(3, {mix.digest: 1.0, "0" * 64: -0.5}))
        tree = client.lineage(mix.digest)
        assert tree.root == mix.digest
        assert not tree.truncated
        assert tree.nodes[0].digest == mix.digest
        nodes = {node.digest: node for node in tree.nodes}
        assert nodes.keys() == {mix.digest, a.digest, b.digest, top.digest}
        assert (nodes[a.digest].references, nodes[a.digest].kind) == ((a.reference,), "expert")
        assert nodes[top.digest].kind == "mixture"
        assert {(edge.child, edge.parent): edge.alpha for edge in tree.edges} == {
            (mix.digest, a.digest): 0.25,
            (mix.digest, b.digest): 0.75,
            (top.digest, mix.digest): 1.0,
        }
        whole = {node.digest: node for node in client.lineage(top.digest).nodes}
        assert whole.keys() == {top.digest, mix.digest, "0" * 64, a.digest, b.digest}
        assert (whole["0" * 64].references, whole["0" * 64].kind) == ((), None)

    def test_a_parent_may_be_unknown_here(self, client: RegistryClient, team: Team) -> None:
        away = sha256(team.namespace.encode())
        mix = client.publish(team.name(), team.mixture(0, {away: 1.0}))
        tree = client.lineage(away)
        assert [(node.digest, node.kind) for node in tree.nodes] == [(away, None), (mix.digest, "mixture")]

    def test_every_name_of_a_content_is_told_once(self, client: RegistryClient, team: Team) -> None:
        a = client.publish(team.name("a"), team.file())
        mix = [client.publish(team.name(name), team.mixture(1, {a.digest: 1.0})) for name in ("m1", "m2")]
        tree = client.lineage(a.digest)
        assert len(tree.edges) == 1
        assert [node.references for node in tree.nodes] == [(a.reference,), tuple(each.reference for each in mix)]

    def test_a_diamond_and_a_chain_end(self, client: RegistryClient, team: Team) -> None:
        root = client.publish(team.name("r"), team.file())
        left, right = (client.publish(team.name(n), team.mixture(i, {root.digest: 1.0})) for i, n in enumerate("lx", 1))
        tip = client.publish(team.name("t"), team.mixture(3, {left.digest: 0.5, right.digest: 0.5}))
        for digest in (root.digest, tip.digest):
            tree = client.lineage(digest)
            assert len(tree.nodes) == 4
            assert len(tree.edges) == 4

    def test_a_large_family_is_cut(self, client: RegistryClient, team: Team) -> None:
        parent = client.publish(team.name("p"), team.file())
        for i in range(LIMITS.lineage_nodes):
            client.publish(team.name(f"m{i}"), team.mixture(i, {parent.digest: 1.0}))
        tree = client.lineage(parent.digest)
        assert tree.truncated
        assert len(tree.nodes) == LIMITS.lineage_nodes
        known = {node.digest for node in tree.nodes}
        assert all(edge.child in known and edge.parent in known for edge in tree.edges)
        assert len(tree.edges) == LIMITS.lineage_nodes - 1

    def test_what_is_deleted_is_not_told(self, client: RegistryClient, team: Team) -> None:
        a = client.publish(team.name("a"), team.file())
        client.publish(team.name("m"), team.mixture(1, {a.digest: 1.0}))
        client.publish(team.name("n"), team.mixture(2, {a.digest: 1.0}))
        client.delete(team.name("m"), 1)
        client.delete(team.name("n"))
        tree = client.lineage(a.digest)
        assert [node.digest for node in tree.nodes] == [a.digest]
        assert tree.edges == ()
        client.delete(team.name("a"))
        with pytest.raises(NotFoundError):
            client.lineage(a.digest)

    @pytest.mark.parametrize("digest", ["1" * 64, "", "..", "x" * 64, "é"])
    def test_what_is_not_there(self, client: RegistryClient, digest: str) -> None:
        with pytest.raises(NotFoundError):
            client.lineage(digest)


class TestNamespaces:
    def test_they_are_made_and_listed(self, client: RegistryClient, team: Team) -> None:
        made = client.create_namespace(team.namespace, "the team of ✓")
        assert (made.name, made.description) == (team.namespace, "the team of ✓")
        with pytest.raises(ConflictError, match="exists already"):
            client.create_namespace(team.namespace)
        client.publish(ExpertName(f"{team.namespace}.b", "x"), team.file())
        pages = walk(lambda cursor, limit: client.list_namespaces(cursor=cursor, limit=limit), 3)
        listed = [each for page in pages for each in page]
        names = [each.name for each in listed]
        assert names == sorted(names)
        assert made in listed
        assert f"{team.namespace}.b" in names

    @pytest.mark.parametrize("name", ["", "A", "a/b", "..", "a..b", "x" * 65, "a\n"])
    def test_a_name_follows_the_rules(self, client: RegistryClient, name: str) -> None:
        with pytest.raises(InvalidRequestError):
            client.create_namespace(name)

    def test_a_description_has_limits(self, client: RegistryClient, team: Team) -> None:
        with pytest.raises(InvalidRequestError, match="description"):
            client.create_namespace(team.namespace, "x" * 4001)


class TestBaseModels:
    def test_ranks_are_told_once(self, client: RegistryClient, team: Team) -> None:
        ranks = {"a.weight": 4, "b.weight": 2}
        made = client.put_base_model(team.fingerprint, team.model, "main", ranks)
        assert (made.fingerprint, made.id, made.revision, made.targets) == (team.fingerprint, team.model, "main", ranks)
        assert client.put_base_model(team.fingerprint, team.model, "main", ranks) == made
        assert client.get_base_model(team.fingerprint) == made
        with pytest.raises(ConflictError, match="immutable"):
            client.put_base_model(team.fingerprint, team.model, "main", {"a.weight": 4})

    def test_an_upload_makes_a_base_model_known(self, client: RegistryClient, team: Team) -> None:
        client.publish(team.name(), team.file())
        known = client.get_base_model(team.fingerprint)
        assert (known.id, known.targets) == (team.model, None)
        with pytest.raises(ConflictError, match="disagrees"):
            client.put_base_model(team.fingerprint, team.model, None, {"a.weight": 4})
        ranks = {f"model.layers.{layer}.mlp.up_proj.weight": 8 for layer in range(6)}
        assert client.put_base_model(team.fingerprint, team.model, None, ranks).targets == ranks

    def test_they_are_listed(self, client: RegistryClient, team: Team) -> None:
        fingerprints = [sha256(f"{team.namespace}{i}".encode()) for i in range(5)]
        for fingerprint in fingerprints:
            client.put_base_model(fingerprint, team.model, None, {"a": 1})
        pages = walk(lambda cursor, limit: client.list_base_models(cursor=cursor, limit=limit), 2)
        listed = [each.fingerprint for page in pages for each in page]
        assert [each for each in listed if each in fingerprints] == fingerprints

    def test_odd_ones_are_refused(self, client: RegistryClient, team: Team) -> None:
        for fingerprint, model, targets in [
            ("x", team.model, {"a": 1}),
            (team.fingerprint, "", {"a": 1}),
            (team.fingerprint, "x" * 201, {"a": 1}),
            (team.fingerprint, "nul \x00", {"a": 1}),
            (team.fingerprint, team.model, {}),
            (team.fingerprint, team.model, {"a": 0}),
        ]:
            with pytest.raises(InvalidRequestError):
                client.put_base_model(fingerprint, model, None, targets)
        with pytest.raises(NotFoundError):
            client.get_base_model(team.fingerprint)

    @pytest.mark.parametrize("fingerprint", ["0" * 64, "x", "", ".."])
    def test_one_that_is_not_there(self, client: RegistryClient, fingerprint: str) -> None:
        with pytest.raises(NotFoundError):
            client.get_base_model(fingerprint)


class TestTokens:
    def test_they_are_made_listed_and_revoked(self, client: RegistryClient, team: Team) -> None:
        made = client.create_token(team.namespace, ["write", "read"], days=1.5)
        assert made.secret.startswith("t2r_")
        assert made.secret.startswith(made.prefix)
        assert made.scopes == ("read", "write")
        assert made.expires_at is not None
        assert timedelta(days=1.4) < made.expires_at - made.created_at < timedelta(days=1.6)
        for_ever = client.create_token(team.namespace, ["admin"])
        assert for_ever.expires_at is None
        assert for_ever.secret != made.secret
        listed = {token.id: token for token in client.list_tokens()}
        assert listed[made.id].name == team.namespace
        assert listed[made.id].revoked_at is None
        assert "secret" not in listed[made.id].model_dump()
        revoked = client.revoke_token(made.id)
        assert revoked.revoked_at is not None
        assert client.revoke_token(made.id) == revoked
        client.revoke_token(for_ever.id)

    def test_odd_ones_are_refused(self, client: RegistryClient) -> None:
        for name, scopes, days in [
            ("", ["read"], None),
            ("x" * 101, ["read"], None),
            ("a\nb", ["read"], None),
            ("x", [], None),
            ("x", ["root"], None),
            ("x", ["read"], 0.0),
            ("x", ["read"], -1.0),
            ("x", ["read"], 1e9),
        ]:
            with pytest.raises(InvalidRequestError):
                client.create_token(name, scopes, days=days)  # type: ignore[arg-type]

    @pytest.mark.parametrize("id", [0, -1, 2**31 - 1, 2**31, 2**70])
    def test_one_that_is_not_there(self, client: RegistryClient, id: int) -> None:
        with pytest.raises(NotFoundError):
            client.revoke_token(id)


class TestAudit:
    def test_every_change_is_told(self, client: RegistryClient, team: Team) -> None:
        name = team.name()
        client.publish(name, team.file(0))
        client.publish(name, team.file(1))
        client.describe_expert(name, "x")
        client.change_tags(name, add=["x"])
        client.set_metrics(name, 1, {"a": 1.0})
        client.set_alias(name, "best", 1)
        client.delete_alias(name, "best")
        client.add_points(name, 1, points(2))
        client.delete(name, 1)
        client.restore(name, 1)
        client.delete(name)
        client.restore(name)
        token = client.create_token(team.namespace, ["read"])
        client.revoke_token(token.id)
        entries = [entry for entry in client.audit(limit=MAX_PAGE).items if team.namespace in entry.object][::-1]
        assert [entry.action for entry in entries] == [
            "namespace.create",
            "expert.create",
            "version.create",
            "version.create",
            "expert.describe",
            "expert.tag",
            "version.metrics",
            "alias.set",
            "alias.delete",
            "curve.add",
            "version.delete",
            "version.restore",
            "expert.delete",
            "expert.restore",
            "token.create",
            "token.revoke",
        ]
        assert [entry.id for entry in entries] == sorted(entry.id for entry in entries)
        assert all(entry.source in ("embedded", "api") and entry.subject for entry in entries)
        assert entries[2].object == f"{name}@1"
        assert token.secret not in "".join(entry.model_dump_json() for entry in entries)

    def test_what_failed_is_not_told(self, client: RegistryClient, team: Team) -> None:
        client.publish(team.name(), team.file())
        with pytest.raises(RegistryError):
            client.set_metrics(team.name(), 1, {"a": math.inf})
        with pytest.raises(RegistryError):
            client.delete(team.name(), 5)
        entries = [entry for entry in client.audit().items if team.namespace in entry.object]
        assert [entry.action for entry in entries] == ["version.create", "expert.create", "namespace.create"]

    def test_it_has_pages(self, client: RegistryClient, team: Team) -> None:
        for seed in range(3):
            client.publish(team.name(), team.file(seed))
        first = client.audit(limit=2)
        second = client.audit(cursor=first.next, limit=2)
        ids = [entry.id for page in (first, second) for entry in page.items]
        assert ids == sorted(ids, reverse=True)
        assert len(set(ids)) == 4


def test_where_it_is(client: RegistryClient) -> None:
    assert client.location
    assert "t2r_" not in client.location


@pytest.fixture(scope="module")
def measured(evaluated: Evaluated) -> dict[str, TaskResult]:
    """What lm-eval wrote of one expert, by task."""
    return {result.run.task: result for result in read_results(evaluated.expert)}


class Scored:
    """Runs of a team's own expert and base model."""

    def __init__(self, client: RegistryClient, team: Team, measured: dict[str, TaskResult]) -> None:
        self.client, self.team, self._measured = client, team, measured
        self.base = EvaluatedBase(id=team.model, fingerprint=team.fingerprint)

    def result(self, task: str = "tiny_choice", seed: int = 0, **changes: Any) -> TaskResult:
        expert = ExpertRef(name="math", digest=sha256(self.team.file(seed)), domain="math")
        return vary(self._measured[task], **{"base": self.base, "experts": (expert,), **changes})

    def push(self, task: str = "tiny_choice", seed: int = 0, **changes: Any) -> Run:
        return self.client.push_run(self.team.namespace, encode_run(self.result(task, seed, **changes)))

    def board(self, task: str = "tiny_choice", **narrower: Any) -> list[str]:
        query = BoardQuery(task=task, base=self.team.model, **narrower)
        return [entry.run.digest for entry in self.client.board(query).items]


@pytest.fixture
def scored(client: RegistryClient, team: Team, measured: dict[str, TaskResult]) -> Scored:
    return Scored(client, team, measured)


class TestRuns:
    def test_a_push_tells_everything_that_was_measured(
        self, client: RegistryClient, team: Team, scored: Scored
    ) -> None:
        version = client.publish(team.name(), team.file())
        result = scored.result()
        run = client.push_run(team.namespace, encode_run(result))
        assert run.created
        assert (run.namespace, run.digest) == (team.namespace, result.run.digest())
        assert (run.task, run.task_version, run.n_shot, run.docs) == ("tiny_choice", "1.0", 0, 12)
        assert (run.base, run.base_fingerprint) == (team.model, team.fingerprint)
        assert (run.model, run.strategy, run.control) == ("t2", "expert", "none")
        assert run.seed == result.run.seeds.get("adapt")
        assert result.run.record is not None
        assert run.record_digest == result.run.record.digest()
        assert [(expert.digest, expert.references) for expert in run.experts] == [
            (version.digest, (f"{team.namespace}/math@1",))
        ]
        first = run.scores[0]
        told = result.run.scores[0]
        assert (first.metric, first.filter, first.score, first.n) == ("acc", "none", told.score, 12)
        found = mean_interval(result.values(told))
        assert (first.low, first.high) == (found.low, found.high)
        assert found.low < found.high
        samples = client.download(run.samples_digest)
        assert samples == samples_bytes(result.samples)
        assert run.samples_size == len(samples)
        detail = client.get_run(run.namespace, run.digest)
        assert detail.header == result.run.model_dump(mode="json")
        assert detail.evaluated_at == result.run.evaluated_at
        assert client.list_runs(RunQuery(namespace=team.namespace)).items == [run]

    def test_a_perplexity_has_no_interval_of_its_samples(self, scored: Scored) -> None:
        (score,) = scored.push("tiny_rolling").scores
        assert (score.metric, score.higher_is_better, score.low, score.high) == ("word_perplexity", False, None, None)

    def test_a_plain_model_has_neither_experts_nor_a_record(
        self, client: RegistryClient, team: Team, evaluated: Evaluated
    ) -> None:
        for result in read_results(evaluated.hf):
            run = client.push_run(team.namespace, encode_run(result))
            assert (run.model, run.experts, run.record_digest, run.base_fingerprint) == ("hf", (), None, None)
        assert len(client.list_runs(RunQuery(namespace=team.namespace)).items) == 3

    def test_the_same_again_is_the_run_that_is_there(self, client: RegistryClient, team: Team, scored: Scored) -> None:
        first = scored.push()
        later = datetime(2030, 1, 1, tzinfo=UTC)
        assert scored.push(evaluated_at=later) == first.model_copy(update={"created": False})
        assert scored.push(wrong=3).digest != first.digest
        assert len(client.list_runs(RunQuery(namespace=team.namespace)).items) == 2
        elsewhere = client.push_run(f"{team.namespace}-2", encode_run(scored.result()))
        assert (elsewhere.created, elsewhere.digest) == (True, first.digest)

    def test_many_may_push_the_same_at_once(self, client: RegistryClient, team: Team, scored: Scored) -> None:
        with ThreadPoolExecutor(8) as pool:
            runs = list(pool.map(lambda _: scored.push(), range(16)))
        assert sum(run.created for run in runs) == 1
        assert len({run.digest for run in runs}) == 1
        assert scored.board() == [runs[0].digest]

    def test_what_is_no_run_or_at_odds_with_its_samples_is_refused(
        self, client: RegistryClient, team: Team, scored: Scored
    ) -> None:
        result = scored.result(wrong=6)
        good = encode_run(result)
        header = header_of(result.run).encode()
        other = scored.result(wrong=5)
        for bad in (
            b"",
            b"x",
            b"{}\n",
            good[:-1],
            good[:-30],
            good + b"\n",
            header + b"\n",
            header + b" \n" + samples_bytes(result.samples),
            header + b"\n" + samples_bytes(other.samples),
            header + b"\n" + samples_bytes(result.samples) * 2,
            header.replace(b'"score":0.5', b'"score":0.6') + b"\n" + samples_bytes(result.samples),
            header.replace(b'"docs":12', b'"docs":13') + b"\n" + samples_bytes(result.samples),
            header.replace(b'"n_shot":0', b'"n_shot":-1') + b"\n" + samples_bytes(result.samples),
            header.replace(b'"n_shot":0', b'"n_shot":0,"more":1') + b"\n" + samples_bytes(result.samples),
        ):
            with pytest.raises(InvalidRequestError):
                client.push_run(team.namespace, bad)
        with pytest.raises(TooLargeError):
            client.push_run(team.namespace, bytes(LIMITS.upload_bytes + 1))
        with pytest.raises(InvalidRequestError, match="namespace"):
            client.push_run("No", good)
        assert client.list_runs(RunQuery(namespace=team.namespace)).items == []
        assert client.push_run(team.namespace, good).created

    def test_lists_are_narrowed(self, client: RegistryClient, team: Team, scored: Scored) -> None:
        client.publish(team.name(), team.file(0))
        second = client.publish(team.name(), team.file(1))
        client.set_alias(team.name(), "production", 2)
        one, two = scored.push(seed=0), scored.push(seed=1)
        three = scored.push("tiny_text", seed=2, strategy="mix")

        def found(**query: Any) -> list[Run]:
            return client.list_runs(RunQuery(**query)).items

        assert found(namespace=team.namespace) == found(base=team.model) == [three, two, one]
        assert found(base=team.fingerprint) == [three, two, one]
        assert found(base=team.model, task="tiny_choice") == [two, one]
        assert found(base=team.model, strategy="mix") == [three]
        assert found(digest=one.digest[:12]) == found(digest=one.digest) == [one]
        assert found(expert=str(team.name())) == [two, one]
        assert found(expert=f"{team.name()}@1") == [one]
        assert found(expert=f"{team.name()}@production") == found(expert=f"@sha256:{second.digest}") == [two]
        assert found(namespace="nobody") == found(task="nothing", base=team.model) == []
        with pytest.raises(InvalidRequestError, match="expert"):
            found(expert="Not A Name")
        with pytest.raises(NotFoundError):
            found(expert=str(team.name("other")))
        pages = walk(lambda cursor, limit: client.list_runs(RunQuery(base=team.model), cursor=cursor, limit=limit), 2)
        assert pages == [[three, two], [one]]

    def test_a_deleted_run_is_gone_until_it_is_pushed_again(
        self, client: RegistryClient, team: Team, scored: Scored
    ) -> None:
        run = scored.push(docs=7)  # no other test has these samples
        client.delete_run(team.namespace, run.digest)
        with pytest.raises(NotFoundError):
            client.get_run(team.namespace, run.digest)
        with pytest.raises(NotFoundError):
            client.download(run.samples_digest)
        with pytest.raises(NotFoundError):
            client.delete_run(team.namespace, run.digest)
        with pytest.raises(NotFoundError):
            scored.board()
        assert client.list_boards(base=team.model).items == []
        assert scored.push(docs=7).created
        assert scored.board() == [run.digest]
        actions = [(entry.action, entry.object) for entry in client.audit(limit=50).items]
        told = f"{team.namespace}/runs/{run.digest}"
        assert [action for action, object_ in actions if object_ == told] == ["run.create", "run.delete", "run.create"]

    @pytest.mark.parametrize("digest", ["", "x", "ab" * 32, "../../x"])
    def test_what_is_not_there_is_not_found(self, client: RegistryClient, team: Team, digest: str) -> None:
        for namespace in (team.namespace, "No", ".."):
            with pytest.raises(NotFoundError):
                client.get_run(namespace, digest)


class TestBoards:
    def test_the_best_are_first_in_the_metrics_own_direction(self, scored: Scored) -> None:
        runs = {wrong: scored.push(wrong=wrong).digest for wrong in (7, 2, 11, 0)}
        assert scored.board() == [runs[0], runs[2], runs[7], runs[11]]
        rolling = scored.result("tiny_rolling").run.scores[0]
        scores = {
            value: scored.push("tiny_rolling", scores=(rolling.model_copy(update={"score": value}),)).digest
            for value in (12.5, 3.25, 900.0)
        }
        scored.push("tiny_rolling", scores=(rolling.model_copy(update={"score": None}),))
        assert scored.board("tiny_rolling") == [scores[3.25], scores[12.5], scores[900.0]]

    def test_pages_of_equal_scores_neither_repeat_nor_skip(
        self, client: RegistryClient, team: Team, scored: Scored
    ) -> None:
        digests = {scored.push(wrong=wrong, seed=seed).digest for wrong in (3, 4) for seed in range(3)}
        query = BoardQuery(task="tiny_choice", base=team.model)
        found, cursor = [], None
        while True:
            page = client.board(query, cursor=cursor, limit=2)
            assert len(page.items) == 2
            found += page.items
            cursor = page.next
            if cursor is None:
                break
        assert {entry.run.digest for entry in found} == digests
        assert len(found) == 6
        values = [entry.score.score for entry in found]
        assert values == sorted(values, key=lambda value: -(value or 0))
        assert (page.metric, page.filter, page.higher_is_better, page.board.runs) == ("acc", "none", True, 6)
        with pytest.raises(InvalidRequestError, match="cursor"):
            client.board(query.model_copy(update={"metric": "acc_norm"}), cursor=client.board(query, limit=2).next)

    def test_only_what_can_be_compared_is_on_one_board(
        self, client: RegistryClient, team: Team, scored: Scored
    ) -> None:
        whole = scored.push(wrong=6)
        part = scored.push(wrong=0, docs=5)
        shots = scored.push(wrong=1, n_shot=5)
        older = scored.push(wrong=2, task_version="0.9")
        assert scored.board(docs_digest=part.docs_digest) == [part.digest]
        assert scored.board(n_shot=5) == [shots.digest]
        assert scored.board(task_version="0.9") == [older.digest]
        assert scored.board(task_version="1.0", n_shot=0) == [whole.digest]
        # Of those with most documents the one with the newest run.
        assert scored.board() == [older.digest]
        boards = client.list_boards(task="tiny_choice", base=team.fingerprint).items
        assert [(each.docs, each.n_shot, each.task_version, each.runs) for each in boards] == [
            (12, 0, "0.9", 1),
            (12, 5, "1.0", 1),
            (5, 0, "1.0", 1),
            (12, 0, "1.0", 1),
        ]
        pages = walk(lambda cursor, limit: client.list_boards(base=team.model, cursor=cursor, limit=limit), 3)
        assert [len(page) for page in pages] == [3, 1]

    def test_another_metric_may_rank_otherwise(self, client: RegistryClient, team: Team, scored: Scored) -> None:
        scored.push(wrong=4)
        page = client.board(BoardQuery(task="tiny_choice", base=team.model, metric="acc_norm"))
        assert (page.metric, page.items[0].score.metric) == ("acc_norm", "acc_norm")
        with pytest.raises(NotFoundError, match=r"no run of tiny_choice has a score f1,\*"):
            client.board(BoardQuery(task="tiny_choice", base=team.model, metric="f1"))
        with pytest.raises(NotFoundError, match="did you mean 'tiny_choice'"):
            client.board(BoardQuery(task="tiny_choices", base=team.model))
        with pytest.raises(NotFoundError, match="has this version, number of shots and documents"):
            client.board(BoardQuery(task="tiny_choice", base=team.model, n_shot=3))
        with pytest.raises(NotFoundError, match=r"no run of tiny_choice by 0{64}"):
            client.board(BoardQuery(task="tiny_choice", base="0" * 64))

    def test_two_models_of_one_name_and_fingerprint_have_boards_of_their_own(
        self, client: RegistryClient, team: Team, scored: Scored
    ) -> None:
        models = [scored.base.model_copy(update={"identity": sha256(f"{team.model} {i}".encode())}) for i in range(2)]
        runs = [
            scored.push(wrong=wrong, base=model) for wrong, model in ((3, models[0]), (1, models[1]), (2, models[0]))
        ]
        assert [run.base_identity for run in runs] == [models[0].identity, models[1].identity, models[0].identity]
        assert {run.base for run in runs} == {team.model}
        boards = client.list_boards(base=team.model).items
        assert [(each.base, each.base_identity, each.runs) for each in boards] == [
            (team.model, models[1].identity, 1),
            (team.model, models[0].identity, 2),
        ]
        for model, own in ((models[0], [runs[2], runs[0]]), (models[1], [runs[1]])):
            page = client.board(BoardQuery(task="tiny_choice", base=str(model.identity)))
            assert [entry.run.digest for entry in page.items] == [run.digest for run in own]
            assert page.board.base_identity == model.identity
            listed = client.list_runs(RunQuery(base=model.identity)).items
            assert {run.digest for run in listed} == {run.digest for run in own}
        # By name: the board with the newest run; by fingerprint both.
        assert scored.board() == [runs[2].digest, runs[0].digest]
        assert len(client.list_boards(base=team.fingerprint).items) == 2
        assert len(client.list_runs(RunQuery(base=team.model)).items) == 3

    def test_one_model_under_two_names_has_one_board(self, client: RegistryClient, team: Team, scored: Scored) -> None:
        model = scored.base.model_copy(update={"identity": sha256(team.model.encode())})
        moved = model.model_copy(update={"id": f"{team.model}-copy"})
        here, there = scored.push(wrong=3, base=model), scored.push(wrong=1, base=moved)
        assert (here.base, there.base) == (model.id, moved.id)
        assert scored.board() == [there.digest, here.digest]

    def test_runs_that_state_no_identity_are_on_every_board_of_their_models_name(
        self, client: RegistryClient, team: Team, scored: Scored
    ) -> None:
        plain = scored.push(wrong=2, base=EvaluatedBase(id=team.model), model="hf", record=None, experts=())
        assert plain.base_identity is None
        assert scored.board() == [plain.digest]
        models = [scored.base.model_copy(update={"identity": sha256(f"{team.model} {i}".encode())}) for i in range(2)]
        runs = [scored.push(wrong=wrong, base=model) for wrong, model in zip((3, 1), models, strict=True)]
        first, second = (
            client.board(BoardQuery(task="tiny_choice", base=str(model.identity)), limit=1) for model in models
        )
        assert (first.items[0].run.digest, first.board.runs) == (plain.digest, 2)
        assert (second.items[0].run.digest, second.board.runs) == (runs[1].digest, 2)
        rest = client.board(BoardQuery(task="tiny_choice", base=str(models[0].identity)), cursor=first.next, limit=1)
        assert [entry.run.digest for entry in rest.items] == [runs[0].digest]
        # The board of the name without an identity is part of both, so it is not listed.
        listed = client.list_boards(base=team.model).items
        assert [(each.base_identity, each.runs) for each in listed] == [(m.identity, 2) for m in reversed(models)]
        for run in runs:
            client.delete_run(team.namespace, run.digest)
        assert scored.board() == [plain.digest]


class TestVerdicts:
    def test_a_verdict_is_that_of_comparing_what_was_pushed(
        self, client: RegistryClient, team: Team, scored: Scored
    ) -> None:
        for seed in (0, 1):
            client.publish(team.name(), team.file(seed))
        client.set_alias(team.name(), "production", 1)
        old, new = scored.result(wrong=1), scored.result(seed=1, wrong=11)
        runs = [client.push_run(team.namespace, encode_run(result)) for result in (old, new)]
        scored.push("tiny_text")
        scored.push("tiny_text", seed=1)
        query = VerdictQuery(
            baseline=f"{team.name()}@production", candidate=f"{team.name()}@2", margin=0.02, tasks=("tiny_choice",)
        )
        found = client.verdict(query)
        told = found.model_dump(mode="json")
        (task,) = told["tasks"]
        assert [task.pop(f"{side}_run") for side in ("baseline", "candidate")] == [run.reference for run in runs]
        assert told == as_json(compare_results([new], [old], margin=0.02))
        assert (found.verdict, found.reason) == ("REGRESSED", "the candidate is worse")
        assert (task["wins"], task["losses"]) == (0, 10)
        # The same two by digest, and the other way round.
        named = query.model_copy(update={"baseline": runs[0].reference, "candidate": runs[1].digest})
        assert client.verdict(named) == found
        turned = query.model_copy(update={"baseline": query.candidate, "candidate": str(team.name())})
        assert client.verdict(turned).verdict == "IMPROVED"
        # All tasks of both sides, a metric of one's choice, another level.
        assert len(client.verdict(query.model_copy(update={"tasks": ()})).tasks) == 2
        norm = client.verdict(query.model_copy(update={"metric": "acc_norm", "filter": "none", "level": 0.9}))
        assert (norm.tasks[0].metric, norm.level) == ("acc_norm", 0.9)

    def test_a_drop_within_the_spread_of_repeats_is_no_regression(
        self, client: RegistryClient, team: Team, scored: Scored
    ) -> None:
        old, again, new = scored.push(wrong=1), scored.push(wrong=12), scored.push(seed=1, wrong=11)
        query = VerdictQuery(
            baseline=old.reference, candidate=new.reference, margin=0.02, noise=(old.reference, again.reference)
        )
        found = client.verdict(query)
        assert found.verdict == "UNDERPOWERED"
        assert found.tasks[0].noise == pytest.approx(11 / 12)
        with pytest.raises(InvalidRequestError, match="noise: give at least two runs"):
            client.verdict(query.model_copy(update={"noise": (old.reference,)}))
        with pytest.raises(InvalidRequestError, match="noise: a run is named twice"):
            client.verdict(query.model_copy(update={"noise": (old.reference, old.reference)}))
        with pytest.raises(ConflictError, match="noise run 2 is no repeat of the first"):
            client.verdict(query.model_copy(update={"noise": (old.reference, new.reference)}))

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"task_version": "2.0"}, "tiny_choice: the candidate has version 2.0 and the baseline 1.0"),
            ({"n_shot": 5}, "has number of few-shot examples 5 and the baseline 0"),
            ({"docs": 9}, "lacks 3 of the baseline's 12 documents and has 0 others"),
            ({"task": "tiny_text"}, "the candidate has no results of 'tiny_choice'"),
        ],
        ids=["another version", "other shots", "missing samples", "another task"],
    )
    def test_runs_that_cannot_be_compared_are_refused_with_the_reason(
        self, client: RegistryClient, scored: Scored, changes: dict[str, Any], says: str
    ) -> None:
        old, new = scored.push(), scored.push(**{"seed": 1, **changes})
        query = VerdictQuery(baseline=old.reference, candidate=new.reference, margin=0.02, tasks=("tiny_choice",))
        with pytest.raises(ConflictError, match=says):
            client.verdict(query)

    def test_a_verdict_on_what_is_not_there_or_too_much_is_refused(
        self, client: RegistryClient, team: Team, scored: Scored
    ) -> None:
        run = scored.push()
        query = VerdictQuery(baseline=run.reference, candidate=run.reference, margin=0.02)
        assert client.verdict(query).verdict == "UNDERPOWERED"
        client.publish(team.name(), team.file(1))
        for candidate, error, says in (
            ("best of all", InvalidRequestError, "candidate: "),
            (f"{team.namespace}/{'0' * 64}", NotFoundError, "candidate: there is no run "),
            (f"{team.name('other')}@1", NotFoundError, "candidate: .*other"),
            (f"{team.name()}@nightly", NotFoundError, "candidate: .*nightly"),
            (f"{team.name()}@1", NotFoundError, "candidate: there is no run of .*@1 by itself"),
        ):
            with pytest.raises(error, match=says):
                client.verdict(query.model_copy(update={"candidate": candidate}))
        with pytest.raises(ConflictError, match=r"tiny_choice has no score f1,\*; it has: acc,none, acc_norm,none"):
            client.verdict(query.model_copy(update={"metric": "f1"}))
        with pytest.raises(ConflictError, match="did you mean 'tiny_choice'"):
            client.verdict(query.model_copy(update={"tasks": ("tiny_choise",)}))
        with pytest.raises(InvalidRequestError, match=r"a margin of 2 is all that tiny_choice can drop"):
            client.verdict(query.model_copy(update={"margin": 2.0}))
        rolling = scored.push("tiny_rolling").reference
        with pytest.raises(ConflictError, match="is no mean over documents"):
            client.verdict(query.model_copy(update={"baseline": rolling, "candidate": rolling}))
        many = tuple(scored.push(wrong=wrong).reference for wrong in range(12))
        with pytest.raises(TooLargeError, match="the limit of a comparison here is 40000; name fewer tasks"):
            client.verdict(query.model_copy(update={"noise": many}))


class TestAliasRuns:
    def test_an_alias_has_the_runs_of_all_versions_that_it_pointed_to(
        self, client: RegistryClient, team: Team, scored: Scored
    ) -> None:
        for seed in range(3):
            client.publish(team.name(), team.file(seed))
        one, two = scored.push(seed=0), scored.push(seed=1)
        scored.push(seed=2)
        later = scored.push("tiny_text", seed=0)
        client.set_alias(team.name(), "production", 1)
        client.set_alias(team.name(), "production", 2)
        client.set_alias(team.name(), "staging", 3)
        found = client.alias_runs(team.name(), "production").items
        assert [(each.run, each.version, each.current) for each in found] == [
            (later, 1, False),
            (two, 2, True),
            (one, 1, False),
        ]
        moved = {event.version: event.at for event in client.alias_history(team.name(), "production").items}
        assert {each.version: each.since for each in found} == moved
        pages = walk(lambda cursor, limit: client.alias_runs(team.name(), "production", cursor=cursor, limit=limit), 2)
        assert [[each.run for each in page] for page in pages] == [[later, two], [one]]
        client.set_alias(team.name(), "production", 1)
        again = client.alias_runs(team.name(), "production").items
        assert [each.current for each in again] == [True, False, True]
        assert again[0].since > found[0].since
        client.delete_alias(team.name(), "production")
        assert [each.current for each in client.alias_runs(team.name(), "production").items] == [False] * 3
        with pytest.raises(NotFoundError, match="never had an alias nightly"):
            client.alias_runs(team.name(), "nightly")
        with pytest.raises(NotFoundError):
            client.alias_runs(team.name("other"), "production")
        with pytest.raises(InvalidRequestError, match="alias"):
            client.alias_runs(team.name(), "No")
