"""An engine for workers that starts quickly: nothing here imports lm-eval."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from t2.adapters.engine import Generated
from t2.adapters.engine.transformers import TransformersEngine
from t2.core.errors import ArgumentError

DEADLY, FAULTY = 7, 8
"""Tokens that a context begins with to kill the worker, or to be refused."""


class Mortal(TransformersEngine):
    """An engine that dies of some requests."""

    def generate(self, requests: Any, *args: Any, **kwargs: Any) -> list[Generated]:
        if any(request.context[0] == DEADLY for request in requests):
            os._exit(1)
        if any(request.context[0] == FAULTY for request in requests):
            raise ArgumentError("faulty: ask something else")
        return super().generate(requests, *args, **kwargs)


@dataclass(frozen=True)
class Spec:
    """The tiny model in a folder."""

    folder: str

    def __call__(self) -> Mortal:
        model = transformers.AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        return Mortal(model, transformers.AutoTokenizer.from_pretrained(self.folder), "tiny", batch_size=8)


@dataclass(frozen=True)
class Unbuildable:
    """What cannot be loaded."""

    def __call__(self) -> Mortal:
        raise ArgumentError("nowhere: there is no such folder")
