"""An example of every operation: its parameters, its body and its answer, as the OpenAPI schema shows them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

DIGEST = "3f1b6ba3f2cb4f9e3a6c3e6a31c1f1a36f8d1d0c5f6f2f3b0b1a9a4e5d6c7b8a"
PARENT = "9c2e7d5b4a39f08e1d6c5b4a3928171605f4e3d2c1b0a99887766554433221ff"
FINGERPRINT = "5d41402abc4b2a76b9719d911017c592ae3b6d5c4f3e2d1c0b9a8f7e6d5c4b3a"
IDENTITY = "c3d2e1f00918273645f4e3d2c1b0a9988776655443322110ffeeddccbbaa9988"
DOCS = "1f0e3dad99908345f7439f8ffabdffc4b1c2d3e4f5061728394a5b6c7d8e9f00"
RECORD = "7c211433f02071597741e6ff5a8ea34789abbf43a1b2c3d4e5f60718293a4b5c"
NEXT = "WyI1MWQzZTJmMWEwYjljOGQ3IiwidCIsIjIwMjYtMDMtMDFUMTI6MDA6MDArMDA6MDAiLDQyXQ"
AT = "2026-03-01T12:00:00Z"

PARAMETERS: dict[str, Any] = {
    "namespace": "team",
    "name": "math",
    "number": 3,
    "alias": "production",
    "digest": DIGEST,
    "fingerprint": FINGERPRINT,
    "id": 1,
    "limit": 50,
    "text": "gsm",
    "base": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "task": "t2_gsm8k",
    "domain": "math",
    "kind": "expert",
    "tag": ["reviewed"],
    "metric": ["validation.score:0.4:"],
    "sort": "-score",
    "deleted": False,
    "description": "three epochs, KL 0.1",
    "idempotency-key": "0b1f7c52-5d0e-4f0e-9c1a-6b1b7f6f2f11",
    "reference": "team/math@production",
    "reason": "better on validation",
    "split": "train",
    "points": 200,
    "expert": "team/math",
    "strategy": "expert",
    "task_version": "1.0",
    "n_shot": 0,
    "docs_digest": DOCS,
    "filter": "none",
    "get_board.metric": "exact_match",
    "baseline": "team/math@production",
    "candidate": "team/math@4",
    "margin": 0.02,
    "noise": ["team/3f1b6ba3", "team/9c2e7d5b"],
    "get_verdict.task": ["t2_gsm8k"],
    "get_verdict.metric": "exact_match",
    "level": 0.95,
    "power": 0.8,
    "seed": 0,
}
"""By name, wherever they occur, or by operation and name."""


@dataclass(frozen=True)
class Example:
    """What an operation takes and answers."""

    answer: Any = None
    body: Any = None


VERSION: dict[str, Any] = {
    "name": "team/math",
    "version": 3,
    "digest": DIGEST,
    "size": 414840,
    "kind": "expert",
    "task": "t2_gsm8k",
    "domain": "math",
    "method": "reinforce",
    "description": "three epochs, KL 0.1",
    "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "base_fingerprint": FINGERPRINT,
    "matrices": 2,
    "values": 768,
    "training_docs": 7000,
    "aliases": ["production"],
    "metrics": {"validation.score": 0.43},
    "created_at": AT,
    "created_by": "api:ci",
    "deleted_at": None,
    "created": True,
}
MANIFEST: dict[str, Any] = {
    "schema_version": 1,
    "kind": "expert",
    "name": "math",
    "base": {"id": "HuggingFaceTB/SmolLM2-135M-Instruct", "revision": None, "fingerprint": FINGERPRINT},
    "targets": {"model.layers.0.mlp.up_proj.weight": 576, "model.layers.0.self_attn.k_proj.weight": 192},
    "task": "t2_gsm8k",
    "domain": "math",
    "method": "reinforce",
    "training": {"steps": 200, "seed": 0},
    "parents": [],
    "labels": [],
}
DETAIL = {**VERSION, "manifest": MANIFEST}
EXPERT: dict[str, Any] = {
    "name": "team/math",
    "kind": "expert",
    "description": "grade-school arithmetic",
    "tags": ["reviewed"],
    "versions": 3,
    "latest": VERSION,
    "created_at": AT,
    "updated_at": AT,
    "deleted_at": None,
    "aliases": {"production": 3, "stable": 2},
}
NAMESPACE = {"name": "team", "description": "the evaluation team", "created_at": AT}
ALIAS = {"alias": "production", "version": 3, "digest": DIGEST, "updated_at": AT, "updated_by": "api:ci"}
POINT: dict[str, Any] = {
    "step": 100,
    "split": "train",
    "reward": 0.38,
    "score": 0.41,
    "kl": 0.012,
    "learning_rate": 0.002,
    "gradient_norm": 0.7,
    "seconds": 512.5,
}
SCORE: dict[str, Any] = {
    "metric": "exact_match",
    "filter": "none",
    "score": 0.43,
    "stderr": 0.014,
    "low": 0.403,
    "high": 0.457,
    "n": 1319,
    "higher_is_better": True,
    "confirmed": True,
}
RUN: dict[str, Any] = {
    "namespace": "team",
    "digest": RECORD,
    "task": "t2_gsm8k",
    "task_version": "1.0",
    "n_shot": 0,
    "docs": 1319,
    "docs_digest": DOCS,
    "prompts_digest": PARENT,
    "samples_digest": FINGERPRINT,
    "samples_size": 561894,
    "model": "t2",
    "base": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "base_revision": None,
    "base_fingerprint": FINGERPRINT,
    "base_identity": IDENTITY,
    "strategy": "expert",
    "control": "none",
    "seed": 0,
    "record_digest": RECORD,
    "experts": [{"name": "math", "digest": DIGEST, "domain": "math", "references": ["team/math@3"]}],
    "scores": [SCORE],
    "evaluated_at": AT,
    "created_at": AT,
    "created_by": "api:ci",
    "created": True,
}
BOARD: dict[str, Any] = {
    "task": "t2_gsm8k",
    "task_version": "1.0",
    "n_shot": 0,
    "base": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "base_identity": IDENTITY,
    "docs": 1319,
    "docs_digest": DOCS,
    "runs": 12,
}
JUDGED: dict[str, Any] = {
    "task": "t2_gsm8k",
    "baseline_run": f"team/{RECORD}",
    "candidate_run": f"team/{PARENT}",
    "verdict": "REGRESSED",
    "metric": "exact_match",
    "filter": "none",
    "higher_is_better": True,
    "n": 1319,
    "baseline": 0.43,
    "candidate": 0.38,
    "difference": -0.05,
    "interval": [-0.072, -0.028],
    "test": "mcnemar",
    "p": 0.00001,
    "p_holm": 0.00001,
    "wins": 80,
    "losses": 146,
    "noise": 0.004,
    "smallest_drop": 0.032,
}
BASE: dict[str, Any] = {
    "id": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "revision": None,
    "targets": {"model.layers.0.mlp.up_proj.weight": 576, "model.layers.0.self_attn.k_proj.weight": 192},
}
BASE_INFO = {"fingerprint": FINGERPRINT, **BASE, "created_at": AT}
TOKEN: dict[str, Any] = {
    "id": 1,
    "name": "ci",
    "prefix": "t2r_4f0c9a",
    "scopes": ["write"],
    "created_at": AT,
    "expires_at": "2026-05-30T12:00:00Z",
    "last_used_at": None,
    "revoked_at": None,
}


def _page(item: Any, following: str | None = None) -> dict[str, Any]:
    return {"items": [item], "next": following}


EXAMPLES: dict[str, Example] = {
    "healthz": Example({"status": "alive"}),
    "readyz": Example({"status": "ready"}),
    "metrics": Example('t2_registry_requests_total{method="GET",route="/v1/experts",status="200"} 42.0\n'),
    "list_namespaces": Example(_page(NAMESPACE)),
    "create_namespace": Example(NAMESPACE, {"name": "team", "description": "the evaluation team"}),
    "list_experts": Example(_page(EXPERT, NEXT)),
    "get_expert": Example(EXPERT),
    "describe_expert": Example(EXPERT, {"description": "grade-school arithmetic"}),
    "delete_expert": Example(),
    "restore_expert": Example(),
    "change_tags": Example(EXPERT, {"add": ["reviewed"], "remove": ["draft"]}),
    "list_versions": Example(_page(VERSION)),
    "publish_version": Example(VERSION),
    "get_version": Example(DETAIL),
    "delete_version": Example(),
    "restore_version": Example(),
    "set_metrics": Example(VERSION, {"validation.score": 0.43}),
    "get_content": Example(),
    "get_blob": Example(),
    "resolve": Example(DETAIL),
    "search_versions": Example(_page(VERSION)),
    "get_curve": Example({"points": [POINT], "total": 1}),
    "add_points": Example({"added": 1}, {"points": [POINT]}),
    "list_aliases": Example([ALIAS]),
    "set_alias": Example(ALIAS, {"version": 3, "reason": "better on validation"}),
    "delete_alias": Example(),
    "alias_history": Example(
        _page(
            {
                "alias": "production",
                "version": 3,
                "previous": 2,
                "at": AT,
                "by": "api:ci",
                "reason": "better on validation",
            }
        )
    ),
    "list_base_models": Example(_page(BASE_INFO)),
    "get_base_model": Example(BASE_INFO),
    "put_base_model": Example(BASE_INFO, BASE),
    "get_lineage": Example(
        {
            "root": DIGEST,
            "nodes": [
                {"digest": DIGEST, "references": ["team/math@3"], "kind": "mixture"},
                {"digest": PARENT, "references": ["team/arithmetic@1"], "kind": "expert"},
            ],
            "edges": [{"child": DIGEST, "parent": PARENT, "alpha": 0.7}],
            "truncated": False,
        }
    ),
    "list_runs": Example(_page(RUN)),
    "push_run": Example(RUN),
    "get_run": Example({**RUN, "header": {"schema_version": 1, "task": "t2_gsm8k", "settings": {"adapt": "expert"}}}),
    "delete_run": Example(),
    "get_samples": Example(),
    "list_boards": Example(_page(BOARD)),
    "get_board": Example(
        {
            "board": BOARD,
            "metric": "exact_match",
            "filter": "none",
            "higher_is_better": True,
            "items": [{"score": SCORE, "run": RUN}],
            "next": None,
        }
    ),
    "get_verdict": Example(
        {
            "verdict": "REGRESSED",
            "reason": "the candidate is worse",
            "margin": 0.02,
            "level": 0.95,
            "power": 0.8,
            "tasks": [JUDGED],
            "unpaired": [],
        }
    ),
    "list_alias_runs": Example(_page({"version": 3, "since": AT, "current": True, "run": RUN})),
    "list_tokens": Example([TOKEN]),
    "create_token": Example(
        {**TOKEN, "secret": "t2r_4f0c9a…, the whole of it"}, {"name": "ci", "scopes": ["write"], "days": 90}
    ),
    "revoke_token": Example({**TOKEN, "revoked_at": AT}),
    "list_audit": Example(
        _page(
            {
                "id": 12,
                "at": AT,
                "source": "api",
                "subject": "ci",
                "action": "version.create",
                "object": "team/math@3",
                "detail": {"digest": DIGEST},
            },
            NEXT,
        )
    ),
}
"""By operation id."""

DETAILS: dict[int, str] = {
    400: "the header Content-Length is not a number",
    401: "the registry wants an access token; send the header Authorization: Bearer TOKEN",
    403: "the token t2r_4f0c9a… has the scope read, this needs write",
    404: "there is no expert team/maths",
    405: "PUT is not possible here; see the Allow header",
    408: "the body stopped arriving after 65536 bytes; send it again",
    409: "team/math@2 is what the alias production points to; move or remove the alias first",
    413: "the body has more than 4194304 bytes, the limit here",
    415: "the body must be of the type application/json; set the header Content-Type",
    416: "the range lies outside of the 414840 bytes",
    421: "the server is not called by the name in Host; the setting allowed_hosts adds names",
    422: "query.limi: there is no such parameter; did you mean 'limit'?",
    429: "other requests of this address or access token hold its share of the server's memory; try again in a second",
    500: "the registry failed; its log says why, under the request 5d0e4f0e9c1a6b1b",
    503: "the registry cannot reach its database or its store now; try again in a few seconds",
}
"""What an answer of each error status may say."""
