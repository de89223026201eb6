"""The limits of the API hold for all records of an archive; refused ones write nothing.

``T2_TEST_ARCHIVES`` sets the number of archives with changed records that are tried on each database.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import string
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import TypeAdapter
from starlette.testclient import TestClient

from t2.core.digests import sha256
from t2.core.errors import ConflictError, InvalidRequestError, TooLargeError
from t2.core.references import parse_name, parse_reference
from t2.core.results import TaskRun
from t2.registry.blobs.local import LocalBlobs
from t2.registry.db import migrate
from t2.registry.db.database import Database
from t2.registry.db.models import Table
from t2.registry.names import MAX_ALIASES, MAX_METRICS, MAX_TAGS, MAX_VERSION
from t2.registry.open import open_embedded
from t2.registry.portable.exporting import export
from t2.registry.portable.importing import restore
from t2.registry.portable.records import MAX_ARCHIVED_VERSION, Record
from t2.registry.services import experts
from t2.registry.services.actor import Limits
from t2.registry.services.service import Service
from tests.registry import servers
from tests.registry.archives import edited, exported, find, imported, members, packed
from tests.registry.registries import ACTOR, MATH, fill
from tests.registry.samples import expert_bytes, run_bytes
from tests.registry.serving import BINARY, client_of, token

ARCHIVES = int(os.environ.get("T2_TEST_ARCHIVES", "6"))
SEED = int(os.environ.get("T2_TEST_SEED", "0"))
Line = dict[str, Any]
Edit = Callable[[list[Line]], object]


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The archive of a registry with rows in every table."""
    with open_embedded(tmp_path_factory.mktemp("source")) as service:
        fill(service)
        with service.database.write() as session:
            experts.record_purged(session, "team/gone", 7)
        return exported(service)


class Templates:
    """Fresh registries on one database, some of them with other content under the same names."""

    def __init__(self, kind: str, folder: Path, server: str | None, stack: contextlib.ExitStack) -> None:
        self.kind, self._folder, self._server, self._stack = kind, folder, server, stack
        self._places = {filled: self._prepare(filled) for filled in (False, True)}

    def _prepare(self, filled: bool) -> tuple[Path, str]:
        place = self._folder / f"template-{filled}"
        place.mkdir()
        url = f"sqlite:///{place / 'registry.db'}"
        if self._server is not None:
            url = self._stack.enter_context(servers.new_database(self._server))
        with Service(Database(url, pool=5), LocalBlobs(place / "blobs"), ACTOR) as service:
            migrate.migrate(service.database)
            if filled:
                service.publish(parse_name("others/code"), expert_bytes(0))
                service.publish(parse_name("mine/own"), expert_bytes(21))
                service.set_alias(parse_name("mine/own"), "production", 1)
                service.push_run("mine", run_bytes(5))
        return place, url

    @contextlib.contextmanager
    def new(self, *, filled: bool = False) -> Iterator[Service]:
        template, url = self._places[filled]
        place = self._folder / os.urandom(6).hex()
        if template.exists():
            shutil.copytree(template, place)
        with contextlib.ExitStack() as stack:
            new = f"sqlite:///{place / 'registry.db'}"
            if self._server is not None:
                new = stack.enter_context(servers.new_database(self._server, url))
            yield stack.enter_context(Service(Database(new, pool=5), LocalBlobs(place / "blobs"), ACTOR))
        shutil.rmtree(place)


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def templates(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Templates]:
    server = request.getfixturevalue("postgres_server") if request.param == "postgresql" else None
    with contextlib.ExitStack() as stack:
        yield Templates(request.param, tmp_path_factory.mktemp(request.param), server, stack)


@pytest.fixture
def empty(templates: Templates) -> Iterator[Service]:
    with templates.new() as service:
        yield service


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """An empty registry for archives that must be refused."""
    with open_embedded(tmp_path_factory.mktemp("untouched")) as service:
        yield service


