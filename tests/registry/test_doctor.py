"""The doctor finds what is broken, and nothing in a healthy registry."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from sqlalchemy import text

from t2.core.digests import sha256
from t2.core.references import parse_reference
from t2.registry.blobs.local import LocalBlobs
from t2.registry.db import migrate
from t2.registry.db.database import Database
from t2.registry.schemas import RunQuery
from t2.registry.services import blobs
from t2.registry.services.doctor import Examined, Finding, examine, mend
from t2.registry.services.service import Service
from tests.registry.registries import MATH, STORAGES, contents, fill, registry
from tests.registry.samples import expert_bytes
from tests.registry.servers import free_port

NOW = timedelta(0)
FIX = "; t2 registry doctor --fix writes that anew"


@pytest.fixture(params=STORAGES)
def service(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Service]:
    with registry(request.param, tmp_path, request) as made:
        fill(made)
        yield made


def visit(service: Service, deep: bool = False) -> list[Finding]:
    return list(examine(service.database, service.store, deep=deep, grace=NOW))


def run(service: Service, *statements: str) -> None:
    with service.database.write() as session:
        for statement in statements:
            session.execute(text(statement))


def test_a_healthy_registry(service: Service) -> None:
    seen = Examined()
    assert list(examine(service.database, service.store, deep=True, grace=NOW, seen=seen)) == []
    assert (seen.experts, seen.versions, seen.runs, seen.blobs) == (3, 6, 3, 7)
    assert seen.bytes == seen.hashed == sum(info.size for info in service.store.list())


def test_a_missing_and_a_cut_and_a_damaged_file(service: Service) -> None:
    digests = [service.resolve(parse_reference(f"team/math@{number}")).digest for number in (1, 2)]
    mix = service.resolve(parse_reference("team/mix"))
    service.store.delete(digests[0])
    overwrite(service, digests[1], expert_bytes(1)[:-4])
    overwrite(service, mix.digest, expert_bytes(9)[: mix.size].ljust(mix.size, b"\0"))
    shallow, deep = visit(service), visit(service, deep=True)
    assert all(finding.wrong and finding.check == "blob" for finding in shallow + deep)
    texts = [finding.text for finding in shallow]
    assert len(texts) == 2
    assert any(digests[0] in line and "not in the store" in line and "team/math@1" in line for line in texts)
    assert any(f"{len(expert_bytes(1)) - 4} bytes" in line and "team/math@2" in line for line in texts)
    assert any("team/mix@1" in finding.text and "damaged" in finding.text for finding in deep)


def test_missing_and_damaged_samples(service: Service) -> None:
    (gone,) = service.list_runs(RunQuery(namespace="others")).items
    shared, _ = service.list_runs(RunQuery(namespace="team")).items
    service.store.delete(gone.samples_digest)
    overwrite(service, shared.samples_digest, b"x" * shared.samples_size)
    (shallow,) = visit(service)
    assert shallow.wrong
    assert f"others/runs/{gone.digest}: {gone.samples_digest} is not in the store" in shallow.text
    assert any("team/runs/" in finding.text and "damaged" in finding.text for finding in visit(service, deep=True))


def test_a_run_whose_row_was_changed(service: Service) -> None:
    run(service, """UPDATE run SET header = replace(header, '"n_shot"\\:0', '"n_shot"\\:9')""")
    assert visit(service) == []
    texts = [finding.text for finding in visit(service, deep=True)]
    assert texts
    assert all("its digest is not that of what is told of it" in line for line in texts)


def overwrite(service: Service, digest: str, data: bytes) -> None:
    """As an accident would: past the store's own checks."""
    store = service.store
    if isinstance(store, LocalBlobs):
        (Path(store.location) / digest[:2] / digest).write_bytes(data)
    else:
        client, bucket = store._client, store._bucket  # type: ignore[attr-defined]
        client.put_object(Bucket=bucket, Key=f"experts/{digest[:2]}/{digest}", Body=data)


def test_rows_that_disagree(service: Service) -> None:
    run(service, "UPDATE expert SET live = live - 1 WHERE path = 'team/math'")
    assert [finding.text for finding in visit(service)] == [
        f"team/math: the counts of its versions are not those of its versions{FIX}",
        f"team/math: its card in lists is not what the tables say{FIX}",
    ]
    run(service, "UPDATE expert SET live = live + 1, score = 0.9 WHERE path = 'team/math'")
    assert [finding.text for finding in visit(service)] == [
        f"team/math: what lists go by is not what its latest version says{FIX}"
    ]
    run(
        service,
        "UPDATE expert SET score = NULL, task = NULL, latest = 1 WHERE path = 'team/math'",
        "UPDATE version SET deleted_at = created_at WHERE number = 2",
    )
    assert [finding.check for finding in visit(service)] == ["row"] * len(visit(service))
    assert "team/math@production points to version 2, which is deleted; move the alias" in [
        finding.text for finding in visit(service)
    ]


