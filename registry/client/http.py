"""The client of a registry server."""

from __future__ import annotations

import json
import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar
from urllib.parse import quote

import pydantic
from pydantic import TypeAdapter

from t2.core.curve import CurvePoint
from t2.core.digests import sha256
from t2.core.errors import InvalidRequestError, NotFoundError, RegistryError
from t2.core.expertfile import MAX_FILE_BYTES
from t2.core.references import ExpertName, Reference, is_digest
from t2.registry.client.answers import check_answer, check_resolved
from t2.registry.client.retry import RetryPolicy
from t2.registry.client.transport import Answer, Transport
from t2.registry.names import (
    check_alias,
    check_key,
    check_metric,
    check_name,
    check_namespace,
    check_note,
    check_number,
    check_points,
    check_tag,
    known_name,
    known_namespace,
)
from t2.registry.schemas import (
    AliasEvent,
    AliasInfo,
    AliasRun,
    AuditEntry,
    BaseModelInfo,
    Board,
    BoardPage,
    BoardQuery,
    Curve,
    Expert,
    ExpertQuery,
    Judgement,
    Lineage,
    MetricRange,
    Namespace,
    NewToken,
    Page,
    Run,
    RunDetail,
    RunQuery,
    Scope,
    TokenInfo,
    VerdictQuery,
    Version,
    VersionDetail,
    VersionQuery,
)

T = TypeVar("T")
_log = logging.getLogger(__name__)
_LISTS = frozenset({"items", "points", "nodes"})
"""Lists in answers whose items can be left out individually."""


