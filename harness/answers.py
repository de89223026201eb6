"""Answers of the second pass, kept in memory: of several evaluations those with an equal mixture ask once."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.utils import normalize_gen_kwargs

from t2.adapters.expert import Z, z_digest
from t2.core.digests import doc_hash


class Answers:
    """Answers by mixture and list of requests, in their order: a call is answered from here only where it is the same.

    The same requests in other company would make other batches, and so other roundings. What is sampled is never kept.

    Attributes:
        reused: requests that were answered from here.
    """

    def __init__(self) -> None:
        self._known: dict[str, tuple[list[Any], float]] = {}
        self.reused = 0

    def ask(
        self,
        kind: str,
        requests: Sequence[Instance],
        z: Z | None,
        ask: Callable[[], list[Any]],
    ) -> tuple[list[Any], float]:
        """Answers, and the seconds that they took when they were first asked for.

        Args:
            kind: of the requests.
            requests: what is asked.
            z: the mixture; None is the base.
            ask: asks the model.
        """
        key = None if any(_samples(request) for request in requests) else _key(kind, requests, z)
        if key is not None and key in self._known:
            self.reused += len(requests)
            answers, seconds = self._known[key]
            return list(answers), seconds
        start = time.perf_counter()
        answers = ask()
        seconds = time.perf_counter() - start
        if key is not None:
            self._known[key] = (list(answers), seconds)
        return answers, seconds


def _key(kind: str, requests: Sequence[Instance], z: Z | None) -> str:
    digest = hashlib.sha256(f"{kind} {z_digest(z)}".encode())
    for request in requests:
        digest.update(doc_hash(list(request.args)).encode())
    return digest.hexdigest()


def _samples(request: Instance) -> bool:
    if request.request_type != "generate_until":
        return False
    return bool(normalize_gen_kwargs(dict(request.args[1]), 1).get("do_sample"))
