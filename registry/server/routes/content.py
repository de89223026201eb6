"""``/v1/blobs`` and the content of versions; how contents are sent."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from t2.core.references import Reference
from t2.registry.server.content import Blob, content
from t2.registry.server.operations import BINARY, Operation, expert_name, registry
from t2.registry.server.parameters import DigestPath, NamePath, NamespacePath, NumberPath
from t2.registry.settings import ServerSettings


def get_blob(request: Request, digest: DigestPath) -> Response:
    """Download a content by its digest."""
    size, ending = registry(request).kept(digest)
    return send(request, digest, size, f"{digest}.{ending}", immutable=True)


def get_content(request: Request, namespace: NamespacePath, name: NamePath, number: NumberPath) -> Response:
    """Download a version's file."""
    version = registry(request).resolve(Reference(expert_name(namespace, name), version=number))
    filename = f"{namespace}-{name}-{number}.safetensors"
    return send(request, version.digest, version.size, filename, immutable=False)


def send(request: Request, digest: str, size: int, filename: str, *, immutable: bool) -> Response:
    """The answer that a content is: its bytes, part of them, or where the store has them."""
    state = request.app.state
    settings: ServerSettings = state.settings
    store = registry(request).store
    location = None
    if settings.presign and request.method == "GET":
        location = store.url(digest, settings.presign_seconds, filename)
    blob = Blob(digest, size, filename, partial(store.get, digest))
    return content(
        request.headers, blob, immutable=immutable, location=location, reads=state.downloads, metrics=state.metrics
    )


_SENT = {"content": {BINARY: {"schema": {"type": "string", "format": "binary"}}}}
_RESPONSES: dict[int | str, Any] = {
    200: {"description": "The file", **_SENT},
    206: {"description": "The part that Range asked for", **_SENT},
    304: {"description": "The client has it already, as If-None-Match told"},
    307: {"description": "The store has it, at Location"},
}


def content_operations(what: str, path: str, handler: Callable[..., Response]) -> tuple[Operation, ...]:
    """``GET`` and ``HEAD`` of an address that answers with a content."""
    return tuple(
        Operation(
            f"{'head' if method == 'HEAD' else 'get'}_{what}",
            method,
            path,
            "read",
            handler,
            errors=(416,),
            responses=dict(_RESPONSES),
            listed=method == "GET",
        )
        for method in ("GET", "HEAD")
    )


OPERATIONS = (
    *content_operations("blob", "/v1/blobs/{digest}", get_blob),
    *content_operations("content", "/v1/experts/{namespace}/{name}/versions/{number}/content", get_content),
)
