"""``adapt=peft``: an adapter of PEFT in lm-eval's model, as ``hf`` with ``peft=`` has it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM

from t2.adapters.intact import restored
from t2.adapters.peft_folder import PeftFolder, put_in
from t2.core.errors import ExpertError
from t2.core.manifest import BaseModelRef, unpack_hashes
from t2.core.record import ExpertRef, Overlap
from t2.harness.adaptation import PROBE
from t2.harness.overlap import DocMarks
from t2.harness.rules import rules_of

_TOKENS = 8
"""Most tokens with changed embeddings that are probed."""

_log = logging.getLogger(__name__)


def adapt(lm: HFLM, adapter: PeftFolder, base: BaseModelRef) -> None:
    """Put an adapter into the model that lm-eval's holds, which answers with it from now on.

    Args:
        lm: lm-eval's model over the base.
        adapter: the adapter.
        base: the base.

    Raises:
        ExpertMismatchError: the adapter is of another model.
        ExpertError: it changes nothing.
    """
    before = _probe(lm)
    _resize(lm)
    lm._model = put_in(lm.model, adapter, base, lm.revision)
    lm.peft = str(adapter.path)
    if torch.equal(before, _probe(lm)[..., : before.shape[-1]]) and not _acts_on_other_tokens(lm):
        raise ExpertError(
            f"peft={adapter.path} leaves the logits of a probe text unchanged: it was not trained, or its change does "
            "not survive rounding in this dtype; try dtype=float32, or leave it out"
        )


@contextlib.contextmanager
def adapted(lm: HFLM, adapter: PeftFolder, base: BaseModelRef) -> Iterator[None]:
    """Inside the context lm-eval's model answers with an adapter; afterwards it is what it was.

    Args:
        lm, adapter, base: as for :func:`adapt`.

    Raises:
        ExpertMismatchError: the adapter is of another model.
        ExpertError: it changes nothing, or it has written over weights of the base.
    """
    model, told, before = lm._model, lm.peft, _probe(lm)
    with restored(model):
        try:
            adapt(lm, adapter, base)
            yield
        finally:
            lm._model, lm.peft = model, told
    if not torch.equal(before, _probe(lm)):
        raise ExpertError(
            f"peft={adapter.path} writes over weights of the base when it is put in, so it cannot share a model; score "
            "it by itself, with lm_eval --model t2"
        )


def reference(adapter: PeftFolder) -> ExpertRef:
    """The adapter as a record names it."""
    domain = adapter.manifest.domain if adapter.manifest is not None else None
    return ExpertRef(name=adapter.name, digest=adapter.digest, domain=domain)


def overlap(adapter: PeftFolder, task: Task) -> tuple[Overlap, ...]:
    """How many of the docs that a task scores the adapter was trained on, where ``t2 train`` made it."""
    trained = frozenset(unpack_hashes(adapter.manifest.training_docs)) if adapter.manifest is not None else frozenset()
    marks = DocMarks(task)
    docs = {instance.doc_id: instance.doc for instance in task.instances}
    seen = sum(not trained.isdisjoint(marks.of(doc)) for doc in docs.values()) if trained else 0
    if not seen:
        return ()
    _log.warning(
        "%s: adapter %s was trained on %d of the %d scored docs; it looks better on them than it is",
        *(task.task_name, adapter.name, seen, len(docs)),
    )
    return (Overlap(expert=adapter.name, scored=seen, adaptation=0),)


def bearing(adapter: PeftFolder) -> dict[str, Any]:
    """What of it bears on the answers besides its weights, for the settings of a record."""
    return {"peft": {"type": adapter.kind, "config": adapter.config}}


def _resize(lm: HFLM) -> None:
    """Cut or grow the embeddings to the tokenizer's size before an adapter goes in, as ``hf`` does."""
    config = lm.model.config
    text = getattr(config, "text_config", None)
    size = getattr(text, "vocab_size", None) or config.vocab_size
    if size != len(lm.tokenizer):
        lm.model.resize_token_embeddings(len(lm.tokenizer))


@torch.no_grad()
def _acts_on_other_tokens(lm: HFLM) -> bool:
    """Whether an adapter changes the embeddings of tokens outside the probe text.

    Compares the embeddings with and without the adapter, and probes the changed tokens before the text.
    """
    model: Any = lm.model
    embeddings = model.get_input_embeddings()
    ids = torch.arange(len(lm.tokenizer), device=lm.device)
    with_it = embeddings(ids)
    with model.disable_adapter():
        changed = ids[(with_it != embeddings(ids)).any(dim=-1)][:_TOKENS].tolist()
        before = _probe(lm, changed)
    return bool(changed) and not torch.equal(before, _probe(lm, changed))


@torch.no_grad()
def _probe(lm: HFLM, more: Sequence[int] = ()) -> torch.Tensor:
    rules = rules_of(lm)
    tokens = [*more, *lm.tok_encode(PROBE)][: rules.rolling]
    with rules.arithmetic():
        logits: torch.Tensor = lm.model(input_ids=torch.tensor([tokens], device=lm.device)).logits
    return logits.clone()