class HttpRegistry:
    """A registry over HTTP: a :class:`~t2.registry.client.base.RegistryClient`, where the methods are described.

    What is safe to repeat is tried again when the server cannot be reached or is overloaded; see
    :mod:`t2.registry.client.transport`. Instances may be shared between threads.
    """

    def __init__(
        self,
        url: str,
        token: str | None = None,
        *,
        timeout: float = 60.0,
        retries: RetryPolicy | None = None,
        allow_http: bool | None = None,
    ) -> None:
        """Prepare; no request is made.

        Args:
            url: of the server, with the path it is served under where there is one.
            token: the access token.
            timeout: seconds without a byte after which an attempt is given up; to connect at most 10.
            retries: how often and how long to try again.
            allow_http: send the token over plain HTTP to other machines too; ``T2_REGISTRY_ALLOW_HTTP`` where None.

        Raises:
            ArgumentError: the URL is not one of a server, the token cannot be one, or it would go over plain HTTP.
        """
        self._transport = Transport(
            url, token, timeout=timeout, retries=retries or RetryPolicy(), allow_http=allow_http
        )
        self.location = self._transport.location
        self._warned: set[tuple[str, str]] = set()

    def publish(
        self, name: ExpertName, data: bytes, *, description: str = "", idempotency_key: str | None = None
    ) -> Version:
        check_name(name)
        check_note("description", description)
        check_key(idempotency_key)
        key = secrets.token_hex(16) if idempotency_key is None else idempotency_key
        answer = self._transport.send(
            "POST",
            f"{_path(name)}/versions",
            params=[("description", description)] if description else [],
            content=data,
            headers={"Content-Type": "application/octet-stream", "Idempotency-Key": key},
            repeatable=True,
        )
        version = self._read(Version, answer)
        return self._checked(f"the version of {name} just uploaded", version, name=str(name), digest=sha256(data))

    def get_expert(self, name: ExpertName) -> Expert:
        return self._checked(str(name), self._get(Expert, _path(name)), name=str(name))

    def list_experts(
        self, query: ExpertQuery | None = None, *, cursor: str | None = None, limit: int = 50
    ) -> Page[Expert]:
        query = query or ExpertQuery()
        params: list[tuple[str, str]] = [
            (field, value)
            for field in ("namespace", "text", "base", "task", "domain", "kind", "sort")
            if (value := getattr(query, field)) is not None
        ]
        params += [("tag", tag) for tag in query.tags]
        params += [("metric", _range(metric)) for metric in query.metrics]
        if query.deleted:
            params.append(("deleted", "true"))
        return self._get(Page[Expert], "/experts", [*params, *_page(cursor, limit)])

    def describe_expert(self, name: ExpertName, description: str) -> Expert:
        changed = self._change(Expert, "PATCH", _path(name), {"description": description}, repeatable=True)
        return self._checked(str(name), changed, name=str(name))

    def resolve(self, reference: Reference) -> VersionDetail:
        version = self._get(VersionDetail, "/resolve", [("reference", str(reference))])
        check_resolved(self.location, reference, version)
        return version

    def list_versions(self, name: ExpertName, *, cursor: str | None = None, limit: int = 50) -> Page[Version]:
        page = self._get(Page[Version], f"{_path(name)}/versions", _page(cursor, limit))
        return self._checked_items(f"versions of {name}", page, name=str(name))

    def search_versions(self, query: VersionQuery, *, cursor: str | None = None, limit: int = 50) -> Page[Version]:
        page = self._get(Page[Version], "/versions", [*_given(query), *_page(cursor, limit)])
        given = query.model_dump(include={"kind", "domain", "digest"}, exclude_none=True)
        if query.fingerprint is not None:
            given["base_fingerprint"] = query.fingerprint
        return self._checked_items("versions", page, **given)

    def download(self, digest: str) -> bytes:
        if not is_digest(digest):
            raise NotFoundError("a digest is 64 hex digits in lower case")
        answer = self._transport.send("GET", f"/blobs/{digest}", repeatable=True, limit=MAX_FILE_BYTES, follow=True)
        if sha256(answer.content) != digest:
            raise RegistryError(
                f"{self.location} gave other bytes than those of the digest {digest}; what stands between it and here "
                "changes content, or its store is damaged: run t2 registry doctor there"
            )
        return answer.content

    def set_metrics(self, name: ExpertName, version: int, metrics: Mapping[str, float]) -> Version:
        for metric in metrics:
            check_metric(metric)
        path = f"{_version(name, version)}/metrics"
        changed = self._change(Version, "PATCH", path, dict(metrics), repeatable=True)
        return self._checked(f"{name}@{version}", changed, name=str(name), version=version)

    def list_aliases(self, name: ExpertName) -> Sequence[AliasInfo]:
        return self._get(list[AliasInfo], f"{_path(name)}/aliases")

    def set_alias(self, name: ExpertName, alias: str, version: int, *, reason: str = "") -> AliasInfo:
        check_alias(alias)
        check_number(f"version of {name}", version)
        path = f"{_path(name)}/aliases/{quote(alias, safe='')}"
        moved = self._change(AliasInfo, "PUT", path, {"version": version, "reason": reason}, repeatable=True)
        return self._checked(f"{name}@{alias}", moved, alias=alias, version=version)

    def delete_alias(self, name: ExpertName, alias: str, *, reason: str = "") -> None:
        check_alias(alias)
        check_note("reason", reason)
        path = f"{_path(name)}/aliases/{quote(alias, safe='')}"
        self._transport.send("DELETE", path, params=[("reason", reason)] if reason else [], repeatable=True)

    def alias_history(
        self, name: ExpertName, alias: str | None = None, *, cursor: str | None = None, limit: int = 50
    ) -> Page[AliasEvent]:
        params = [("alias", alias)] if alias is not None else []
        return self._get(Page[AliasEvent], f"{_path(name)}/alias-history", [*params, *_page(cursor, limit)])

    def change_tags(self, name: ExpertName, *, add: Iterable[str] = (), remove: Iterable[str] = ()) -> Expert:
        body = {"add": list(add), "remove": list(remove)}
        for tag in (*body["add"], *body["remove"]):
            check_tag(tag)
        changed = self._change(Expert, "POST", f"{_path(name)}/tags", body, repeatable=True)
        return self._checked(str(name), changed, name=str(name))

    def delete(self, name: ExpertName, version: int | None = None) -> None:
        self._transport.send("DELETE", _path(name) if version is None else _version(name, version), repeatable=True)

    def restore(self, name: ExpertName, version: int | None = None) -> None:
        path = _path(name) if version is None else _version(name, version)
        self._transport.send("POST", f"{path}/restore", repeatable=True)

    def add_points(self, name: ExpertName, version: int, points: Sequence[CurvePoint]) -> int:
        check_points(len(points))
        body = {"points": [point.model_dump(mode="json") for point in points]}
        path = f"{_version(name, version)}/curve"
        # A point that is there already is passed over.
        return self._change(dict[str, int], "POST", path, body, repeatable=True)["added"]

    def curve(self, name: ExpertName, version: int, *, split: str | None = None, points: int | None = None) -> Curve:
        params = [("split", split)] if split is not None else []
        params += [("points", str(points))] if points is not None else []
        return self._get(Curve, f"{_version(name, version)}/curve", params)

    def lineage(self, digest: str) -> Lineage:
        if not is_digest(digest):
            raise NotFoundError("a digest is 64 hex digits in lower case")
        return self._checked(f"the lineage of {digest}", self._get(Lineage, f"/lineage/{digest}"), root=digest)

    def push_run(self, namespace: str, data: bytes) -> Run:
        check_namespace(namespace)
        headers = {"Content-Type": "application/octet-stream"}
        # The same run again does nothing more.
        answer = self._transport.send("POST", f"/runs/{namespace}", content=data, headers=headers, repeatable=True)
        samples = sha256(data.partition(b"\n")[2])
        return self._checked(
            "the run just pushed", self._read(Run, answer), namespace=namespace, samples_digest=samples
        )

    def list_runs(self, query: RunQuery | None = None, *, cursor: str | None = None, limit: int = 50) -> Page[Run]:
        query = query or RunQuery()
        page = self._get(Page[Run], "/runs", [*_given(query), *_page(cursor, limit)])
        given = query.model_dump(include={"namespace", "task", "strategy"}, exclude_none=True)
        for run in page.items:
            if query.digest is not None and not run.digest.startswith(query.digest):
                given["digest"] = query.digest
            check_answer(self.location, "runs", run, given)
        return page

    def get_run(self, namespace: str, digest: str) -> RunDetail:
        run = self._get(RunDetail, _run(namespace, digest))
        return self._checked(f"the run {namespace}/{digest}", run, namespace=namespace, digest=digest)

    def delete_run(self, namespace: str, digest: str) -> None:
        self._transport.send("DELETE", _run(namespace, digest), repeatable=True)

    def list_boards(
        self, *, task: str | None = None, base: str | None = None, cursor: str | None = None, limit: int = 50
    ) -> Page[Board]:
        params = [(field, value) for field, value in (("task", task), ("base", base)) if value is not None]
        return self._get(Page[Board], "/boards", [*params, *_page(cursor, limit)])

    def board(self, query: BoardQuery, *, cursor: str | None = None, limit: int = 50) -> BoardPage:
        return self._get(BoardPage, "/leaderboard", [*_given(query), *_page(cursor, limit)])

    def alias_runs(self, name: ExpertName, alias: str, *, cursor: str | None = None, limit: int = 50) -> Page[AliasRun]:
        check_alias(alias)
        path = f"{_path(name)}/aliases/{quote(alias, safe='')}/runs"
        return self._get(Page[AliasRun], path, _page(cursor, limit))

    def verdict(self, query: VerdictQuery) -> Judgement:
        fields = query.model_dump(exclude_none=True)
        params = [("task", task) for task in fields.pop("tasks")]
        params += [("noise", reference) for reference in fields.pop("noise")]
        return self._get(Judgement, "/verdict", [*params, *((name, str(value)) for name, value in fields.items())])

    def create_namespace(self, name: str, description: str = "") -> Namespace:
        return self._change(Namespace, "POST", "/namespaces", {"name": name, "description": description})

    def list_namespaces(self, *, cursor: str | None = None, limit: int = 50) -> Page[Namespace]:
        return self._get(Page[Namespace], "/namespaces", _page(cursor, limit))

    def put_base_model(
        self, fingerprint: str, id: str, revision: str | None, targets: Mapping[str, int]
    ) -> BaseModelInfo:
        if not is_digest(fingerprint):
            raise InvalidRequestError("fingerprint: give 64 hex digits in lower case")
        body = {"id": id, "revision": revision, "targets": dict(targets)}
        base = self._change(BaseModelInfo, "PUT", f"/base-models/{fingerprint}", body, repeatable=True)
        return self._checked(f"the base model {fingerprint}", base, fingerprint=fingerprint)

    def get_base_model(self, fingerprint: str) -> BaseModelInfo:
        if not is_digest(fingerprint):
            raise NotFoundError(f"there is no base model with the fingerprint {fingerprint[:80]!r}")
        base = self._get(BaseModelInfo, f"/base-models/{fingerprint}")
        return self._checked(f"the base model {fingerprint}", base, fingerprint=fingerprint)

    def list_base_models(self, *, cursor: str | None = None, limit: int = 50) -> Page[BaseModelInfo]:
        return self._get(Page[BaseModelInfo], "/base-models", _page(cursor, limit))

    def create_token(self, name: str, scopes: Sequence[Scope], *, days: float | None = None) -> NewToken:
        return self._change(NewToken, "POST", "/tokens", {"name": name, "scopes": list(scopes), "days": days})

    def list_tokens(self) -> Sequence[TokenInfo]:
        return self._get(list[TokenInfo], "/tokens")

    def revoke_token(self, id: int) -> TokenInfo:
        check_number("token", id)
        return self._read(TokenInfo, self._transport.send("DELETE", f"/tokens/{id}", repeatable=True))

    def audit(self, *, cursor: str | None = None, limit: int = 50) -> Page[AuditEntry]:
        return self._get(Page[AuditEntry], "/audit", _page(cursor, limit))

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _get(self, shape: type[T], path: str, params: Sequence[tuple[str, str]] = ()) -> T:
        return self._read(shape, self._transport.send("GET", path, params=params, repeatable=True))

    def _change(self, shape: type[T], method: str, path: str, body: Any, *, repeatable: bool = False) -> T:
        try:
            content = json.dumps(body, allow_nan=False, ensure_ascii=False).encode()
        except ValueError as error:
            raise InvalidRequestError(
                "a number that is not finite, or a text that is not Unicode, cannot be sent to a registry"
            ) from error
        headers = {"Content-Type": "application/json"}
        return self._read(
            shape, self._transport.send(method, path, content=content, headers=headers, repeatable=repeatable)
        )

    def _checked(self, request: str, answer: T, **expected: object) -> T:
        check_answer(self.location, request, answer, expected)
        return answer

    def _checked_items(self, request: str, page: Page[T], **expected: object) -> Page[T]:
        for item in page.items:
            check_answer(self.location, request, item, expected)
        return page

    def _read(self, shape: type[T], answer: Answer) -> T:
        adapter = TypeAdapter(shape)
        try:
            try:
                # A newer server may send fields that this client does not know.
                return adapter.validate_json(answer.content, extra="ignore")
            except pydantic.ValidationError as error:
                remaining = self._drop_unknown_items(answer.content, error)
                if remaining is None:
                    raise
                return adapter.validate_json(remaining, extra="ignore")
        except pydantic.ValidationError as error:
            raise RegistryError(
                f"{self.location} answered what this t2 does not understand ({answer.status} for {answer.asked}): "
                "it is no t2 registry, or a much newer one; check the URL, or upgrade t2"
            ) from error

    def _drop_unknown_items(self, content: bytes, error: pydantic.ValidationError) -> bytes | None:
        """Drop the list items that this client cannot parse; warn of each reason once.

        A newer server may have values that this client does not know, such as kinds of experts.

        Returns:
            None if anything except items of one list cannot be parsed.
        """
        dropped: dict[int, tuple[tuple[int | str, ...], object]] = {}
        places: set[str | None] = set()
        for detail in error.errors(include_url=False, include_context=False):
            match detail["loc"]:
                case (int(index), *rest):
                    places.add(None)
                case (str(name), int(index), *rest) if name in _LISTS:
                    places.add(name)
                case _:
                    return None
            dropped.setdefault(index, (tuple(rest), detail["input"]))
        if len(places) != 1:
            return None
        answer = json.loads(content)
        (place,) = places
        items = answer if place is None else answer[place]
        if not all(isinstance(items[index], dict) for index in dropped):
            return None
        for index, (where, value) in dropped.items():
            self._warn_once(items[index], ".".join(map(str, where)), value)
        kept = [item for index, item in enumerate(items) if index not in dropped]
        return json.dumps(kept if place is None else {**answer, place: kept}).encode()

    def _warn_once(self, item: Mapping[str, Any], field: str, value: object) -> None:
        shown = repr(value) if isinstance(value, (str, int, float)) else type(value).__name__
        if (field, shown) in self._warned:
            return
        self._warned.add((field, shown))
        named = next((str(item[key]) for key in ("name", "alias", "digest", "id") if key in item), "an item")
        _log.warning(
            "%s: left %.150r and similar items out of a list: this t2 does not know %s %.100s; upgrade t2",
            self.location,
            named,
            field or "it",
            shown,
        )


def _path(name: ExpertName) -> str:
    known_name(name)
    return f"/experts/{name.namespace}/{name.name}"


def _version(name: ExpertName, number: int) -> str:
    path = _path(name)
    check_number(f"version of {name}", number)
    return f"{path}/versions/{number}"


def _run(namespace: str, digest: str) -> str:
    if not is_digest(digest):
        raise NotFoundError("a digest is 64 hex digits in lower case")
    return f"/runs/{known_namespace(namespace)}/{digest}"


def _given(query: RunQuery | BoardQuery | VersionQuery) -> list[tuple[str, str]]:
    return [(field, str(value)) for field, value in query.model_dump(exclude_none=True).items()]


def _page(cursor: str | None, limit: int) -> list[tuple[str, str]]:
    return [("limit", str(limit)), *([("cursor", cursor)] if cursor is not None else [])]


def _range(metric: MetricRange) -> str:
    ends = ("" if end is None else repr(end) for end in (metric.minimum, metric.maximum))
    return ":".join([metric.name, *ends])
