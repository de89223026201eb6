"""The HTTP client among faults: what it tries again, what it tells, and to whom it gives its token."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t2.core.curve import CurvePoint
from t2.core.digests import sha256
from t2.core.errors import (
    ArgumentError,
    ConflictError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    RegistryError,
    TooLargeError,
    UnauthorizedError,
    UnavailableError,
)
from t2.core.references import parse_name, parse_reference
from t2.registry.blobs.s3 import Credentials, S3Blobs
from t2.registry.client.http import HttpRegistry
from t2.registry.client.retry import RetryPolicy, retry_after
from t2.registry.client.transport import Transport
from t2.registry.db import migrate
from t2.registry.db.database import Database
from t2.registry.open import open_registry
from t2.registry.schemas import Page, VersionQuery
from t2.registry.server import examples
from t2.registry.services.actor import Actor
from t2.registry.services.service import Service
from t2.registry.settings import load_settings
from tests.registry.cells import serve
from tests.registry.samples import expert_bytes
from tests.registry.scripted import CUT, DRIP, RESET, SILENT, Reply, Scripted, html, problem, reply, scripted
from tests.registry.servers import S3, free_port

TOKEN = "t2r_" + "ab" * 36
NAME = parse_name("team/math")
DATA = expert_bytes()
DIGEST = sha256(DATA)
EMPTY = reply({"items": [], "next": None})
BUSY = problem(503, "unavailable", "the database is busy")
VERSION = {
    "name": "team/math",
    "version": 1,
    "digest": DIGEST,
    "size": len(DATA),
    "kind": "expert",
    "task": None,
    "domain": None,
    "method": None,
    "description": "",
    "base_model": "m",
    "base_fingerprint": "ab" * 32,
    "matrices": 1,
    "values": 1,
    "training_docs": 0,
    "aliases": [],
    "metrics": {},
    "created_at": "2026-01-01T00:00:00Z",
    "created_by": "api:ci",
    "deleted_at": None,
}
EXPERT = {
    "name": "team/math",
    "kind": "expert",
    "description": "",
    "tags": [],
    "versions": 1,
    "latest": VERSION,
    "created_at": "2026-01-01T00:00:00Z",
    "updated_at": "2026-01-01T00:00:00Z",
    "deleted_at": None,
}
TOKEN_INFO = examples.TOKEN
ALIAS = examples.ALIAS
AUDIT = {
    "id": 1,
    "at": "2026-01-01T00:00:00Z",
    "source": "api",
    "subject": "ci",
    "action": "version.create",
    "object": "team/math@1",
    "detail": {},
}
RUN = examples.RUN
POINT = examples.POINT
NODE = {"digest": DIGEST, "references": [], "kind": "expert"}
NAMESPACE = {"name": "team", "description": "", "created_at": "2026-01-01T00:00:00Z"}


class Time:
    """A clock that only waiting moves."""

    def __init__(self) -> None:
        self.now = 0.0
        self.waits: list[float] = []

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)
        self.now += seconds

    def policy(self, uniform: float = 0.5, **fields: Any) -> RetryPolicy:
        return RetryPolicy(sleep=self.sleep, clock=lambda: self.now, uniform=lambda: uniform, **fields)


@pytest.fixture
def server() -> Iterator[Scripted]:
    with scripted() as started:
        yield started


@pytest.fixture
def clock() -> Time:
    return Time()


@pytest.fixture
def client(server: Scripted, clock: Time) -> Iterator[HttpRegistry]:
    with HttpRegistry(server.url, TOKEN, timeout=30, retries=clock.policy()) as opened:
        yield opened


class TestRetries:
    @pytest.mark.parametrize("fault", [BUSY, html(502), html(504), problem(429, "busy", "slowly"), RESET, CUT])
    def test_a_read_is_tried_again(
        self, server: Scripted, client: HttpRegistry, clock: Time, fault: Reply | str
    ) -> None:
        server.says(fault, fault, EMPTY)
        assert client.list_experts().items == []
        assert len(server.asked) == 3
        assert clock.waits == [0.125, 0.25]

    def test_it_ends(self, server: Scripted, client: HttpRegistry, clock: Time) -> None:
        server.says(BUSY)
        with pytest.raises(UnavailableError, match=r"^the database is busy$"):
            client.list_experts()
        assert len(server.asked) == 5
        assert clock.waits == [0.125, 0.25, 0.5, 1.0]

    @pytest.mark.parametrize(
        ("change", "answer"),
        [
            (lambda c: c.publish(NAME, DATA), reply(VERSION)),
            (lambda c: c.describe_expert(NAME, "x"), None),
            (lambda c: c.set_metrics(NAME, 1, {"a": 1.0}), reply(VERSION)),
            (lambda c: c.set_alias(NAME, "best", 1), None),
            (lambda c: c.delete_alias(NAME, "best"), Reply(204, b"")),
            (lambda c: c.change_tags(NAME, add=["a"]), None),
            (lambda c: c.delete(NAME, 1), Reply(204, b"")),
            (lambda c: c.restore(NAME), reply({})),
            (
                lambda c: c.add_points(NAME, 1, [CurvePoint(step=1, split="train", reward=0, score=0, seconds=0)]),
                reply({"added": 1}),
            ),
        ],
    )
    def test_a_change_that_does_no_harm_twice_is_tried_again(
        self, server: Scripted, client: HttpRegistry, change: Callable[[HttpRegistry], object], answer: Reply | None
    ) -> None:
        server.says(RESET, BUSY, answer or problem(404, "not-found", "gone"))
        if answer is not None:
            change(client)
        else:
            with pytest.raises(NotFoundError, match="gone"):
                change(client)
        assert len(server.asked) == 3
        assert len({(asked.method, asked.path, asked.body) for asked in server.asked}) == 1

    @pytest.mark.parametrize("fault", [BUSY, RESET, html(502)])
    @pytest.mark.parametrize("change", [lambda c: c.create_namespace("team"), lambda c: c.create_token("ci", ["read"])])
    def test_a_change_that_may_have_happened_is_not_made_twice(
        self, server: Scripted, client: HttpRegistry, fault: Reply | str, change: Callable[[HttpRegistry], object]
    ) -> None:
        server.says(fault)
        with pytest.raises(UnavailableError):
            change(client)
        assert len(server.asked) == 1

    def test_what_the_server_did_not_take_up_is_tried_again(
        self, server: Scripted, client: HttpRegistry, clock: Time
    ) -> None:
        server.says(problem(429, "busy", "slowly"), reply(NAMESPACE, 201))
        assert client.create_namespace("team").name == "team"
        with HttpRegistry(f"http://127.0.0.1:{free_port()}", TOKEN, retries=clock.policy()) as nobody:
            clock.waits.clear()
            with pytest.raises(UnavailableError, match=r"cannot reach the registry .* refused"):
                nobody.create_namespace("team")
        assert len(clock.waits) == 4

    @pytest.mark.parametrize(
        "answer",
        [
            problem(400, "bad-request", "no"),
            problem(401, "unauthorized", "no"),
            problem(404, "not-found", "no"),
            problem(409, "conflict", "no"),
            problem(422, "invalid-request", "no"),
            problem(500, "internal-error", "no"),
            html(404),
        ],
    )
    def test_a_refusal_is_final(self, server: Scripted, client: HttpRegistry, clock: Time, answer: Reply) -> None:
        server.says(answer)
        with pytest.raises(RegistryError):
            client.publish(NAME, DATA)
        assert len(server.asked) == 1
        assert clock.waits == []

    def test_an_upload_has_one_key_through_all_attempts(self, server: Scripted, client: HttpRegistry) -> None:
        server.says(BUSY, RESET, reply(VERSION, 201))
        client.publish(NAME, DATA)
        client.publish(NAME, DATA)
        client.publish(NAME, DATA, idempotency_key="mine")
        keys = [asked.headers["idempotency-key"] for asked in server.asked]
        assert len(set(keys[:3])) == 1
        assert len(set(keys[2:])) == 3
        assert keys[4] == "mine"
        assert all(asked.body == DATA for asked in server.asked)

    def test_a_deletion_whose_answer_was_lost_is_done(self, server: Scripted, client: HttpRegistry) -> None:
        server.says(RESET, problem(404, "not-found", "team/math@1 is deleted"))
        client.delete(NAME, 1)
        server.says(problem(404, "not-found", "there is no version 1"))
        with pytest.raises(NotFoundError, match="there is no version 1"):
            client.delete(NAME, 1)

    def test_the_server_says_when(self, server: Scripted, client: HttpRegistry, clock: Time) -> None:
        later = format_datetime(datetime.now(UTC) + timedelta(seconds=90), usegmt=True)
        for said, low, high in [("7", 7.125, 7.125), (later, 60, 90.2), ("0", 0.125, 0.125), ("soon", 0.125, 0.125)]:
            clock.waits.clear()
            server.says(problem(503, "unavailable", "busy", **{"Retry-After": said}), EMPTY)
            client.list_experts()
            assert low <= clock.waits[0] <= high, said

    def test_it_does_not_wait_for_longer_than_it_may(self, server: Scripted, client: HttpRegistry, clock: Time) -> None:
        for said in ("3600", "9" * 400, "Fri, 31 Dec 9999 23:59:59 GMT"):
            server.says(problem(503, "unavailable", "back tomorrow", **{"Retry-After": said}))
            with pytest.raises(UnavailableError, match="back tomorrow"):
                client.list_experts()
        assert len(server.asked) == 3
        assert clock.waits == []

    def test_the_whole_is_bounded_in_time(self, server: Scripted, clock: Time) -> None:
        policy = clock.policy(uniform=0.999, attempts=1000, base=1.0, cap=4.0, total=20.0)
        server.says(BUSY)
        with HttpRegistry(server.url, TOKEN, retries=policy) as client, pytest.raises(UnavailableError):
            client.list_experts()
        assert 12 < clock.now < 20

    def test_an_answer_without_end_is_given_up(self, server: Scripted) -> None:
        server.says(DRIP)
        with (
            HttpRegistry(server.url, TOKEN, retries=RetryPolicy(total=0.4)) as client,
            pytest.raises(UnavailableError, match="has not ended its answer"),
        ):
            client.list_experts()
        assert len(server.asked) == 1

    def test_silence_is_given_up(self, server: Scripted, clock: Time) -> None:
        server.says(SILENT)
        policy = clock.policy(attempts=2)
        with (
            HttpRegistry(server.url, TOKEN, timeout=0.2, retries=policy) as client,
            pytest.raises(UnavailableError, match="no answer in time"),
        ):
            client.list_experts()
        assert len(server.asked) == 2

    @given(st.integers(1, 200), st.floats(0, 1, exclude_max=True), st.floats(0, 100))
    def test_a_wait_lies_within_its_bounds(self, attempt: int, uniform: float, asked: float) -> None:
        policy = RetryPolicy(uniform=lambda: uniform)
        bound = min(policy.cap, policy.base * 2.0 ** (attempt - 1))
        assert 0 <= policy.wait(attempt) <= bound
        assert asked <= policy.wait(attempt, asked) <= asked + bound

    def test_two_clients_do_not_wait_in_step(self) -> None:
        assert [RetryPolicy().wait(5) for _ in range(3)] != [RetryPolicy().wait(5) for _ in range(3)]
        seeded = [RetryPolicy(uniform=random.Random(1).random).wait(5) for _ in range(2)]
        assert seeded[0] == seeded[1]

    @given(st.text(max_size=30))
    def test_any_header_is_read(self, value: str) -> None:
        seconds = retry_after(value)
        assert seconds is None or seconds >= 0


class TestErrors:
    @pytest.mark.parametrize(
        "kind",
        [
            NotFoundError,
            ConflictError,
            InvalidRequestError,
            TooLargeError,
            UnauthorizedError,
            ForbiddenError,
            UnavailableError,
            RegistryError,
        ],
    )
    def test_the_servers_errors_come_as_they_were(
        self, server: Scripted, client: HttpRegistry, kind: type[RegistryError]
    ) -> None:
        server.says(problem(kind.status, kind.code, "what, where, what to do"))
        with pytest.raises(RegistryError, match=r"^what, where, what to do$") as caught:
            client.get_expert(NAME)
        assert type(caught.value) is kind

    @pytest.mark.parametrize(
        ("call", "good", "bad", "field"),
        [
            (lambda c: c.list_experts(), EXPERT, {"kind": "judge"}, "kind 'judge'"),
            (lambda c: c.list_experts(), EXPERT, {"latest": {**VERSION, "kind": "judge"}}, "latest.kind 'judge'"),
            (lambda c: c.list_versions(NAME), VERSION, {"kind": "judge"}, "kind 'judge'"),
            (lambda c: c.search_versions(VersionQuery()), VERSION, {"digest": "blake3:ab"}, "digest 'blake3:ab'"),
            (
                lambda c: c.search_versions(VersionQuery()),
                VERSION,
                {"base_fingerprint": None},
                "base_fingerprint NoneType",
            ),
            (lambda c: c.list_tokens(), TOKEN_INFO, {"scopes": ["read", "judge"]}, "scopes.1 'judge'"),
            (lambda c: c.list_aliases(NAME), ALIAS, {"version": "3rd"}, "version '3rd'"),
            (lambda c: c.list_namespaces(), NAMESPACE, {"name": "Team Ä"}, "name 'Team Ä'"),
            (lambda c: c.audit(), AUDIT, {"detail": "x"}, "detail 'x'"),
            (lambda c: c.list_runs(), RUN, {"n_shot": "all"}, "n_shot 'all'"),
            (lambda c: c.curve(NAME, 1), POINT, {"split": "test"}, "split 'test'"),
            (lambda c: c.lineage(DIGEST), NODE, {"kind": "judge"}, "kind 'judge'"),
        ],
    )
    def test_an_item_that_is_not_known_yet_is_left_out_of_its_list_and_told_once(
        self,
        server: Scripted,
        client: HttpRegistry,
        caplog: pytest.LogCaptureFixture,
        call: Callable[[HttpRegistry], Any],
        good: dict[str, Any],
        bad: dict[str, Any],
        field: str,
    ) -> None:
        items = [good, {**good, **bad}, good, {**good, **bad}]
        if good is TOKEN_INFO or good is ALIAS:
            said: Any = items
        elif good is POINT:
            said = {"points": items, "total": 4}
        elif good is NODE:
            said = {"root": DIGEST, "nodes": items, "edges": [], "truncated": False}
        else:
            said = {"items": items, "next": None}
        server.says(reply(said))
        for _ in range(2):
            answer = call(client)
            found = next(
                (getattr(answer, name) for name in ("items", "points", "nodes") if hasattr(answer, name)), answer
            )
            assert len(found) == 2
        (record,) = caplog.records
        assert f"this t2 does not know {field}; upgrade t2" in record.getMessage()
        assert server.url in record.getMessage()

    def test_a_page_of_what_only_a_newer_t2_knows_is_empty_and_leads_on(
        self, server: Scripted, client: HttpRegistry
    ) -> None:
        server.says(reply({"items": [{**EXPERT, "kind": "judge"}], "next": "more"}))
        assert client.list_experts() == Page(items=[], next="more")

    @pytest.mark.parametrize(
        "said", [{"items": ["x"], "next": None}, {"items": [EXPERT], "next": 5}, {"items": 5}, [5]]
    )
    def test_what_is_no_list_of_a_registry_is_refused(self, server: Scripted, client: HttpRegistry, said: Any) -> None:
        server.says(reply(said))
        with pytest.raises(RegistryError, match="does not understand"):
            client.list_experts()

    def test_a_code_that_is_not_known_yet(self, server: Scripted, client: HttpRegistry) -> None:
        server.says(problem(409, "version-locked", "it is locked"))
        with pytest.raises(ConflictError, match="it is locked"):
            client.get_expert(NAME)
        server.says(problem(418, "teapot", "no coffee"))
        with pytest.raises(RegistryError, match="no coffee") as caught:
            client.get_expert(NAME)
        assert caught.value.status == 418

    def test_a_text_cannot_play_with_the_terminal(self, server: Scripted, client: HttpRegistry) -> None:
        server.says(problem(404, "not-found", "\x1b[31mred\nline\x07" + "x" * 100_000))
        with pytest.raises(NotFoundError) as caught:
            client.get_expert(NAME)
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 3000

    @pytest.mark.parametrize(
        ("answer", "kind", "words"),
        [
            (html(200), RegistryError, r"does not understand \(200 for GET /v1/experts/team/math\)"),
            (reply({"a": 1}), RegistryError, "it is no t2 registry, or a much newer one"),
            (Reply(200, b"\xff\xfe"), RegistryError, "does not understand"),
            (html(404), RegistryError, r"answered 404 \(text/html\) to GET /v1/experts/team/math.*check the URL"),
            (html(401), UnauthorizedError, "wants other credentials"),
            (html(403), ForbiddenError, "refuses"),
            (html(500), RegistryError, "check the URL"),
            (html(502), UnavailableError, "what stands before the registry cannot reach it now"),
            (Reply(404, b"{", {"Content-Type": "application/problem+json"}), RegistryError, "check the URL"),
            (Reply(404, b"[" * 100_000, {"Content-Type": "application/problem+json"}), RegistryError, "check the URL"),
            (Reply(302, b"", {"Location": "https://other/login"}), RegistryError, "a redirect to https://other/login"),
        ],
    )
    def test_another_server_is_told_in_one_line(
        self, server: Scripted, client: HttpRegistry, answer: Reply, kind: type[RegistryError], words: str
    ) -> None:
        server.says(answer)
        with pytest.raises(RegistryError, match=words) as caught:
            client.get_expert(NAME)
        assert type(caught.value) is kind
        assert server.url in str(caught.value)
        assert "\n" not in str(caught.value)
        assert TOKEN not in str(caught.value)

    def test_a_newer_server_may_tell_more(self, server: Scripted, client: HttpRegistry) -> None:
        server.says(reply({"items": [{**VERSION, "stars": 5}], "next": None, "total": 1}))
        assert client.list_versions(NAME).items[0].digest == DIGEST

    def test_other_bytes_are_refused(self, server: Scripted, client: HttpRegistry) -> None:
        server.says(Reply(200, DATA + b" ", {"Content-Type": "application/octet-stream"}))
        with pytest.raises(RegistryError, match="other bytes"):
            client.download(DIGEST)

    def test_an_answer_that_is_too_large_is_not_held(self, server: Scripted, clock: Time) -> None:
        server.says(Reply(200, b"x" * 200_000))
        transport = Transport(server.url, None, timeout=30, retries=clock.policy(), allow_http=None)
        with pytest.raises(RegistryError, match="more than 100000 bytes"):
            transport.send("GET", "/experts", repeatable=True, limit=100_000)
        transport.close()
        assert len(server.asked) == 1

    def test_what_cannot_be_sent_is_refused_here(self, server: Scripted, client: HttpRegistry) -> None:
        server.says(EMPTY)
        with pytest.raises(InvalidRequestError, match="not finite"):
            client.set_metrics(NAME, 1, {"a": float("nan")})
        with pytest.raises(InvalidRequestError, match="not Unicode"):
            client.describe_expert(NAME, "\ud800")
        assert server.asked == []


class TestToken:
    def test_it_goes_to_the_server(self, server: Scripted, client: HttpRegistry) -> None:
        server.says(EMPTY)
        client.list_experts()
        assert server.asked[0].headers["authorization"] == f"Bearer {TOKEN}"

    def test_it_goes_to_no_store(self, server: Scripted, client: HttpRegistry) -> None:
        with scripted() as store:
            store.says(Reply(200, DATA, {"Content-Type": "application/octet-stream", "Set-Cookie": "a=b"}))
            server.says(Reply(307, b"", {"Location": f"{store.url}/bucket/key?X-Amz-Signature=secret"}))
            assert client.download(DIGEST) == DATA
            assert store.paths == ["/bucket/key?X-Amz-Signature=secret"]
            assert "authorization" not in store.asked[0].headers
            assert TOKEN not in str(store.asked[0].headers)

    def test_it_follows_within_the_server(self, server: Scripted, client: HttpRegistry) -> None:
        server.says(Reply(307, b"", {"Location": "/elsewhere"}), Reply(200, DATA, {}))
        assert client.download(DIGEST) == DATA
        assert server.asked[1].headers["authorization"] == f"Bearer {TOKEN}"

    def test_a_store_that_refuses_is_told_without_the_signature(
        self, server: Scripted, client: HttpRegistry, clock: Time
    ) -> None:
        with scripted() as store:
            server.says(Reply(307, b"", {"Location": f"{store.url}/key?X-Amz-Signature=secret"}))
            store.says(Reply(403, b"<Error><Code>AccessDenied</Code></Error>", {"Content-Type": "application/xml"}))
            with pytest.raises(RegistryError, match=r"the store 127\.0\.0\.1, .* answered 403") as caught:
                client.download(DIGEST)
            assert "secret" not in str(caught.value)
            store.says(html(503), Reply(200, DATA, {}))
            assert client.download(DIGEST) == DATA
        assert len(server.asked) == 3
        assert len(clock.waits) == 1

    @pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://host/key", "", "http://[broken", "gopher:"])
    def test_it_follows_to_web_servers_only(self, server: Scripted, client: HttpRegistry, target: str) -> None:
        server.says(Reply(307, b"", {"Location": target}))
        with pytest.raises(RegistryError, match="redirects"):
            client.download(DIGEST)
        assert len(server.asked) == 1

    def test_it_does_not_follow_from_https_to_http(self) -> None:
        transport = Transport("https://host", TOKEN, timeout=1, retries=RetryPolicy(), allow_http=None)
        with pytest.raises(RegistryError, match="from https to http"):
            transport._redirected(httpx2.URL("https://host/a"), "http://store/key")
        assert transport._redirected(httpx2.URL("https://host/a"), "//store/key") == "https://store/key"
        transport.close()

    def test_it_does_not_go_in_circles(self, server: Scripted, client: HttpRegistry) -> None:
        server.says(Reply(307, b"", {"Location": "/again"}))
        with pytest.raises(RegistryError, match="more than 3 times"):
            client.download(DIGEST)
        assert len(server.asked) == 4

    @pytest.mark.parametrize("url", ["http://registry.example", "http://10.0.0.7:8470", "http://127.0.0.1.example"])
    def test_it_is_not_sent_in_the_clear(self, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ArgumentError, match="unencrypted") as caught:
            HttpRegistry(url, TOKEN)
        assert TOKEN not in str(caught.value)
        HttpRegistry(url).close()
        HttpRegistry(url, TOKEN, allow_http=True).close()
        monkeypatch.setenv("T2_REGISTRY_ALLOW_HTTP", "1")
        HttpRegistry(url, TOKEN).close()
        monkeypatch.setenv("T2_REGISTRY_ALLOW_HTTP", "0")
        with pytest.raises(ArgumentError, match="unencrypted"):
            HttpRegistry(url, TOKEN)

    @pytest.mark.parametrize("url", ["https://h", "http://localhost:1", "http://127.0.0.1", "http://[::1]:8470/p"])
    def test_it_may_go_where_nobody_listens(self, url: str) -> None:
        HttpRegistry(url, TOKEN).close()

    @pytest.mark.parametrize("token", ["", " ", "a\nb", "a b", "tökén"])
    def test_one_that_cannot_be_is_refused(self, token: str) -> None:
        with pytest.raises(ArgumentError, match="token"):
            HttpRegistry("https://host", token)

    def test_a_proxy_of_the_environment_is_not_asked_about_this_machine(
        self, server: Scripted, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{free_port()}")
        monkeypatch.setenv("ALL_PROXY", f"http://127.0.0.1:{free_port()}")
        server.says(EMPTY)
        with HttpRegistry(server.url, TOKEN) as client:
            assert client.list_experts().items == []


class TestAddresses:
    @pytest.mark.parametrize(
        "url",
        ["", "ftp://host", "http://", "https://user:password@host", "https://host?x=1", "https://host#x", "http://[x"],
    )
    def test_one_that_is_no_servers_is_refused(self, url: str) -> None:
        with pytest.raises(ArgumentError, match="URL") as caught:
            HttpRegistry(url)
        assert "password" not in str(caught.value)

    def test_a_server_may_live_under_a_path(self, server: Scripted) -> None:
        server.says(EMPTY)
        with HttpRegistry(f"{server.url}/registry/") as client:
            client.list_experts(limit=3)
        assert server.paths == ["/registry/v1/experts?sort=-updated&limit=3"]
        assert client.location == f"{server.url}/registry"

    def test_open_registry(self, server: Scripted, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        server.says(EMPTY)
        monkeypatch.setenv("T2_REGISTRY_TOKEN", TOKEN)
        monkeypatch.setenv("T2_REGISTRY_URL", server.url)
        for where in (None, server.url, f"{server.url}/"):
            with open_registry(where) as client:
                client.list_experts()
            assert server.asked[-1].headers["authorization"] == f"Bearer {TOKEN}"
        with open_registry(server.url, "other") as client:
            client.list_experts()
        assert server.asked[-1].headers["authorization"] == "Bearer other"
        with scripted() as another, open_registry(another.url) as client:
            another.says(EMPTY)
            client.list_experts()
            assert "authorization" not in another.asked[0].headers
        with open_registry(str(tmp_path / "folder")) as client:
            assert client.location == str(tmp_path / "folder")
            assert client.list_experts().items == []
        monkeypatch.setenv("T2_REGISTRY_URL", str(tmp_path / "folder"))
        with open_registry() as client:
            assert client.location == str(tmp_path / "folder")
        with open_registry(server.url) as client:
            client.list_experts()
        assert server.asked[-1].headers["authorization"] == f"Bearer {TOKEN}"

    @pytest.mark.parametrize("where", ["localhost:8470", "registry.example:8470/team", "10.0.0.1:80"])
    def test_a_scheme_that_was_forgotten(self, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ArgumentError, match=f"write http://{where}"):
            open_registry(where)
        assert list(tmp_path.iterdir()) == []


def test_a_download_by_a_presigned_address(s3_server: S3, tmp_path: Path) -> None:
    database = Database(f"sqlite:///{tmp_path / 'registry.db'}")
    migrate.migrate(database)
    credentials = Credentials(s3_server.access_key, s3_server.secret_key)
    store = S3Blobs(s3_server.bucket(), "", endpoint=s3_server.endpoint, credentials=credentials)
    service = Service(database, store, Actor("cli", "tester"))
    secret = service.create_token("reader", ["write"]).secret
    with serve(service, load_settings(presign=True)) as url, HttpRegistry(url, secret) as client:
        version = client.publish(NAME, DATA)
        answer = httpx2.get(f"{url}/v1/blobs/{version.digest}", headers={"Authorization": f"Bearer {secret}"})
        assert answer.status_code == 307
        assert answer.headers["location"].startswith(s3_server.endpoint)
        assert client.download(version.digest) == DATA
        assert client.resolve(parse_reference("team/math")).digest == DIGEST