def test_a_card_that_is_not_what_the_tables_say_is_mended(service: Service) -> None:
    before = contents(service)
    run(service, "UPDATE metric SET value = 7", "UPDATE metric SET value = 0.30000000000000004 WHERE name <> 'x'")
    run(service, "UPDATE expert SET card = '{}' WHERE path = 'team/mix'", "DELETE FROM tag WHERE tag = 'best'")
    texts = [finding.text for finding in visit(service)]
    assert texts == [f"{path}: its card in lists is not what the tables say{FIX}" for path in ("team/math", "team/mix")]
    assert mend(service.database, service.actor) == ["team/math", "team/mix"]
    assert visit(service) == []
    assert mend(service.database, service.actor) == []
    after = contents(service)
    assert after["experts"]["team/mix"] == before["experts"]["team/mix"]
    math = service.get_expert(MATH)
    assert math.tags == ("team:ours",)
    assert math.latest is not None
    assert math.latest.metrics == {"validation.score": 0.1 + 0.2, "x": 7}


def test_experts_that_an_older_server_has_changed_are_told_and_mended(service: Service) -> None:
    before = contents(service)
    run(service, "UPDATE expert SET carded_at = created_at WHERE path <> 'others/code'")
    (finding,) = visit(service)
    assert not finding.wrong
    assert finding.text == f"2 experts were changed by an older t2, which makes lists slow{FIX}"
    assert contents(service) == before
    assert mend(service.database, service.actor) == ["team/math", "team/mix"]
    assert visit(service) == []
    assert contents(service) == before


def test_counts_and_copies_are_mended(service: Service) -> None:
    before = contents(service)
    run(service, "UPDATE expert SET live = 0, last = 0, latest = NULL, task = 'x', score = 1 WHERE path = 'team/math'")
    assert mend(service.database, service.actor) == ["team/math"]
    assert visit(service) == []
    assert contents(service) == before
    assert service.publish(MATH, expert_bytes(77)).version == 4


def test_an_alias_against_its_history(service: Service) -> None:
    run(service, "UPDATE alias SET number = 1")
    assert [finding.text for finding in visit(service)] == [
        f"team/math: its card in lists is not what the tables say{FIX}",
        "team/math@production does not point to where its history says",
    ]


def test_garbage_is_worth_knowing_and_not_wrong(service: Service) -> None:
    with service.database.write() as session:
        blobs.reserve(session, sha256(b"unused"), 6)
    service.store.put(sha256(b"rowless"), b"rowless")
    findings = visit(service)
    assert [(finding.wrong, finding.check) for finding in findings] == [(False, "garbage")] * 2
    assert "1 blobs of 6 bytes" in findings[0].text
    assert "1 objects of 7 bytes" in findings[1].text


def test_a_clock_that_is_ahead(service: Service) -> None:
    later = "datetime(touched_at, '+1 days')" if service.database.is_sqlite else "touched_at + interval '1 day'"
    run(service, f"UPDATE blob SET touched_at = {later}")
    assert [(finding.wrong, finding.check) for finding in visit(service)] == [(True, "clock")]


def test_an_older_schema(service: Service) -> None:
    migrate.migrate(service.database, "0001")
    (finding,) = visit(service)
    assert (finding.wrong, finding.check) == (True, "schema")
    assert "t2 registry migrate" in finding.text


def test_a_database_that_is_away(service: Service, tmp_path: Path) -> None:
    database = Database(f"postgresql://me:secret@127.0.0.1:{free_port()}/none", timeout=2)
    (finding,) = examine(database, service.store)
    assert (finding.wrong, finding.check) == (True, "database")
    assert "secret" not in finding.text
    (tmp_path / "file").touch()
    (finding,) = examine(service.database, LocalBlobs(tmp_path / "file"))
    assert (finding.wrong, finding.check) == (True, "store")


def test_of_very_many_findings_some_are_told(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    with registry("sqlite+folder", tmp_path, request) as service:
        for seed in range(30):
            service.publish(parse_reference(f"a/e{seed}").expert, expert_bytes(seed))  # type: ignore[arg-type]
        for info in list(service.store.list()):
            service.store.delete(info.digest)
        findings = visit(service)
    assert len(findings) == 21
    assert findings[-1].text == "and 10 more"


def test_a_damaged_sqlite_file(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    with registry("sqlite+folder", tmp_path, request) as service:
        fill(service)
        service.database.close()
        file = tmp_path / "registry.db"
        data = bytearray(file.read_bytes())
        data[len(data) // 2 : len(data) // 2 + 12000] = bytes(12000)
        file.write_bytes(data)
        findings = visit(service)
    assert any(finding.wrong and finding.check in {"database", "row"} for finding in findings)
