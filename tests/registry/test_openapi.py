"""The OpenAPI schema: complete, with examples that fit, and kept by the server.

``T2_TEST_SCHEMATHESIS_EXAMPLES`` makes the search for requests that break it longer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

import jsonschema_rs
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from schemathesis.specs.openapi.schemas import OpenApiSchema

from t2.core.references import parse_name
from t2.registry.blobs.local import LocalBlobs
from t2.registry.db import migrate
from t2.registry.db.database import Database
from t2.registry.open import open_embedded
from t2.registry.server.app import OPERATIONS, create_app
from t2.registry.services.actor import Actor
from t2.registry.services.service import Service
from t2.registry.settings import ServerSettings
from tests.registry.samples import expert_bytes, run_bytes
from tests.registry.serving import living

EXAMPLES = int(os.environ.get("T2_TEST_SCHEMATHESIS_EXAMPLES", "4"))

IDS = [
    "add_points",
    "alias_history",
    "change_tags",
    "create_namespace",
    "create_token",
    "delete_alias",
    "delete_expert",
    "delete_run",
    "delete_version",
    "describe_expert",
    "get_base_model",
    "get_blob",
    "get_board",
    "get_content",
    "get_curve",
    "get_expert",
    "get_lineage",
    "get_run",
    "get_samples",
    "get_verdict",
    "get_version",
    "healthz",
    "list_alias_runs",
    "list_aliases",
    "list_audit",
    "list_base_models",
    "list_boards",
    "list_experts",
    "list_namespaces",
    "list_runs",
    "list_tokens",
    "list_versions",
    "metrics",
    "publish_version",
    "push_run",
    "put_base_model",
    "readyz",
    "resolve",
    "restore_expert",
    "restore_version",
    "revoke_token",
    "search_versions",
    "set_alias",
    "set_metrics",
]
"""Names that generated clients are made of: they are added to, never changed."""

PLAIN = {"healthz", "readyz", "metrics"}
RULES_BEYOND = {
    "alias_history",  # cursors are signed by their query
    "get_board",
    "list_alias_runs",
    "list_audit",
    "list_base_models",
    "list_boards",
    "list_experts",
    "list_namespaces",
    "get_verdict",  # references are of runs that are there
    "list_runs",  # so are references
    "list_versions",
    "push_run",  # a file is more than bytes
    "search_versions",
    "create_token",  # names are printable
    "publish_version",  # a file is more than bytes
    "resolve",  # a reference is more than a pattern
    "set_metrics",  # of a version that has few
}
"""Operations that refuse some requests that the schema allows."""


@pytest.fixture(scope="module")
def schema(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    with open_embedded(tmp_path_factory.mktemp("registry")) as service:
        yield json.loads(create_app(service, ServerSettings()).state.openapi())


def operations(schema: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in schema["paths"].values():
        yield from path.values()


def check(schema: dict[str, Any], shape: dict[str, Any], example: Any) -> None:
    jsonschema_rs.validator_for({**shape, "components": schema["components"]}).validate(example)


def test_operation_ids_stay(schema: dict[str, Any]) -> None:
    assert sorted(each["operationId"] for each in operations(schema)) == IDS


def test_every_parameter_body_and_answer_has_an_example_that_fits(schema: dict[str, Any]) -> None:
    seen = 0
    for each in operations(schema):
        for parameter in each.get("parameters", ()):
            if parameter["name"] != "cursor":
                check(schema, parameter["schema"], parameter["example"])
        contents = [answer.get("content", {}) for answer in each["responses"].values()]
        for content in [each.get("requestBody", {}).get("content", {}), *contents]:
            for kind, media in content.items():
                if kind != "application/octet-stream":
                    check(schema, media["schema"], media["example"])
                    seen += 1
    assert seen > 100


def test_every_operation_says_its_errors_its_scope_and_what_it_does(schema: dict[str, Any]) -> None:
    for each in operations(schema):
        if each["operationId"] in PLAIN:
            continue
        assert {"401", "403", "422", "429", "500", "503"} <= each["responses"].keys()
        assert each["security"] == [{"token": []}]
        assert "Needs the scope `" in each["description"]
        for status, answer in each["responses"].items():
            if int(status) >= 400:
                assert list(answer["content"]) == ["application/problem+json"]


@pytest.fixture(scope="module", params=["sqlite", "postgresql"])
def api(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenApiSchema]:
    """The API over each database, with an expert in it."""
    folder = tmp_path_factory.mktemp("registry")
    url = f"sqlite:///{folder / 'registry.db'}"
    if request.param == "postgresql":
        url = request.getfixturevalue("postgres_module_url")
    database = Database(url)
    migrate.migrate(database)
    with Service(database, LocalBlobs(folder / "blobs"), Actor("cli", "test")) as service:
        for seed in range(3):
            version = service.publish(parse_name("team/math"), expert_bytes(seed))
            service.push_run("team", run_bytes(seed, experts=(version.digest,)))
        service.set_alias(parse_name("team/math"), "production", 2)
        secret = service.create_token("test", ["admin"]).secret
        app = living(create_app(service, ServerSettings(allowed_hosts=("testserver",))))
        config = schemathesis.Config.from_dict({"auth": {"openapi": {"token": {"bearer": secret}}}})
        yield schemathesis.openapi.from_asgi("/v1/openapi.json", app, config=config)


@pytest.mark.parametrize("name", IDS)
def test_requests_within_the_schema_and_beyond_it_are_answered_as_it_says(api: OpenApiSchema, name: str) -> None:
    operation = api.find_operation_by_id(name)
    takes = {each.id for each in OPERATIONS if "{" in each.path or each.takes} | {"list_experts", "resolve"}
    for mode in GenerationMode:
        if mode is GenerationMode.NEGATIVE and name not in takes:
            continue

        @settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            phases=[Phase.explicit, Phase.generate],
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.as_strategy(generation_mode=mode))
        def keep(case: schemathesis.Case) -> None:
            case.call_and_validate(excluded_checks=[positive_data_acceptance] if name in RULES_BEYOND else [])

        keep()
