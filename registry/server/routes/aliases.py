"""Aliases and their history."""

from __future__ import annotations

from typing import Annotated

from fastapi import Query
from pydantic import TypeAdapter
from starlette.requests import Request
from starlette.responses import Response

from t2.core.references import ALIAS_PATTERN
from t2.registry.schemas import AliasEvent, AliasInfo, Page
from t2.registry.server.bodies import AliasBody
from t2.registry.server.operations import JSON, Operation, answer, answer_list, done, expert_name, registry
from t2.registry.server.parameters import AliasPath, Cursor, Limit, NamePath, NamespacePath, Reason

_ALIASES = TypeAdapter(list[AliasInfo])


def list_aliases(request: Request, namespace: NamespacePath, name: NamePath) -> Response:
    """List an expert's aliases by name."""
    return answer_list(_ALIASES, registry(request).list_aliases(expert_name(namespace, name)))


def set_alias(
    request: Request, namespace: NamespacePath, name: NamePath, alias: AliasPath, body: AliasBody
) -> Response:
    """Point an alias to a version."""
    expert = expert_name(namespace, name)
    return answer(registry(request).set_alias(expert, alias, body.version, reason=body.reason))


def delete_alias(
    request: Request, namespace: NamespacePath, name: NamePath, alias: AliasPath, reason: Reason = ""
) -> Response:
    """Remove an alias; its history stays."""
    registry(request).delete_alias(expert_name(namespace, name), alias, reason=reason)
    return done()


def alias_history(
    request: Request,
    namespace: NamespacePath,
    name: NamePath,
    alias: Annotated[str | None, Query(pattern=ALIAS_PATTERN, description="Of this one only.")] = None,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Response:
    """List where aliases pointed and who moved them, newest first."""
    return answer(registry(request).alias_history(expert_name(namespace, name), alias, cursor=cursor, limit=limit))


_PATH = "/v1/experts/{namespace}/{name}"
OPERATIONS = (
    Operation("list_aliases", "GET", f"{_PATH}/aliases", "read", list_aliases, list[AliasInfo]),
    Operation("set_alias", "PUT", f"{_PATH}/aliases/{{alias}}", "write", set_alias, AliasInfo, takes=JSON),
    Operation("delete_alias", "DELETE", f"{_PATH}/aliases/{{alias}}", "write", delete_alias, status=204),
    Operation("alias_history", "GET", f"{_PATH}/alias-history", "read", alias_history, Page[AliasEvent]),
)
