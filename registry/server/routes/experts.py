"""``/v1/experts`` and what belongs to an expert as a whole."""

from __future__ import annotations

from typing import Annotated, Any

import pydantic
from fastapi import Query
from starlette.requests import Request
from starlette.responses import Response

from t2.core.errors import InvalidRequestError
from t2.core.manifest import Kind
from t2.core.references import NAME_PATTERN
from t2.registry.schemas import Expert, ExpertQuery, MetricRange, Page, Sort, Tag
from t2.registry.server.bodies import NO_NUL, DescriptionBody, TagsBody
from t2.registry.server.operations import JSON, Operation, answer, done, expert_name, ready, registry
from t2.registry.server.parameters import Cursor, Limit, NamePath, NamespacePath

_END = r"([-+]?[0-9]{1,20}(\.[0-9]{1,20})?([eE][-+]?[0-9]{1,3})?)?"
_METRIC = rf"^[A-Za-z0-9_][A-Za-z0-9_.,@/:-]{{0,99}}:{_END}:{_END}$"


def list_experts(
    request: Request,
    namespace: Annotated[str | None, Query(pattern=NAME_PATTERN)] = None,
    text: Annotated[
        str | None,
        Query(min_length=1, max_length=100, pattern=NO_NUL, description="Part of name, description or task."),
    ] = None,
    base: Annotated[
        str | None,
        Query(min_length=1, max_length=200, pattern=NO_NUL, description="A base model's fingerprint, or its id."),
    ] = None,
    task: Annotated[str | None, Query(max_length=200, pattern=NO_NUL)] = None,
    domain: Annotated[str | None, Query(max_length=200, pattern=NO_NUL)] = None,
    kind: Annotated[Kind | None, Query()] = None,
    tag: Annotated[list[Tag], Query(max_length=10, description="All of these tags.")] = [],  # noqa: B006 - copied
    metric: Annotated[
        list[Annotated[str, pydantic.StringConstraints(pattern=_METRIC)]],
        Query(max_length=5, description="`NAME:MIN:MAX`, both ends inside; an empty end is open."),
    ] = [],  # noqa: B006 - copied
    sort: Annotated[Sort, Query(description="`-` is descending; `score` lists only experts that have one.")] = (
        "-updated"
    ),
    deleted: Annotated[bool, Query(description="List the deleted ones instead.")] = False,
    cursor: Cursor = None,
    limit: Limit = 50,
) -> Response:
    """List experts; every condition but namespace, text and tags is about the latest version."""
    with_ranges: dict[str, Any] = {"metrics": tuple(_metric_range(each) for each in metric)}
    query = ExpertQuery(
        namespace=namespace,
        text=text,
        base=base,
        task=task,
        domain=domain,
        kind=kind,
        tags=tuple(tag),
        sort=sort,
        deleted=deleted,
        **with_ranges,
    )
    return ready(registry(request).list_experts_json(query, cursor=cursor, limit=limit))


def get_expert(request: Request, namespace: NamespacePath, name: NamePath) -> Response:
    """Show an expert and its latest version."""
    return ready(registry(request).get_expert_json(expert_name(namespace, name)))


def describe_expert(request: Request, namespace: NamespacePath, name: NamePath, body: DescriptionBody) -> Response:
    """Set an expert's description."""
    return answer(registry(request).describe_expert(expert_name(namespace, name), body.description))


def delete_expert(request: Request, namespace: NamespacePath, name: NamePath) -> Response:
    """Mark an expert as deleted, with all its versions; it can be restored."""
    registry(request).delete(expert_name(namespace, name))
    return done()


def restore_expert(request: Request, namespace: NamespacePath, name: NamePath) -> Response:
    """Undo the deletion of an expert."""
    registry(request).restore(expert_name(namespace, name))
    return done()


def change_tags(request: Request, namespace: NamespacePath, name: NamePath, body: TagsBody) -> Response:
    """Add and remove tags."""
    return answer(registry(request).change_tags(expert_name(namespace, name), add=body.add, remove=body.remove))


def _metric_range(text: str) -> MetricRange:
    name, *ends = text.rsplit(":", 2)
    try:
        minimum, maximum = (float(end) if end else None for end in ends)
        return MetricRange(name=name, minimum=minimum, maximum=maximum)
    except ValueError as error:
        raise InvalidRequestError(
            f"query.metric: {text[:200]!r} is no range; write NAME:MIN:MAX, where an empty end is open"
        ) from error


_PATH = "/v1/experts/{namespace}/{name}"
OPERATIONS = (
    Operation("list_experts", "GET", "/v1/experts", "read", list_experts, Page[Expert]),
    Operation("get_expert", "GET", _PATH, "read", get_expert, Expert),
    Operation("describe_expert", "PATCH", _PATH, "write", describe_expert, Expert, takes=JSON),
    Operation("delete_expert", "DELETE", _PATH, "write", delete_expert, status=204),
    Operation("restore_expert", "POST", f"{_PATH}/restore", "write", restore_expert, status=204),
    Operation("change_tags", "POST", f"{_PATH}/tags", "write", change_tags, Expert, takes=JSON),
)
