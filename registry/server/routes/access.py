"""``/v1/tokens`` and ``/v1/audit``: who may do what, and who did."""

from __future__ import annotations

from typing import Annotated

from fastapi import Path
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from t2.registry.schemas import AuditEntry, NewToken, Page, TokenInfo
from t2.registry.server.auth import Authenticator
from t2.registry.server.bodies import MAX_INT, TokenBody
from t2.registry.server.operations import JSON, Operation, answer, answer_list, registry
from t2.registry.server.parameters import Cursor, Limit

_TOKENS = TypeAdapter(list[TokenInfo])


def list_tokens(request: Request) -> Response:
    """List access tokens, oldest first, without their secrets."""
    return answer_list(_TOKENS, registry(request).list_tokens())


def create_token(request: Request, body: TokenBody) -> Response:
    """Make an access token; its secret is told this once. The first one closes an open registry."""
    made = registry(request).create_token(body.name, body.scopes, days=body.days)
    _forget(request)
    return answer(made, 201)


def revoke_token(
    request: Request, id: Annotated[int, Path(ge=1, le=MAX_INT, description="The token's number.")]
) -> Response:
    """Revoke an access token, for ever."""
    revoked = registry(request).revoke_token(id)
    _forget(request)
    return answer(revoked)


def list_audit(request: Request, cursor: Cursor = None, limit: Limit = 50) -> Response:
    """List who did what, newest first."""
    return answer(registry(request).audit(cursor=cursor, limit=limit))


def _forget(request: Request) -> None:
    authenticator: Authenticator = request.app.state.authenticator
    authenticator.forget()


OPERATIONS = (
    Operation("list_tokens", "GET", "/v1/tokens", "admin", list_tokens, list[TokenInfo]),
    Operation("create_token", "POST", "/v1/tokens", "admin", create_token, NewToken, 201, takes=JSON),
    Operation("revoke_token", "DELETE", "/v1/tokens/{id}", "admin", revoke_token, TokenInfo),
    Operation("list_audit", "GET", "/v1/audit", "admin", list_audit, Page[AuditEntry]),
)
