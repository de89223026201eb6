"""``/v1/namespaces``."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from t2.registry.schemas import Namespace, Page
from t2.registry.server.bodies import NamespaceBody
from t2.registry.server.operations import JSON, Operation, answer, registry
from t2.registry.server.parameters import Cursor, Limit


def list_namespaces(request: Request, cursor: Cursor = None, limit: Limit = 50) -> Response:
    """List namespaces by name."""
    return answer(registry(request).list_namespaces(cursor=cursor, limit=limit))


def create_namespace(request: Request, body: NamespaceBody) -> Response:
    """Make a namespace; uploads make theirs by themselves."""
    return answer(registry(request).create_namespace(body.name, body.description), 201)


OPERATIONS = (
    Operation("list_namespaces", "GET", "/v1/namespaces", "read", list_namespaces, Page[Namespace]),
    Operation("create_namespace", "POST", "/v1/namespaces", "write", create_namespace, Namespace, 201, (409,), JSON),
)
