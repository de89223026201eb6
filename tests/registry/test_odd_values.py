"""Values outside the range of a database or calendar get status 422 on both databases."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError
from starlette.testclient import TestClient

from t2.core.digests import canonical_json, sha256
from t2.core.references import parse_name
from t2.core.times import Time
from t2.registry.blobs.local import LocalBlobs
from t2.registry.db.models import Utc
from t2.registry.services.service import Service
from tests.registry.cells import open_database
from tests.registry.registries import ACTOR
from tests.registry.samples import expert_bytes, run_bytes
from tests.registry.serving import BINARY, client_of

EDGES = ["0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"]
NAIVE = ["2026-01-01T00:00:00", "0001-01-01T00:00:00", "2026-01-01"]


@pytest.fixture(scope="module", params=["sqlite", "postgres"])
def client(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TestClient]:
    """A registry with two versions and two runs."""
    folder = tmp_path_factory.mktemp("registry")
    with open_database(request.param, folder, request) as database:
        service = Service(database, LocalBlobs(folder / "blobs"), ACTOR)
        for seed in range(2):
            service.publish(parse_name("team/math"), expert_bytes(seed))
            service.push_run("team", run_bytes(seed))
        with client_of(service) as made:
            yield made


def run_with(**fields: Any) -> bytes:
    """The file of a run with changed header values."""
    header, _, samples = run_bytes(9).partition(b"\n")
    return canonical_json({**json.loads(header), **fields}).encode() + b"\n" + samples


@pytest.mark.parametrize("time", [*EDGES, *NAIVE])
def test_a_time_without_an_offset_or_outside_of_the_calendar_is_refused(client: TestClient, time: str) -> None:
    answer = client.post("/v1/runs/team", content=run_with(evaluated_at=time), headers=BINARY)
    assert answer.status_code == 422, answer.text
    assert "evaluated_at" in answer.json()["detail"]


def test_a_time_with_an_offset_is_stored_in_utc(client: TestClient) -> None:
    content = run_with(evaluated_at="2026-01-01T00:00:00+02:00", seeds={"adapt": 77})
    answer = client.post("/v1/runs/team", content=content, headers=BINARY)
    assert answer.status_code == 201, answer.text
    assert answer.json()["evaluated_at"] == "2025-12-31T22:00:00Z"


@pytest.mark.parametrize("time", ["0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z"])
def test_the_first_and_the_last_moment_are_stored(client: TestClient, time: str) -> None:
    content = run_with(evaluated_at=time, seeds={"adapt": len(time)})
    answer = client.post("/v1/runs/team", content=content, headers=BINARY)
    assert (answer.status_code, answer.json()["evaluated_at"]) == (201, time)
    listed = client.get("/v1/runs").json()["items"]
    assert time in [run["evaluated_at"] for run in listed]


def test_a_naive_time_never_reaches_a_database() -> None:
    adapter = TypeAdapter(Time)
    for time in (*EDGES, *NAIVE):
        with pytest.raises(ValidationError):
            adapter.validate_json(json.dumps(time))
    with pytest.raises(ValueError, match="without an offset"):
        Utc().process_bind_param(datetime(2026, 1, 1), None)  # type: ignore[arg-type]  # noqa: DTZ001 - that is the point
    assert adapter.validate_json('"2026-01-01T00:00:00Z"') == datetime(2026, 1, 1, tzinfo=UTC)


@pytest.mark.parametrize("score", [1e308, -1e308, 1e101])
def test_scores_whose_sum_or_square_is_beyond_a_float_are_refused(client: TestClient, score: float) -> None:
    header, _, samples = run_bytes(9).partition(b"\n")
    lines = [{**json.loads(line), "scores": {"acc,none": score}} for line in samples.splitlines()]
    changed = "".join(f"{canonical_json(line)}\n" for line in lines).encode()
    changed_header = {**json.loads(header), "samples_digest": sha256(changed)}
    changed_header["scores"][0].update(score=score, aggregation="other")
    content = canonical_json(changed_header).encode() + b"\n" + changed
    answer = client.post("/v1/runs/team", content=content, headers=BINARY)
    assert answer.status_code == 422, answer.text
    assert "scores" in answer.json()["detail"]


@pytest.mark.parametrize("reference", ["-/abcdef", "..../abcdef", "_x/abcdef12", "x" * 65 + "/abcdef", "a-/abcdef"])
def test_a_run_in_a_namespace_that_cannot_be_is_refused(client: TestClient, reference: str) -> None:
    run = client.get("/v1/runs").json()["items"][0]["digest"]
    for sides in ({"baseline": reference, "candidate": run}, {"baseline": run, "candidate": reference}):
        answer = client.get("/v1/verdict", params={**sides, "margin": 0.1})
        assert answer.status_code == 422, answer.text


CURSORS = [
    "/v1/experts?sort=name",
    "/v1/experts?sort=updated",
    "/v1/experts/team/math/versions",
    "/v1/versions",
    "/v1/runs",
    "/v1/audit",
]


@pytest.mark.parametrize("address", CURSORS)
def test_a_cursor_with_a_number_beyond_the_column_is_refused(client: TestClient, address: str) -> None:
    separator = "&" if "?" in address else "?"
    query = client.get(f"{address}{separator}limit=1").json()["next"]
    if query is None:  # a list of one: its cursor comes from another order of the same list
        client.post("/v1/experts/team/more/versions", content=expert_bytes(5), headers=BINARY)
        query = client.get(f"{address}{separator}limit=1").json()["next"]
    digest, kind, value, last = json.loads(base64.urlsafe_b64decode(query + "=" * (-len(query) % 4)))
    forged = [[digest, kind, value, number] for number in (-1, 2**31, 2**63 - 1, 2**63)]
    if kind == "i":
        forged += [[digest, kind, number, last] for number in (-1, 2**31, 2**63 - 1, 2**63)]
    if kind == "t":
        forged += [[digest, kind, time, last] for time in (*EDGES, *NAIVE)]
    for position in forged:
        cursor = base64.urlsafe_b64encode(json.dumps(position).encode()).decode().rstrip("=")
        answer = client.get(f"{address}{separator}cursor={cursor}")
        assert answer.status_code == 422, answer.text
        assert "cursor: it is damaged" in answer.json()["detail"]
