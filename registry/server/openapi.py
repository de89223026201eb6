"""The OpenAPI schema: what FastAPI knows of the operations, with examples, scopes and the one shape of errors."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from t2.registry.server.examples import DETAILS, EXAMPLES, PARAMETERS
from t2.registry.server.operations import BINARY, JSON, Operation
from t2.registry.server.problems import MEDIA_TYPE, RETRY_SECONDS, TITLES

DESCRIPTION = """\
Experts: versions, aliases, tags, reward curves, lineage and content.

What may change between versions of this API, and what clients may rely on, is part of t2's documentation. Lists come in
pages: `next` of one is the `cursor` of the following. Unknown fields in answers are to be passed over; unknown fields
and parameters in requests are refused.
"""
_TOKEN = "token"
_METHODS = ("get", "head", "post", "put", "patch", "delete")


def build_schema(app: FastAPI, operations: dict[str, Operation]) -> dict[str, Any]:
    """The schema of an application.

    Args:
        operations: by id; others need no token.
    """
    schema = app.openapi()
    schema["info"]["description"] = DESCRIPTION
    components = schema["components"]
    for name in ("HTTPValidationError", "ValidationError"):
        components["schemas"].pop(name, None)
    components["securitySchemes"] = {
        _TOKEN: {
            "type": "http",
            "scheme": "bearer",
            "description": "`Authorization: Bearer t2r_…`. Not needed while the registry holds no token at all.",
        }
    }
    for path in schema["paths"].values():
        for method in _METHODS:
            if method in path:
                _complete(path[method], operations.get(path[method]["operationId"]))
    return schema


def _complete(described: dict[str, Any], operation: Operation | None) -> None:
    example = EXAMPLES[described["operationId"]]
    for parameter in described.get("parameters", ()):
        # An absent parameter is one that is not sent; null cannot be sent.
        kinds = [kind for kind in parameter["schema"].pop("anyOf", ()) if kind != {"type": "null"}]
        if kinds:
            parameter["schema"].update(kinds[0])
        name = parameter["name"].lower()
        for known in (name, f"{described['operationId']}.{name}"):
            if known in PARAMETERS:
                parameter["example"] = PARAMETERS[known]
    body = described.get("requestBody")
    if body is not None:
        body["content"][JSON]["example"] = example.body
    if operation is not None:
        scope = described.pop("x-scope")
        described["security"] = [{_TOKEN: []}]
        described["description"] = f"{described.get('description', '')}\n\nNeeds the scope `{scope}`.".strip()
        if operation.takes == BINARY:
            content = {operation.takes: {"schema": {"type": "string", "format": "binary"}}}
            described["requestBody"] = {"required": True, "content": content}
    for status, response in described["responses"].items():
        content = response.get("content", {})
        if status.isdecimal() and int(status) >= 400:
            _error(int(status), response)
        elif example.answer is None:
            # Nothing, or bytes.
            response["content"] = {BINARY: content[BINARY]} if BINARY in content else {}
        else:
            for media in content.values():
                media["example"] = example.answer


def _error(status: int, response: dict[str, Any]) -> None:
    code, title = TITLES[status]
    response["description"] = title
    response["content"] = {
        MEDIA_TYPE: {
            "schema": {"$ref": "#/components/schemas/Problem"},
            "example": {
                "type": f"urn:t2:problem:{code}",
                "title": title,
                "status": status,
                "detail": DETAILS[status],
                "code": code,
                "request_id": "5d0e4f0e9c1a6b1b",
            },
        }
    }
    if status in (429, 503):
        response["headers"] = {
            "Retry-After": {"description": "Seconds.", "schema": {"type": "string"}, "example": str(RETRY_SECONDS)}
        }
