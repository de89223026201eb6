"""An archive carries a whole registry to any other, and nothing that is wrong with it comes in."""

from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from t2.core.digests import sha256
from t2.core.errors import ConflictError, InvalidRequestError, NotFoundError, RegistryError, UnavailableError
from t2.core.references import parse_name, parse_reference
from t2.registry.open import open_embedded
from t2.registry.portable.exporting import export
from t2.registry.portable.importing import restore
from t2.registry.services import tokens
from t2.registry.services.garbage import Policy, collect
from t2.registry.services.service import Service
from tests.registry.archives import edited, exported, find, header, imported, members, packed
from tests.registry.registries import ACTOR, MATH, MIX, OTHER, STORAGES, contents, fill, log, registry
from tests.registry.samples import expert_bytes


@pytest.fixture
def full(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Service]:
    (tmp_path / "full").mkdir()
    with registry("sqlite+folder", tmp_path / "full", request) as service:
        fill(service)
        yield service


@pytest.fixture
def empty(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Service]:
    (tmp_path / "empty").mkdir()
    with registry("sqlite+folder", tmp_path / "empty", request) as service:
        yield service


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Of a registry with something of everything."""
    with open_embedded(tmp_path_factory.mktemp("source")) as service:
        fill(service)
        return exported(service)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """An empty registry for archives that are refused."""
    with open_embedded(tmp_path_factory.mktemp("untouched")) as service:
        yield service
        assert contents(service) == {"experts": {}, "runs": [], "boards": [], "namespaces": [], "base models": []}
        assert list(service.store.list()) == []


@pytest.mark.parametrize("source", STORAGES)
@pytest.mark.parametrize("target", STORAGES)
def test_nothing_is_lost_on_the_way(source: str, target: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    with registry(source, tmp_path / "a", request) as old, registry(target, tmp_path / "b", request) as new:
        fill(old)
        token = old.create_token("walker", ["read"])
        archive = exported(old)
        result = imported(new, archive, tokens=True)
        assert result.counts == {
            "namespaces": 2,
            "base models": 1,
            "runs": 3,
            "experts": 3,
            "versions": 6,
            "blobs": 7,
            "points": 2501,
            "aliases": 1,
            "alias events": 4,
            "tokens": 2,
            "log entries": len(log(old)),
        }
        assert result.kept == []
        assert contents(new) == contents(old)
        assert log(new)[1:] == log(old)
        assert log(new)[0]["action"] == "registry.import"
        with new.database.read() as session:
            assert tokens.authenticate(session, token.secret).name == "walker"
        new.restore(OTHER)
        old.restore(OTHER)
        for service in (old, new):
            service.set_alias(MATH, "later", 2)
            assert service.publish(MATH, expert_bytes(9)).version == 4
        assert [version.digest for version in new.list_versions(OTHER).items] == [
            version.digest for version in old.list_versions(OTHER).items
        ]


def test_the_same_import_again_changes_nothing(full: Service, empty: Service) -> None:
    archive = exported(full)
    imported(empty, archive)
    before = contents(empty)
    result = imported(empty, archive)
    assert {name for name, count in result.counts.items() if count} == {"present", "log entries left out"}
    assert contents(empty) == before
    assert imported(full, archive).counts["present"] == 6


def test_an_export_is_a_plain_tar_file(full: Service) -> None:
    with tarfile.open(fileobj=io.BytesIO(exported(full))) as opened:
        found = opened.getmembers()
        assert all(member.isreg() for member in found)
        contents_ = {member.name.rpartition("/") for member in found if not member.name.startswith("records/")}
        assert {folder for folder, _, _ in contents_} == {"blobs", "samples"}
        assert {digest for _, _, digest in contents_} == {info.digest for info in full.store.list()}
        first = opened.extractfile(found[0])
        assert first is not None
        assert json.loads(first.read())["type"] == "registry"


def test_no_secret_is_in_an_archive(full: Service) -> None:
    secret = full.create_token("x", ["admin"]).secret
    archive = exported(full)
    assert secret.encode() not in archive
    assert sha256(secret.encode()).encode() in archive
    assert sha256(secret.encode()).encode() not in exported(full, "team")


def test_tokens_come_only_when_asked_for(archive: bytes, empty: Service) -> None:
    result = imported(empty, archive)
    assert empty.list_tokens() == []
    assert [line for line in result.kept if "token" in line and "ci" in line]


def test_one_namespace(full: Service, empty: Service) -> None:
    imported(empty, exported(full, "team"))
    here, there = contents(empty), contents(full)
    assert here["experts"].keys() == {str(MATH), str(MIX)}
    for name in (str(MATH), str(MIX)):
        # The content of version 1 is under another namespace as well, where it is deleted.
        assert here["experts"][name] == there["experts"][name]
    assert [row["name"] for row in here["namespaces"]] == ["team"]
    assert all("others" not in entry["object"] for entry in log(empty))
    with pytest.raises(NotFoundError, match="no namespace nobody"):
        exported(full, "nobody")


def test_what_the_registry_has_already_stays(archive: bytes, empty: Service) -> None:
    empty.publish(MATH, expert_bytes(0))
    empty.describe_expert(MATH, "ours")
    empty.set_alias(MATH, "production", 1, reason="ours")
    empty.set_metrics(MATH, 1, {"y": 1})
    result = imported(empty, archive)
    assert result.counts["versions"] == 5
    assert result.counts["present"] == 1
    assert result.counts["log entries left out"] > 0
    assert [line for line in result.kept if "token" not in line] == [
        "the description of team/math",
        "team/math@production, which points to 1 here",
    ]
    expert = empty.get_expert(MATH)
    assert (expert.description, expert.versions) == ("ours", 2)
    assert empty.resolve(parse_reference("team/math@production")).version == 1
    assert len(empty.alias_history(MATH).items) == 1


def test_a_newer_archive_brings_the_registry_forward(full: Service, empty: Service) -> None:
    old = exported(full)
    imported(empty, old)
    full.publish(MATH, expert_bytes(7))
    full.set_alias(MATH, "production", 4, reason="better still")
    full.set_alias(MATH, "next", 4)
    full.set_alias(MIX, "production", 1)
    full.delete_alias(MIX, "production")
    new = exported(full)
    imported(empty, new)
    assert contents(empty)["experts"][str(MATH)]["aliases"] == contents(full)["experts"][str(MATH)]["aliases"]
    assert empty.alias_history(MATH).items == full.alias_history(MATH).items
    result = imported(empty, old)
    assert "team/math@production, which points to 4 here" in result.kept
    assert empty.resolve(parse_reference("team/math")).version == 4


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda service: service.publish(MATH, expert_bytes(8)), "team/math@1 has another content here"),
        (
            lambda service: [service.publish(MATH, expert_bytes(0)), service.publish(MATH, expert_bytes(8))],
            "team/math@2 has another content here",
        ),
        (
            lambda service: [service.publish(MATH, expert_bytes(1))],
            "team/math@1 has another content here",
        ),
        (
            lambda service: service.publish(MATH, expert_bytes(8, kind="classifier", labels=("a",))),
            "team/math is of kind classifier here",
        ),
        (
            lambda service: service.put_base_model("ab" * 32, "org/model", None, {"a.weight": 3}),
            "has other targets here",
        ),
    ],
)
def test_a_conflict_is_told_and_nothing_is_written(
    archive: bytes, empty: Service, change: Callable[[Service], object], told: str
) -> None:
    change(empty)
    before = contents(empty)
    with pytest.raises(ConflictError, match="nothing was imported") as caught:
        imported(empty, archive)
    assert told in str(caught.value)
    assert contents(empty) == before


def test_another_reward_curve_is_a_conflict(full: Service, empty: Service) -> None:
    archive = exported(full)
    empty.publish(MATH, expert_bytes(0))
    point = full.curve(MATH, 1).points[5]
    empty.add_points(MATH, 1, [point])
    imported(empty, exported(full, "others"))
    empty.add_points(MATH, 1, [point.model_copy(update={"step": 999_999})])
    assert imported(empty, archive).counts["points"] == 2500
    empty.publish(MIX, full.download(full.resolve(parse_reference("team/mix")).digest))
    full.add_points(MIX, 1, [point])
    empty.add_points(MIX, 1, [point.model_copy(update={"reward": 0.123})])
    with pytest.raises(ConflictError, match="team/mix@1 has another reward curve here"):
        imported(empty, exported(full))


def test_an_archive_cut_anywhere_is_refused(archive: bytes, untouched: Service) -> None:
    for length in (*range(0, len(archive) - 1024, 1999), len(archive) - 1025):
        with pytest.raises(InvalidRequestError):
            imported(untouched, archive[:length])


def test_a_changed_byte_brings_no_other_content_in(archive: bytes, empty: Service) -> None:
    digests = {name.rpartition("/")[2] for name, _ in members(archive) if not name.startswith("records/")}
    refused = 0
    for at in range(700, len(archive), 17001):
        try:
            imported(empty, archive[:at] + bytes([archive[at] ^ 4]) + archive[at + 1 :])
        except RegistryError:
            refused += 1
        assert {info.digest for info in empty.store.list()} <= digests
    assert refused > 3


@pytest.mark.parametrize(
    "name",
    [
        "../../evil",
        "/etc/passwd",
        "blobs/../../x",
        f"blobs/{'a' * 63}/",
        "records/../../x",
        "notes.txt",
        "blobs/" + "A" * 64,
    ],
)
def test_names_that_are_none_of_an_archive(archive: bytes, untouched: Service, name: str) -> None:
    with pytest.raises(RegistryError):
        imported(untouched, packed([*members(archive), (name, b"x")]))


def test_links_and_folders_are_refused(archive: bytes, untouched: Service) -> None:
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.GNUTYPE_SPARSE):
        info = tarfile.TarInfo("blobs/" + "0" * 64)
        info.type, info.linkname = kind, "/etc/passwd"
        with pytest.raises(InvalidRequestError, match="no plain file"):
            imported(untouched, info.tobuf() + archive)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda lines: lines.append(lines[-1]), "out of order"),
        (lambda lines: lines.pop(), "ends in the middle"),
        (lambda lines: lines.insert(0, lines.pop(1)), "out of order"),
        (lambda lines: lines.remove(find(lines, "version")), "not the version"),
        (lambda lines: lines.remove(find(lines, "points")), "its end"),
        (lambda lines: find(lines, "registry").update(format=2), "format"),
        (lambda lines: find(lines, "expert").update(expert="../etc"), "expert"),
        (lambda lines: find(lines, "expert").update(kind="mixture"), "of another kind"),
        (lambda lines: find(lines, "expert").update(last=0), "a number that it cannot have"),
        (lambda lines: find(lines, "version").update(digest="f" * 64), "is not in it"),
        (lambda lines: find(lines, "version").update(number=0), "number"),
        (lambda lines: find(lines, "version").update(metrics={"a b": 1}), "metrics"),
        (lambda lines: find(lines, "version").update(more=1), "more"),
        (lambda lines: find(lines, "aliases")["aliases"]["production"].update(number=9), "points to a version"),
        (lambda lines: find(lines, "points").update(number=9), "not the version"),
        (lambda lines: find(lines, "run").update(samples="f" * 64), "are not in it before"),
        (lambda lines: find(lines, "run").update(header="{}"), "line 1"),
        (
            lambda lines: find(lines[::-1], "run").update(header=header(lines, docs=7)),
            "docs is not that of its samples",
        ),
        (lambda lines: find(lines, "run").update(header=header(lines)), "has other samples than its header says"),
        (lambda lines: find(lines, "namespace").update(created_at="yesterday"), "created_at"),
        (lambda lines: find(lines, "namespace").update(created_at="2026-01-01T00:00:00"), "created_at"),
    ],
)
def test_records_that_make_no_registry(
    archive: bytes, untouched: Service, edit: Callable[[list[dict[str, Any]]], object], told: str
) -> None:
    with pytest.raises(InvalidRequestError, match=told):
        imported(untouched, edited(archive, edit))


def test_a_blob_that_is_no_expert_is_refused(archive: bytes, untouched: Service) -> None:
    data = b"anything"
    first, *rest = members(archive)
    with pytest.raises(InvalidRequestError, match="not a valid expert file"):
        imported(untouched, packed([first, (f"blobs/{sha256(data)}", data), *rest]))


def test_records_by_other_means_are_taken(archive: bytes, empty: Service) -> None:
    assert imported(empty, edited(archive, lambda lines: None)).counts["versions"] == 6


def test_memory_does_not_grow_with_the_registry(tmp_path: Path, request: pytest.FixtureRequest, empty: Service) -> None:
    with registry("sqlite+folder", tmp_path, request) as service:
        for seed in range(20):
            service.publish(parse_name(f"a/e{seed}"), expert_bytes(seed, matrices=25, rank=4096))
        file = tmp_path / "archive.tar"
        tracemalloc.start()
        try:
            with file.open("wb") as out:
                export(service.database, service.store, out)
            with file.open("rb") as source:
                restore(empty.database, empty.store, ACTOR, source)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    size = len(expert_bytes(0, matrices=25, rank=4096))
    assert file.stat().st_size > 20 * size
    assert peak < 10 * size + 3_000_000


def test_a_collection_that_comes_in_between_is_told_and_nothing_is_lost(
    empty: Service, archive: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = empty.store.put

    def overtaken(digest: str, data: bytes) -> bool:
        made = put(digest, data)
        collect(empty.database, empty.store, ACTOR, Policy(grace=timedelta(seconds=-10)))
        return made

    monkeypatch.setattr(empty.store, "put", overtaken)
    with pytest.raises(UnavailableError, match="import again"):
        restore(empty.database, empty.store, ACTOR, io.BytesIO(archive))
    monkeypatch.undo()
    imported(empty, archive)
    assert len(empty.list_experts().items) == 2