def rows(service: Service) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of all tables."""
    with service.database.engine.connect() as connection:
        return {
            table.name: sorted((tuple(row) for row in connection.execute(table.select())), key=repr)
            for table in Table.metadata.sorted_tables
        }


def everything(service: Service) -> tuple[Any, ...]:
    return rows(service), sorted((info.digest, info.size) for info in service.store.list())


def refused(service: Service, archive: bytes, **options: Any) -> str:
    """Check that an archive is refused and writes nothing; return the message."""
    before = everything(service)
    with pytest.raises((InvalidRequestError, ConflictError, TooLargeError)) as caught:
        restore(service.database, service.store, ACTOR, io.BytesIO(archive), **options)
    assert everything(service) == before
    message = str(caught.value)
    assert message.isprintable(), message
    return message


def update(type: str, **fields: Any) -> Edit:
    """Return an edit of the first record of a type."""
    return lambda lines: find(lines, type).update(fields)


def aliases(lines: list[Line], count: int) -> None:
    record = find(lines, "aliases")
    record["aliases"] = {f"a{number}": record["aliases"]["production"] for number in range(count)}


def point(lines: list[Line], **fields: Any) -> None:
    find(lines, "points")["points"][0].update(fields)


EARLY, LATE = "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-14:00"
OVER: list[tuple[str, Edit]] = [
    *((f"{each} before the calendar", update(each, created_at=EARLY)) for each in ("namespace", "version", "run")),
    *((f"{each} after the calendar", update(each, created_at=LATE)) for each in ("expert", "base-model", "token")),
    ("an event before the calendar", update("alias-event", at=EARLY)),
    ("an entry after the calendar", update("audit", at=LATE)),
    ("an entry without an offset", update("audit", at="2026-01-01T00:00:00")),
    ("an expiry without an offset", update("token", expires_at="2026-01-01T00:00:00")),
    *((f"version {number}", update("version", number=number)) for number in (0, -1, 2**31 - 1, 2**31, 2**63, 2**64)),
    *((f"last {last}", update("expert", last=last)) for last in (-1, 2**31 - 1, 2**31, MAX_VERSION)),
    *((f"purged {last}", update("purged", last=last)) for last in (-1, 2**31 - 1, 2**31, MAX_VERSION)),
    ("an invalid purged name", update("purged", path="../x")),
    ("an event of a number beyond the last", update("alias-event", number=99)),
    *(
        (f"NUL in {field} of {each}", update(each, **{field: "a\x00b"}))
        for each, field in (
            ("namespace", "description"),
            ("expert", "description"),
            ("version", "description"),
            ("version", "created_by"),
            ("alias-event", "reason"),
            ("alias-event", "by"),
            ("base-model", "id"),
            ("base-model", "revision"),
            ("run", "created_by"),
            ("token", "name"),
            ("token", "prefix"),
            ("audit", "source"),
            ("audit", "subject"),
            ("audit", "action"),
            ("audit", "object"),
        )
    ),
    *(
        (f"{length} characters in {field} of {each}", update(each, **{field: "x" * length}))
        for each, field, length in (
            ("namespace", "description", 4001),
            ("expert", "description", 4001),
            ("version", "description", 4001),
            ("alias-event", "reason", 4001),
            ("base-model", "id", 201),
            ("base-model", "revision", 201),
            ("token", "name", 65),
            ("token", "scopes", 33),
            ("audit", "source", 17),
            ("audit", "subject", 101),
            ("audit", "action", 65),
        )
    ),
    ("half a character", update("expert", description="\ud800")),
    ("two dots in a namespace", update("namespace", name="a..b")),
    ("two dots in the namespace of a run", update("run", namespace="a..b")),
    ("a line break in a name", update("expert", expert="team/math\n")),
    ("an odd tag", update("expert", tags=["a b"])),
    ("too many tags", update("expert", tags=[f"t{number}" for number in range(MAX_TAGS + 1)])),
    ("an odd metric", update("version", metrics={"a\nb": 1.0})),
    ("too many metrics", update("version", metrics={f"m{number}": 1.0 for number in range(MAX_METRICS + 1)})),
    ("a metric that is no number", update("version", metrics={"m": float("nan")})),
    ("a metric that is infinite", update("version", metrics={"m": float("inf")})),
    ("too many aliases", lambda lines: aliases(lines, MAX_ALIASES + 1)),
    ("an alias of a deleted version", lambda lines: find(lines, "version").update(deleted_at="2026-01-01T00:00:00Z")),
    ("an odd scope", update("token", scopes="root")),
    ("no scope", update("token", scopes="")),
    ("an unprintable name of a token", update("token", name="a\nb")),
    ("a log entry with NaN", update("audit", detail={"x": float("nan")})),
    *(
        (f"a step of {step}", lambda lines, step=step: point(lines, step=step))
        for step in (-1, 2**31, 2**63, 2**64, 10**30)
    ),
    ("a reward that is no number", lambda lines: point(lines, reward=float("nan"))),
    ("the same step twice", lambda lines: point(lines, step=1)),
    ("a rank of 0", update("base-model", targets={"a.weight": 0})),
    ("a rank beyond the integers", update("base-model", targets={"a.weight": 2**31})),
    ("no targets", update("base-model", targets={})),
    ("targets that no expert fits", update("base-model", targets={"a.weight": 3})),
    ("an expert twice", lambda lines: lines.insert(lines.index(find(lines, "expert")), dict(find(lines, "expert")))),
    (
        "records after the aliases",
        lambda lines: lines.insert(lines.index(find(lines, "aliases")) + 1, find(lines, "version")),
    ),
]


@pytest.mark.parametrize("edit", [edit for _, edit in OVER], ids=[name for name, _ in OVER])
def test_a_record_over_a_limit_is_refused_and_nothing_is_written(
    archive: bytes, untouched: Service, edit: Edit
) -> None:
    def change(lines: list[Line]) -> None:
        version = next(line for line in lines if line["type"] == "version" and line["number"] == 2)
        first = find(lines, "version")
        edit(lines)
        if first.get("deleted_at"):  # the version that the alias points to
            first["deleted_at"], version["deleted_at"] = None, first["deleted_at"]
        end = find(lines, "end")
        end["counts"] = dict(Counter(line["type"] for line in lines[:-1])) | {
            name: end["counts"][name] for name in ("blob", "samples")
        }

    refused(untouched, edited(archive, change), tokens=True)


def test_an_expert_that_an_upload_would_be_refused_for_is_refused_in_an_archive(empty: Service, tmp_path: Path) -> None:
    with open_embedded(tmp_path / "source") as source:
        source.publish(MATH, expert_bytes(0))
        archive = exported(source)
    odd: list[Line] = [{"task": "a\x00"}, {"domain": "x" * 201}]
    for fields in odd:
        data = expert_bytes(0, **fields)
        with pytest.raises(InvalidRequestError):
            empty.publish(MATH, data)
        old = find([json.loads(line) for line in records_of(archive)], "version")["digest"]
        new = sha256(data)
        changed = [
            (name.replace(old, new), data if name.startswith("blobs/") else part.replace(old.encode(), new.encode()))
            for name, part in members(archive)
        ]
        refused(empty, packed(changed))
    assert "limit" in refused(empty, archive, limits=Limits(upload_bytes=100))


def records_of(archive: bytes) -> list[bytes]:
    return [line for name, data in members(archive) if name.startswith("records/") for line in data.splitlines()]


def test_a_curve_over_the_limit_is_refused_also_where_the_registry_has_a_part_of_it(
    archive: bytes, empty: Service
) -> None:
    assert "more than 2500 points" in refused(empty, archive, limits=Limits(points=2500))
    imported(empty, archive)

    def edit(lines: list[Line]) -> None:
        points = find(lines, "points")
        points["points"] = [{**points["points"][0], "step": 5000}]

    more = edited(archive, edit)
    assert "more than 2501 points" in refused(empty, more, limits=Limits(points=2501))


def test_an_import_that_fails_in_the_midst_of_writing_leaves_nothing_that_can_be_seen(
    archive: bytes, empty: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = rows(empty)
    monkeypatch.setattr("t2.registry.services.runs.insert", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        restore(empty.database, empty.store, ACTOR, io.BytesIO(archive))
    monkeypatch.undo()
    after = rows(empty)
    assert {name for name in before if before[name] != after[name]} == {"blob"}
    imported(empty, archive)


def test_no_entry_of_a_log_keeps_uploads_from_a_name(archive: bytes, empty: Service) -> None:
    details: list[Line] = [{}, {"last": None}, {"last": "x"}, {"last": 2**31 - 1}, {"last": 10**30}, {"last": -1}]

    def edit(lines: list[Line]) -> None:
        entries = [line for line in lines if line["type"] == "audit"]
        for number, (entry, detail) in enumerate(zip(entries, details, strict=False)):
            entry.update(action="expert.purge", object=f"team/new-{number}", detail=detail)

    imported(empty, edited(archive, edit))
    for number in range(len(details)):
        assert empty.publish(parse_name(f"team/new-{number}"), expert_bytes(9)).version == 1


def test_the_highest_number_of_an_archive_leaves_room_for_uploads(archive: bytes, empty: Service) -> None:
    def edit(lines: list[Line]) -> None:
        find(lines, "expert").update(last=MAX_ARCHIVED_VERSION)

    imported(empty, edited(archive, edit))
    assert empty.publish(MATH, expert_bytes(9)).version == MAX_ARCHIVED_VERSION + 1
    assert empty.resolve(parse_reference(f"{MATH}@{MAX_ARCHIVED_VERSION + 1}")).digest == sha256(expert_bytes(9))


def test_an_expert_that_has_used_up_its_numbers_says_so(empty: Service) -> None:
    empty.publish(MATH, expert_bytes(0))
    with empty.database.write() as session:
        session.execute(Table.metadata.tables["expert"].update().values(last=MAX_VERSION))
    with pytest.raises(ConflictError, match="last version number"):
        empty.publish(MATH, expert_bytes(1))


# Archives with changed records ------------------------------------------------------------------------------------

TIMES: list[Any] = ["2026-01-01T00:00:00Z", "0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z", EARLY, LATE]
TIMES += ["2026-01-01", "2026-01-01T00:00:00", 0, 1e20]
WHOLE = [0, 1, -1, 2, 900_000_000, 900_000_001, 2**31 - 1, 2**31, 2**63, 10**30, 1.5, True, "1", None]
FLOATS = [0.0, -0.0, 5e-324, 1.7976931348623157e308, -1.7976931348623157e308, float("nan"), float("inf"), 10**400, "x"]


class Mutations:
    """Values at and over the limits of the record schemas, and archives with them."""

    def __init__(self, archive: bytes, generator: random.Random) -> None:
        self._archive, self._random = archive, generator
        self._schema = TypeAdapter(Record).json_schema()
        self._run = TaskRun.model_json_schema()
        self._schema["$defs"] = self._run["$defs"] | self._schema["$defs"]
        self._shapes = {
            shape["properties"]["type"]["const"]: shape["properties"]
            for shape in self._schema["$defs"].values()
            if "type" in shape.get("properties", {})
        }
        lines = [json.loads(line) for line in records_of(archive)]
        self._pool: dict[str, list[Any]] = {}
        for line in lines:
            for name, value in line.items():
                self._pool.setdefault(name, []).append(value)

    def archive(self) -> tuple[bytes, list[str]]:
        """Return an archive with a few changes, and a description of them."""
        changes: list[str] = []

        def edit(lines: list[Line]) -> None:
            changes.extend(self._change(lines) for _ in range(self._random.choice((1, 1, 2, 3))))
            if self._random.random() < 0.9:
                self._count(lines)

        return edited(self._archive, edit), changes

    def _count(self, lines: list[Line]) -> None:
        end = lines[-1]
        if end["type"] == "end" and isinstance(end.get("counts"), dict):
            kept = {name: end["counts"].get(name) for name in ("blob", "samples")}
            end["counts"] = dict(Counter(line["type"] for line in lines[:-1])) | kept

    def _change(self, lines: list[Line]) -> str:
        choose = self._random
        at = choose.randrange(1, len(lines) - 1)
        kind = choose.choice(sorted({line["type"] for line in lines[1:-1]}))
        at = choose.choice([i for i, line in enumerate(lines) if line["type"] == kind])
        how = choose.choice(["value"] * 8 + ["swap", "drop", "repeat", "purge", "header"])
        if how == "drop":
            return f"without {lines.pop(at)}"
        if how == "repeat":
            lines.insert(choose.randrange(1, len(lines) - 1), dict(lines[at]))
            return f"twice {lines[at]}"
        if how == "swap":
            other = choose.randrange(1, len(lines) - 1)
            lines[at], lines[other] = lines[other], lines[at]
            return f"{at} and {other} swapped"
        if how == "purge":
            entry = find(lines, "audit") if any(line["type"] == "audit" for line in lines) else {}
            entry.update(action="expert.purge", object=choose.choice(["team/math", "team/new", "x", ""]))
            entry.update(detail={"last": choose.choice([*WHOLE, *FLOATS])})
            return f"{entry}"
        if how == "header" and kind == "run":
            header = json.loads(lines[at]["header"])
            name = choose.choice(sorted(header))
            header[name] = self._value(self._run["properties"][name], header[name], depth=0)
            lines[at]["header"] = json.dumps(header, sort_keys=True, separators=(",", ":"))
            return f"header.{name} = {str(header[name])[:80]!r}"
        shape = self._shapes[lines[at]["type"]]
        name = choose.choice([each for each in shape if each != "type"])
        known = self._pool.get(name, [])
        old = lines[at].get(name)
        lines[at][name] = (
            choose.choice(known) if known and choose.random() < 0.3 else self._value(shape[name], old, depth=0)
        )
        return f"{lines[at]['type']}.{name} = {str(lines[at][name])[:80]!r}"

    def _value(self, shape: dict[str, Any], old: Any, depth: int) -> Any:
        """Return a value at or over the limits of a JSON schema, or change a part of the old one."""
        choose = self._random
        if "$ref" in shape:
            shape = self._schema["$defs"][shape["$ref"].rpartition("/")[2]]
        if "anyOf" in shape:
            return self._value(choose.choice(shape["anyOf"]), old, depth)
        if isinstance(old, list | dict) and old and choose.random() < 0.7:
            return self._within(shape, old, depth)
        match shape.get("type"):
            case "string" if shape.get("format") == "date-time":
                return choose.choice(TIMES)
            case "string":
                return self._text(shape)
            case "integer":
                edges = [shape[edge] + by for edge in ("minimum", "maximum") if edge in shape for by in (-1, 0, 1)]
                return choose.choice([*edges, *WHOLE])
            case "number":
                return choose.choice(FLOATS)
            case "null":
                return None
            case "array":
                count = choose.choice([0, 1, 2, shape.get("maxItems", 20), shape.get("maxItems", 20) + 1])
                one = self._value(shape["items"], None, depth + 1)
                return [one] * min(count, 200)
            case "object" if "properties" in shape:
                return {name: self._value(each, None, depth + 1) for name, each in shape["properties"].items()}
            case "object":
                inner = next(iter(shape.get("patternProperties", {}).values()), shape.get("additionalProperties"))
                inner = inner if isinstance(inner, dict) else {"type": "string"}
                count = choose.choice([0, 1, shape.get("maxProperties", 3), shape.get("maxProperties", 3) + 1])
                names = [f"k{number}" for number in range(min(count, 200))] + [self._text({})] * choose.choice([0, 1])
                return {name: self._value(inner, None, depth + 1) for name in names}
            case _:
                return choose.choice([None, "x", 1, float("nan"), {"a": ["\x00", 10**400, {}]}])

    def _within(self, shape: dict[str, Any], old: Any, depth: int) -> Any:
        choose = self._random
        if isinstance(old, list):
            changed = list(old)
            at = choose.randrange(len(changed))
            changed[at] = self._value(shape.get("items", {}), changed[at], depth + 1)
            return changed
        name = choose.choice(sorted(old))
        inner = shape.get("properties", {}).get(name) or next(
            iter(shape.get("patternProperties", {}).values()), shape.get("additionalProperties")
        )
        return {**old, name: self._value(inner if isinstance(inner, dict) else {}, old[name], depth + 1)}

    def _text(self, shape: dict[str, Any]) -> str:
        choose = self._random
        longest = shape.get("maxLength", choose.choice([64, 100, 200, 4000]))
        plain = "".join(choose.choice(string.ascii_lowercase) for _ in range(8))
        odd = ["", "a\x00b", "\ud800", "é✓\u2028", "a\nb", "a..b", "../x", "production", "1", "NaN"]
        return choose.choice([*odd, plain, f"{plain}/{plain}", "x" * longest, "x" * (longest + 1), "é" * longest])


def read_all(client: TestClient, headers: dict[str, str]) -> list[str]:
    """Request everything from a registry; return the names of its experts."""

    def get(path: str, **params: Any) -> Any:
        answer = client.get(path, params=params, headers=headers)
        assert answer.status_code < 500, (path, params, answer.text)
        return answer

    def pages(path: str, **params: Any) -> list[Any]:
        items: list[Any] = []
        cursor: dict[str, str] = {}
        while True:
            page = get(path, limit=3, **params, **cursor).json()
            items += page["items"]
            if page["next"] is None or len(items) > 60:
                return items
            cursor = {"cursor": page["next"]}

    for path in ("namespaces", "audit", "versions"):
        pages(f"/v1/{path}")
    for base in pages("/v1/base-models"):
        assert get(f"/v1/base-models/{base['fingerprint']}").status_code == 200
    get("/v1/tokens")
    for sort in ("-updated", "name", "-score", "created"):
        found = pages("/v1/experts", sort=sort)
    pages("/v1/experts", deleted="true")
    for expert in found:
        path = f"/v1/experts/{expert['name']}"
        assert get(path).status_code == 200
        for version in pages(f"{path}/versions"):
            one = f"{path}/versions/{version['version']}"
            get(one), get(f"{one}/content"), get(f"{one}/curve"), get(f"{one}/curve", points=3)
            get(f"/v1/lineage/{version['digest']}")
        get("/v1/resolve", reference=expert["name"])
        pages(f"{path}/alias-history")
        for alias in get(f"{path}/aliases").json():
            assert get("/v1/resolve", reference=f"{expert['name']}@{alias['alias']}").status_code == 200
            get(f"{path}/aliases/{alias['alias']}/runs")
    runs = pages("/v1/runs")
    for run in runs:
        assert get(f"/v1/runs/{run['namespace']}/{run['digest']}").status_code == 200
        assert get(f"/v1/runs/{run['namespace']}/{run['digest']}/samples").status_code == 200
        get("/v1/verdict", baseline=runs[0]["digest"], candidate=run["digest"], margin=0.1)
    for board in pages("/v1/boards"):
        assert get("/v1/leaderboard", task=board["task"], base=board["base"]).status_code == 200
    return [expert["name"] for expert in found]


def attempt(service: Service, archive: bytes, what: str, *, tokens: bool) -> str | None:
    """Import an archive; return the message if it is refused."""
    try:
        restore(service.database, service.store, ACTOR, io.BytesIO(archive), tokens=tokens)
    except (InvalidRequestError, ConflictError, TooLargeError) as error:
        return str(error)
    except Exception as error:
        raise AssertionError(what) from error
    return None


def test_an_archive_is_imported_and_all_works_or_is_refused_and_nothing_is_written(
    archive: bytes, templates: Templates
) -> None:
    generator = random.Random(f"{SEED} {templates.kind}")
    mutations, outcomes = Mutations(archive, generator), Counter[str]()
    for number in range(ARCHIVES):
        changed, changes = mutations.archive()
        with templates.new(filled=generator.random() < 0.5) as service:
            before = everything(service)
            refusal = attempt(service, changed, f"archive {number}: {changes}", tokens=generator.random() < 0.5)
            if refusal is not None:
                assert refusal.isprintable(), changes
                assert everything(service) == before, changes
                outcomes["refused"] += 1
                continue
            outcomes["imported"] += 1
            headers = token(service, "admin")
            copy = io.BytesIO()
            export(service.database, service.store, copy)
            copy.seek(0)
            with templates.new() as other:
                restore(other.database, other.store, ACTOR, copy, tokens=True)
            with client_of(service) as client:
                names = read_all(client, headers)
                for name in {*names, "team/math", "team/mix", "team/new", "team/gone", "others/code"}:
                    path = f"/v1/experts/{name}/versions"
                    answer = client.post(path, content=expert_bytes(99), headers={**headers, **BINARY})
                    assert answer.status_code in (200, 201, 409, 422), (changes, name, answer.text)
                answer = client.post("/v1/runs/team", content=run_bytes(99), headers={**headers, **BINARY})
                assert answer.status_code in (200, 201), (changes, answer.text)
    print(f"{templates.kind}: {dict(outcomes)}")
    assert outcomes.total() == ARCHIVES
