"""``/v1/base-models`` and ``/v1/lineage``: what experts come from."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from t2.registry.schemas import BaseModelInfo, Lineage, Page
from t2.registry.server.bodies import BaseModelBody
from t2.registry.server.operations import JSON, Operation, answer, registry
from t2.registry.server.parameters import Cursor, DigestPath, FingerprintPath, Limit


def list_base_models(request: Request, cursor: Cursor = None, limit: Limit = 50) -> Response:
    """List base models, oldest first."""
    return answer(registry(request).list_base_models(cursor=cursor, limit=limit))


def get_base_model(request: Request, fingerprint: FingerprintPath) -> Response:
    """Show a base model and the ranks of its matrices."""
    return answer(registry(request).get_base_model(fingerprint))


def put_base_model(request: Request, fingerprint: FingerprintPath, body: BaseModelBody) -> Response:
    """Tell the ranks of a base model's matrices; uploads must agree with them from then on."""
    return answer(registry(request).put_base_model(fingerprint, body.id, body.revision, body.targets))


def get_lineage(request: Request, digest: DigestPath) -> Response:
    """Show what a content was mixed of, and what was mixed of it."""
    return answer(registry(request).lineage(digest))


OPERATIONS = (
    Operation("list_base_models", "GET", "/v1/base-models", "read", list_base_models, Page[BaseModelInfo]),
    Operation("get_base_model", "GET", "/v1/base-models/{fingerprint}", "read", get_base_model, BaseModelInfo),
    Operation(
        "put_base_model",
        "PUT",
        "/v1/base-models/{fingerprint}",
        "write",
        put_base_model,
        BaseModelInfo,
        errors=(409,),
        takes=JSON,
    ),
    Operation("get_lineage", "GET", "/v1/lineage/{digest}", "read", get_lineage, Lineage),
)
