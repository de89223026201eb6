"""Answers that do not match the request or an earlier answer are never used."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from t2.core.digests import sha256
from t2.core.errors import NotFoundError, RegistryError, ResultsError
from t2.core.manifest import BaseModelRef
from t2.core.references import parse_name, parse_reference
from t2.harness.defaults import default_experts
from t2.harness.leaderboard import find_run, runs_of
from t2.harness.registry import fetch, find
from t2.registry.client import cache as caches
from t2.registry.client.cache import ExpertCache
from t2.registry.client.http import HttpRegistry
from t2.registry.open import open_embedded
from t2.registry.schemas import Page, RunQuery, VersionQuery
from t2.registry.services.service import Service
from tests.cli.here import Here
from tests.registry.cells import SETTINGS, serve
from tests.registry.samples import FINGERPRINT, expert_bytes, run_bytes

NAME = parse_name("team/math")
FIRST, SECOND = expert_bytes(1), expert_bytes(2)
X, Y = sha256(FIRST), sha256(SECOND)


Lie = Callable[[Any, Service], Any]
"""Changes a true answer of the registry into a lie."""
LIES: dict[str, Lie] = {}
"""Active lies of the server, by method."""
LIED = ("resolve", "publish", "search_versions", "list_versions", "get_run", "list_runs", "lineage")


class Liar(Service):
    """A registry that tells :data:`LIES`."""

    def acting_for(self, actor: Any) -> Liar:
        return Liar(self.database, self.store, actor, limits=self.limits, location=self.location)

    def __getattribute__(self, name: str) -> Any:
        true = super().__getattribute__(name)
        if name not in LIED or name not in LIES:
            return true
        honest = Service(self.database, self.store, self.actor, limits=self.limits, location=self.location)
        return lambda *args, **options: LIES[name](true(*args, **options), honest)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with open_embedded(tmp_path_factory.mktemp("liar")) as service:
        service.publish(NAME, FIRST)
        service.publish(NAME, SECOND)
        service.set_alias(NAME, "production", 1)
        service.push_run("team", run_bytes(1, experts=(X,)))
        service.push_run("team", run_bytes(2, answers=1, experts=(Y,)))
        liar = Liar(service.database, service.store, service.actor, limits=service.limits)
        with serve(liar, SETTINGS) as started:
            yield started


@pytest.fixture
def lies() -> Iterator[dict[str, Lie]]:
    LIES.clear()
    yield LIES
    LIES.clear()


@pytest.fixture
def here(capsys: pytest.CaptureFixture[str]) -> Here:
    return Here(capsys)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str) -> Path:
    monkeypatch.setenv("T2_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("T2_EXPERTS_DIR", str(tmp_path / "experts"))
    monkeypatch.setenv("T2_REGISTRY_URL", url)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def client(url: str, home: Path) -> Iterator[HttpRegistry]:
    with HttpRegistry(url) as opened:
        yield opened


def changed(**fields: Any) -> Lie:
    """Change these fields of the answer."""
    return lambda true, _: true.model_copy(update=fields)


def only(**fields: Any) -> Lie:
    """A page of the first true item with these fields changed."""
    return lambda true, _: Page(items=[true.items[0].model_copy(update=fields)])


def run_of(digest: str) -> Lie:
    """A page of the runs of an expert."""
    return lambda _, honest: honest.list_runs(RunQuery(expert=f"@sha256:{digest}"))


@pytest.mark.parametrize("reference", [f"team/math@sha256:{X}", f"@sha256:{X}"])
def test_content_asked_for_by_digest_is_that_content(
    reference: str, home: Path, lies: dict[str, Lie], here: Here
) -> None:
    lies["resolve"] = changed(digest=Y, version=2)
    wrong = f"it answers with digest {Y} instead of {X}"
    assert wrong in here.refused("expert", "pull", reference)
    assert here("expert", "verify", reference) == ""
    assert here.code == 2
    assert wrong in here.errors
    assert len(here.errors.splitlines()) == 1
    assert list(home.rglob("*")) == []


@pytest.mark.parametrize(
    ("reference", "lie", "words"),
    [
        ("team/math@1", {"version": 2, "digest": Y}, "version 2 instead of 1"),
        ("team/math@1", {"name": "team/other"}, "name team/other instead of team/math"),
        ("team/math", {"name": "evil/math"}, "name evil/math instead of team/math"),
        ("team/math@production", {"name": "../\x1b[2J"}, "instead of team/math"),
        ("team/math@1", {"kind": "classifier"}, "kind classifier instead of expert"),
        ("team/math@1", {"domain": "code"}, "domain code instead of math"),
        ("team/math@1", {"task": None}, "task None instead of t2_gsm8k"),
        ("team/math@1", {"base_fingerprint": "cd" * 32}, "base_fingerprint cd"),
        ("team/math@1", {"size": 7}, "size 7 instead of"),
    ],
)
def test_a_version_is_the_one_asked_for_and_what_its_file_says(
    reference: str, lie: dict[str, Any], words: str, url: str, home: Path, lies: dict[str, Lie]
) -> None:
    lies["resolve"] = changed(**lie)
    with pytest.raises(RegistryError) as caught:
        fetch(parse_reference(reference))
    assert words in str(caught.value)
    assert str(caught.value).startswith(url)
    assert str(caught.value).isprintable()


class TestAVersionNeverChanges:
    def test_another_digest_later_is_refused_with_both(self, home: Path, lies: dict[str, Lie], here: Here) -> None:
        here("expert", "pull", "team/math@1", "-o", "old.safetensors")
        lies["resolve"] = changed(digest=Y)
        wrong = f"team/math@1 is sha256:{Y} now and was sha256:{X} before"
        line = here.refused("expert", "pull", "team/math@1", "-o", "new.safetensors")
        assert wrong in line
        assert f"use team/math@sha256:{X}, or delete {home}" in line
        here("expert", "verify", "team/math@1")
        assert here.code == 2
        assert wrong in here.errors
        assert not (home / "new.safetensors").exists()
        assert (home / "old.safetensors").read_bytes() == FIRST
        # An alias leads to the same version, and to the same refusal.
        for reference in ("team/math", "team/math@production"):
            with pytest.raises(RegistryError, match="a version never changes"):
                fetch(parse_reference(reference))
        lies.clear()
        assert fetch(parse_reference("team/math@1")).data == FIRST

    def test_nor_does_it_after_the_server_said_that_it_was_gone(
        self, client: HttpRegistry, lies: dict[str, Lie]
    ) -> None:
        cache = ExpertCache()
        cache.fetch(client, parse_reference("team/math@1"))
        lies["resolve"] = gone
        with pytest.raises(NotFoundError):
            cache.fetch(client, parse_reference("team/math@1"))
        lies["resolve"] = changed(digest=Y)
        with pytest.raises(RegistryError, match="a version never changes"):
            cache.fetch(client, parse_reference("team/math@1"))

    def test_the_one_who_pushed_it_knows_its_digest(
        self, client: HttpRegistry, home: Path, here: Here, lies: dict[str, Lie]
    ) -> None:
        (home / "x.safetensors").write_bytes(FIRST)
        here("expert", "push", "x.safetensors", "team/math")
        lies["resolve"] = changed(digest=Y)
        with pytest.raises(RegistryError, match="a version never changes"):
            find(client, parse_reference("team/math@1"))

    def test_servers_and_versions_are_told_apart(self, client: HttpRegistry, url: str, lies: dict[str, Lie]) -> None:
        cache = ExpertCache()
        assert cache.fetch(client, parse_reference("team/math@1")).data == FIRST
        assert cache.fetch(client, parse_reference("team/math@2")).data == SECOND
        with HttpRegistry(url.replace("127.0.0.1", "localhost")) as other:
            lies["resolve"] = changed(digest=Y)
            assert cache.fetch(other, parse_reference("team/math@1")).data == SECOND
            lies.clear()
            with pytest.raises(RegistryError) as caught:
                cache.fetch(other, parse_reference("team/math@1"))
        assert f"is sha256:{X} now and was sha256:{Y} before" in str(caught.value)

    @pytest.mark.parametrize("damage", [b"", b"{", b"[]", b"\xff", b'{"server": "x", "reference": "y", "digest": "z"}'])
    def test_a_damaged_memory_is_none_and_is_not_replaced_in_silence(
        self, client: HttpRegistry, lies: dict[str, Lie], damage: bytes, caplog: pytest.LogCaptureFixture
    ) -> None:
        cache = ExpertCache()
        cache.fetch(client, parse_reference("team/math@1"))
        assert caplog.records == []
        (pin,) = (cache.folder / "versions").rglob("*.json")
        pin.write_bytes(damage)
        assert cache.fetch(client, parse_reference("team/math@1")).data == FIRST
        (record,) = caplog.records
        assert f"{pin}: the stored digest of team/math@1 is damaged and replaced by sha256:{X}" == record.getMessage()
        lies["resolve"] = changed(digest=Y)
        with pytest.raises(RegistryError, match="a version never changes"):
            cache.fetch(client, parse_reference("team/math@1"))

    def test_a_cache_of_an_earlier_t2_counts(self, client: HttpRegistry, lies: dict[str, Lie]) -> None:
        cache = ExpertCache()
        cache.fetch(client, parse_reference("team/math@1"))
        (pin,) = (cache.folder / "versions").rglob("*.json")
        pin.unlink()
        lies["resolve"] = changed(digest=Y)
        with pytest.raises(RegistryError, match="a version never changes"):
            cache.fetch(client, parse_reference("team/math@1"))

    def test_what_is_remembered_has_a_limit(
        self, client: HttpRegistry, monkeypatch: pytest.MonkeyPatch, lies: dict[str, Lie]
    ) -> None:
        monkeypatch.setattr(caches, "MOST_REFERENCES", 10)
        cache, true = ExpertCache(), client.resolve(parse_reference("team/math@1"))
        for number in range(1, 40):
            cache.confirm(client, true.model_copy(update={"version": number}))
            assert len(list((cache.folder / "versions").rglob("*.json"))) <= 10
        with pytest.raises(RegistryError, match="a version never changes"):
            cache.confirm(client, true.model_copy(update={"version": 39, "digest": Y}))


def gone(*_: Any) -> Any:
    raise NotFoundError("there is no version team/math@1")


@pytest.mark.parametrize(
    ("method", "call", "lie"),
    [
        ("publish", lambda c: c.publish(NAME, FIRST), changed(digest=Y)),
        ("publish", lambda c: c.publish(NAME, FIRST), changed(name="team/other")),
        ("lineage", lambda c: c.lineage(X), changed(root=Y)),
        (
            "list_versions",
            lambda c: c.list_versions(NAME),
            only(name="evil/math"),
        ),
        (
            "search_versions",
            lambda c: c.search_versions(VersionQuery(digest=X)),
            only(digest=Y),
        ),
        (
            "search_versions",
            lambda c: c.search_versions(VersionQuery(kind="expert")),
            only(kind="mixture"),
        ),
        (
            "list_runs",
            lambda c: c.list_runs(RunQuery(namespace="team")),
            only(namespace="evil"),
        ),
    ],
)
def test_an_answer_is_about_what_was_asked(
    method: str, call: Callable[[HttpRegistry], Any], lie: Lie, client: HttpRegistry, lies: dict[str, Lie]
) -> None:
    call(client)
    lies[method] = lie
    with pytest.raises(RegistryError, match="its answer was not used"):
        call(client)


def test_default_experts_are_what_their_files_say(client: HttpRegistry, lies: dict[str, Lie], url: str) -> None:
    base = BaseModelRef(id="org/model", fingerprint=FINGERPRINT)
    (expert,) = default_experts(base)
    assert expert.digest == X
    for lie in ({"domain": "law"}, {"digest": Y}, {"method": "none"}):
        lies["search_versions"] = lambda true, _, lie=lie: Page(  # type: ignore[misc]
            items=[one.model_copy(update=lie if one.version == 1 else {}) for one in true.items]
        )
        with pytest.raises(RegistryError, match=r"says otherwise|a version never changes"):
            default_experts(base)


class TestRuns:
    def digests(self, client: HttpRegistry) -> dict[str, str]:
        """Digests of the runs, by the digest of their expert."""
        return {run.experts[0].digest: run.digest for run in client.list_runs().items}

    def test_a_run_is_the_one_named(self, client: HttpRegistry, lies: dict[str, Lie]) -> None:
        runs = self.digests(client)
        lies["list_runs"] = run_of(Y)
        with pytest.raises(RegistryError, match=f"digest {runs[Y]} instead of {runs[X][:12]}"):
            find_run(client, runs[X][:12])
        lies.clear()
        lies["get_run"] = changed(digest=runs[Y])
        with pytest.raises(RegistryError, match=f"digest {runs[Y]} instead of {runs[X]}"):
            find_run(client, runs[X][:12])

    def test_the_runs_of_an_expert_are_of_it(self, client: HttpRegistry, lies: dict[str, Lie]) -> None:
        runs = self.digests(client)
        assert [each.run.digest() for each in runs_of(client, "team/math@1")] == [runs[X]]
        lies["list_runs"] = run_of(Y)
        for reference in ("team/math@1", "team/math", f"@sha256:{X}"):
            with pytest.raises(ResultsError, match=r"a run that is not of sha256:\w+ alone"):
                runs_of(client, reference)
