"""Requests that lm-eval's own model answers in weight form, such as those with pictures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task
from lm_eval.models.hf_vlms import DEFAULT_IMAGE_PLACEHOLDER
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils import resize_image

from t2.adapters.engine import Engine
from t2.adapters.engine.decoding import seeded
from t2.adapters.expert import Z
from t2.adapters.progress import request_bar
from t2.core.errors import ArgumentError, TaskError


def has_pictures(task: Task) -> bool:
    """Whether a task's requests carry more than text."""
    return bool(getattr(task, "MULTIMODAL", False))


def check_pictures(task: Task, lm: HFLM) -> None:
    """Refuse a task with pictures that cannot be adapted to.

    Raises:
        TaskError: the model does not see, or lm-eval's model cannot answer such requests.
    """
    name = str(task.task_name)
    if not getattr(lm, "MULTIMODAL", False):
        raise TaskError(
            f"task {name} needs images or audio; for images give engine=hf-multimodal and a model that sees them"
        )
    if getattr(task.config, "doc_to_audio", None):
        raise TaskError(f"task {name} needs audio, which no engine of t2 hears")
    if task.OUTPUT_TYPE != "generate_until":
        raise TaskError(
            f"task {name} asks for likelihoods of answers to images, which lm-eval's hf-multimodal does not compute; "
            "use a task that generates its answers"
        )


def without_places(text: str) -> str:
    """A prompt's text without the places of its pictures."""
    return text.replace(DEFAULT_IMAGE_PLACEHOLDER, "").strip()


def answers_in_turn(
    lm: HFLM,
    engine: Engine,
    requests: Sequence[Sequence[Instance]],
    mixtures: Sequence[Z | None],
    rows: Sequence[int],
    *,
    seed: int = 0,
    progress: str | None = None,
) -> list[list[str]]:
    """Generated answers, by lm-eval's own model; arguments as :meth:`t2.harness.tasks.TaskDocs.answer`."""
    answers: list[list[str]] = [[] for _ in requests]
    for own, z in _turns(mixtures, rows, progress):
        flat = [instance for entry in own for instance in requests[entry]]
        with engine.applied(z), seeded(seed, lm.device):
            try:
                texts = iter(lm.generate_until(flat, disable_tqdm=True))
            except ValueError as error:  # transformers' own check of its arguments
                given = ", ".join(f"{name}={value!r}" for name, value in flat[0].args[1].items())
                reason = " ".join(str(error).split())
                raise ArgumentError(f"transformers refuses to generate with {given}: {reason}") from error
        for entry in own:
            answers[entry] = [next(texts) for _ in requests[entry]]
    return answers


def likelihoods_in_turn(
    lm: HFLM,
    engine: Engine,
    asked: Sequence[tuple[Instance, str]],
    mixtures: Sequence[Z | None],
    rows: Sequence[int],
    *,
    progress: str | None = None,
) -> list[tuple[float, int]]:
    """Log-likelihood in nats, and tokens, of given texts as answers to requests with pictures."""
    found = [(0.0, 0)] * len(asked)
    for own, z in _turns(mixtures, rows, progress):
        with engine.applied(z):
            for entry in own:
                found[entry] = _likelihood(lm, *asked[entry])
    return found


def _turns(
    mixtures: Sequence[Z | None], rows: Sequence[int], progress: str | None
) -> Iterator[tuple[list[int], Z | None]]:
    with request_bar(progress, len(rows), "doc") as bar:
        for index in sorted(set(rows)):
            own = [entry for entry, row in enumerate(rows) if row == index]
            yield own, mixtures[index]
            bar.update(len(own))


@torch.no_grad()
def _likelihood(lm: Any, instance: Instance, text: str) -> tuple[float, int]:
    context, _, more = instance.args
    answer = lm.tok_encode(text, add_special_tokens=False)
    if not answer:
        return 0.0, 0
    pictures = [resize_image(p, lm.image_width, lm.image_height, lm.image_max_side) for p in more["visual"]]
    inputs = lm.tok_batch_multimodal_encode([context], [pictures], left_truncate_len=lm.max_length - len(answer))
    ids = inputs["input_ids"]
    tokens = torch.tensor([answer], device=ids.device)
    extended = {}
    for name, value in inputs.items():
        # What tells of each token grows with the answer; pictures stay as they are.
        if name == "input_ids":
            extended[name] = torch.cat([value, tokens], dim=1)
        elif value.shape == ids.shape:
            extended[name] = torch.cat([value, torch.full_like(tokens, int(name == "attention_mask"))], dim=1)
        else:
            extended[name] = value
    logits = lm.model(**extended).logits[0, -len(answer) - 1 : -1].float()
    return float(torch.log_softmax(logits, -1).gather(1, tokens[0].unsqueeze(1)).sum()), len(answer)
