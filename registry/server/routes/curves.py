"""Reward curves."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import Query
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from t2.core.curve import CurvePoint
from t2.registry.schemas import Curve
from t2.registry.server.bodies import PointsBody
from t2.registry.server.limits import LEASE, Lease, Workers
from t2.registry.server.operations import JSON, Operation, answer, expert_name, ready, registry
from t2.registry.server.parameters import NamePath, NamespacePath, NumberPath

POINT_BYTES = 250
"""Bytes of one point's JSON at most, which are set aside before a curve is read."""


class Added(BaseModel):
    """How many points are new."""

    added: int


async def get_curve(
    request: Request,
    namespace: NamespacePath,
    name: NamePath,
    number: NumberPath,
    split: Annotated[Literal["train", "validation"] | None, Query(description="Both without.")] = None,
    points: Annotated[
        int | None, Query(ge=3, le=100_000, description="Downsample to at most so many of each split.")
    ] = None,
) -> Response:
    """Show a version's reward curve, whole or downsampled."""
    expert, service = expert_name(namespace, name), registry(request)
    lease: Lease = request.scope[LEASE]
    reads: Workers = request.app.state.curves
    await lease.promise(POINT_BYTES * min(service.limits.points, points or service.limits.points))
    return ready(await reads.run(lease.owner, lambda: service.curve_json(expert, number, split=split, points=points)))


def add_points(
    request: Request, namespace: NamespacePath, name: NamePath, number: NumberPath, body: PointsBody
) -> Response:
    """Add points to a version's reward curve; those that are there already are passed over."""
    points = [CurvePoint.model_construct(**vars(point)) for point in body.points]
    return answer(Added(added=registry(request).add_points(expert_name(namespace, name), number, points)))


_PATH = "/v1/experts/{namespace}/{name}/versions/{number}/curve"
OPERATIONS = (
    Operation("get_curve", "GET", _PATH, "read", get_curve, Curve),
    Operation("add_points", "POST", _PATH, "write", add_points, Added, errors=(409,), takes=JSON),
)
