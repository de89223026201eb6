"""``/v1/experts/…/versions``: uploads, versions, their metrics; and looking versions up."""

from __future__ import annotations

from typing import Annotated

from fastapi import Header, Query
from starlette.requests import Request
from starlette.responses import Response

from t2.core.manifest import Kind
from t2.core.references import ALIAS_PATTERN, DIGEST_PATTERN, Reference, parse_reference
from t2.registry.names import MAX_NOTE_BYTES
from t2.registry.schemas import Page, Version, VersionDetail, VersionQuery
from t2.registry.server.bodies import NO_NUL, MetricsBody
from t2.registry.server.operations import BINARY, JSON, Operation, answer, done, expert_name, registry
from t2.registry.server.parameters import Cursor, Limit, NamePath, NamespacePath, NumberPath
from t2.registry.server.uploads import Uploads


def list_versions(
    request: Request, namespace: NamespacePath, name: NamePath, cursor: Cursor = None, limit: Limit = 50
) -> Response:
    """List an expert's versions, newest first, the deleted ones among them."""
    return answer(registry(request).list_versions(expert_name(namespace, name), cursor=cursor, limit=limit))


async def publish_version(
    request: Request,
    namespace: NamespacePath,
    name: NamePath,
    description: Annotated[
        str, Query(max_length=MAX_NOTE_BYTES, pattern=NO_NUL, description="A note on this version.")
    ] = "",
    idempotency_key: Annotated[
        str | None,
        Header(
            pattern=r"^[\x21-\x7e]{1,100}$",
            description="Chosen by the client, new for each upload: the same upload under the same key does nothing "
            "more than the first.",
        ),
    ] = None,
) -> Response:
    """Upload an expert's file as the next version; 201 when it is new, 200 when this content was there already."""
    expert = expert_name(namespace, name)
    service = registry(request)
    uploads: Uploads = request.app.state.uploads
    version = await uploads.take(
        request,
        lambda data: service.publish(expert, data, description=description, idempotency_key=idempotency_key),
    )
    return answer(version, 201 if version.created else 200)


def get_version(request: Request, namespace: NamespacePath, name: NamePath, number: NumberPath) -> Response:
    """Show a version with its manifest."""
    return answer(registry(request).resolve(Reference(expert_name(namespace, name), version=number)))


def delete_version(request: Request, namespace: NamespacePath, name: NamePath, number: NumberPath) -> Response:
    """Mark a version as deleted; it can be restored."""
    registry(request).delete(expert_name(namespace, name), number)
    return done()


def restore_version(request: Request, namespace: NamespacePath, name: NamePath, number: NumberPath) -> Response:
    """Undo the deletion of a version."""
    registry(request).restore(expert_name(namespace, name), number)
    return done()


def set_metrics(
    request: Request, namespace: NamespacePath, name: NamePath, number: NumberPath, body: MetricsBody
) -> Response:
    """Set metrics of a version; others stay."""
    return answer(registry(request).set_metrics(expert_name(namespace, name), number, body.root))


def resolve(
    request: Request,
    reference: Annotated[
        str, Query(min_length=1, max_length=300, pattern=NO_NUL, description="Such as `team/math@production`.")
    ],
) -> Response:
    """Find the version that a reference means."""
    return answer(registry(request).resolve(parse_reference(reference)))


def search_versions(
    request: Request,
    fingerprint: Annotated[str | None, Query(pattern=DIGEST_PATTERN, description="Of the base model.")] = None,
    kind: Annotated[Kind | None, Query()] = None,
    domain: Annotated[str | None, Query(max_length=200, pattern=NO_NUL)] = None,
    digest: Annotated[str | None, Query(pattern=DIGEST_PATTERN)] = None,
    alias: Annotated[str | None, Query(pattern=ALIAS_PATTERN, description="Versions it points to.")] = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Response:
    """List versions of all experts, newest first."""
    query = VersionQuery(fingerprint=fingerprint, kind=kind, domain=domain, digest=digest, alias=alias)
    return answer(registry(request).search_versions(query, cursor=cursor, limit=limit))


_PATH = "/v1/experts/{namespace}/{name}/versions"
_NUMBER = f"{_PATH}/{{number}}"
OPERATIONS = (
    Operation("list_versions", "GET", _PATH, "read", list_versions, Page[Version]),
    Operation(
        "publish_version",
        "POST",
        _PATH,
        "write",
        publish_version,
        Version,
        201,
        (409,),
        takes=BINARY,
        responses={200: {"model": Version, "description": "The content was there already"}},
    ),
    Operation("get_version", "GET", _NUMBER, "read", get_version, VersionDetail),
    Operation("delete_version", "DELETE", _NUMBER, "write", delete_version, status=204, errors=(409,)),
    Operation("restore_version", "POST", f"{_NUMBER}/restore", "write", restore_version, status=204),
    Operation("set_metrics", "PATCH", f"{_NUMBER}/metrics", "write", set_metrics, Version, takes=JSON),
    Operation("resolve", "GET", "/v1/resolve", "read", resolve, VersionDetail, errors=(404,)),
    Operation("search_versions", "GET", "/v1/versions", "read", search_versions, Page[Version]),
)
