"""Few-shot adaptation in the paper's settings: 32 candidates on 10 prompts with generated answers.

First the candidates of one generation against the reference procedure, which puts each into the weights by dense
recomposition and answers its 10 prompts in one batch. Then the engine over the population against the base model, which
generates as many tokens in batches of the same size. The search's seed, candidates, prompts and lengths are the same on
both sides; an answer counts by how often its last number is the gold answer, ties by how many gold digits it holds.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from benchmarks.speed.reference import Reference
from benchmarks.speed.rows import Row, in_turn
from t2.adapters.engine.base import Generated, GenerateRequest
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Z
from t2.adapters.search import make_search
from t2.core.seeds import derive_seed
from t2.harness.base import base_id, open_base
from t2.harness.tasks import load_task

_EXPERTS = 3
_SPREAD = 0.05
"""Standard deviation of the experts' z: about that of trained ones."""


@dataclass(frozen=True)
class _Size:
    candidates: int
    prompts: int
    tokens: int
    dtypes: tuple[str, ...]


def run(args: argparse.Namespace) -> Iterator[Row]:
    """Measure; see :class:`benchmarks.speed.rows.Benchmark`."""
    cuda = args.device.startswith("cuda")
    full = _Size(32, 10, 64 if cuda else 24, ("float32", "bfloat16"))
    size = _Size(4, 2, 4, ("float32",)) if args.quick else full
    for dtype in size.dtypes:
        lm = open_base(dtype=dtype, device=args.device)
        yield from _measure(args, size, dtype, TransformersEngine(lm.model, lm.tokenizer, base_id(None)), cuda)
        del lm


def _measure(
    args: argparse.Namespace, size: _Size, dtype: str, engine: TransformersEngine, cuda: bool
) -> Iterator[Row]:
    docs = list(load_task("t2_gsm8k").test_docs())[: size.prompts]
    asked = [GenerateRequest(_prompt(engine, str(doc["question"])), size.tokens, ("\n\n",)) for doc in docs]
    gold = [str(doc["answer"]).rsplit("####", 1)[-1].strip().replace(",", "") for doc in docs]
    experts = _experts(engine, args.seed)
    candidates = _candidates(size.candidates, args.seed)
    mixtures: list[Z | None] = [_mix(experts, candidate) for candidate in candidates]
    requests = asked * len(mixtures)
    owners = [m for m in range(len(mixtures)) for _ in asked]
    reference = Reference(engine.model, engine.targets, engine.bases(engine.targets, progress=False))

    def theirs() -> list[Generated]:
        found: list[Generated] = []
        for z in mixtures:
            reference.apply(z)
            found += _generate(engine, asked)
        reference.apply(None)
        return found

    def ours() -> list[Generated]:
        return engine.generate(requests, mixtures, owners)

    began = time.process_time()
    (slow, fast), (expected, found) = in_turn([theirs, ours], 1 if args.quick else args.repeats, args.device, False)
    spent = time.process_time() - began
    same = sum(one.tokens == other.tokens for one, other in zip(expected, found, strict=True)) / len(found)
    best = [_best(engine, answers, gold, len(mixtures)) for answers in (expected, found)]
    if dtype == "float32" and best[0] != best[1]:
        raise AssertionError(f"the best candidate is {best[1]} and by the reference procedure {best[0]}")
    bound = 10.0 if cuda else {"float32": 1.3, "bfloat16": 1.7}[dtype]
    form = "activation" if engine.faster_in_rows(requests, mixtures, owners) else "weight"
    what = f"{size.candidates} candidates × {size.prompts} prompts × at most {size.tokens} tokens, {dtype}"
    yield Row(
        f"few-shot adaptation, {what}",
        "the reference procedure",
        slow / fast,
        "time of the reference / ours",
        None if args.quick else bound,
        "above",
        f"{slow:.1f} s, {fast:.1f} s in {form} form; best candidate {best[1]} (reference: {best[0]}), "
        f"{100 * same:.0f}% of the answers the same",
        {"form": form, "cpu_seconds": spent},
    )
    # The base generates as many tokens in batches of the same size: rows that end are ended at the same step on both
    # sides by leaving stop texts and ends of sequences out.
    batch = size.prompts if form == "weight" else min(engine.batch_size, len(requests))
    # Work is the same for each candidate here, so on a CPU a quarter of them tells as much as all.
    part = len(mixtures) if cuda else max(1, len(mixtures) // 4)
    plain = [GenerateRequest(request.context, size.tokens) for request in requests[: part * size.prompts]]

    def base() -> None:
        for start in range(0, len(plain), batch):
            _generate(engine, plain[start : start + batch], endless=True)

    ends = engine.model.generation_config.eos_token_id, engine.tokenizer.eos_token_id

    def population() -> None:
        engine.model.generation_config.eos_token_id = engine.tokenizer.eos_token_id = None
        try:
            engine.generate(plain, mixtures[:part], owners[: len(plain)])
        finally:
            engine.model.generation_config.eos_token_id, engine.tokenizer.eos_token_id = ends

    (alone, many), _ = in_turn([base, population], 1, args.device, False)
    yield Row(
        f"search over a population, {what}",
        f"the base in batches of {batch}",
        many / alone,
        "time of the population / of the base",
        None if args.quick else 1.25 if cuda else 2.0,
        "below",
        f"{many:.1f} s in {form} form, {alone:.1f} s; multiplications of the activation form: "
        f"{_multiplications(engine):.2f} of the base's",
    )


def _prompt(engine: TransformersEngine, question: str) -> tuple[int, ...]:
    return tuple(engine.tokenizer.encode(f"Question: {question}\nAnswer:"))


def _experts(engine: TransformersEngine, seed: int) -> list[Z]:
    """Experts whose z is random; how long they take does not depend on what they have learned."""
    made = []
    for k in range(_EXPERTS):
        rng = np.random.default_rng(derive_seed(seed, "expert", k))
        made.append(
            {n: torch.from_numpy(1 + _SPREAD * rng.standard_normal(r)).float() for n, r in engine.ranks().items()}
        )
    return made


def _candidates(count: int, seed: int) -> list[tuple[float, ...]]:
    mean = [1 / _EXPERTS] * _EXPERTS
    search = make_search("cem", mean, population=count, generations=1, elite=0.2, seed=seed, starts=[mean])
    return list(search.ask())


def _mix(experts: Sequence[Z], shares: Sequence[float]) -> Z:
    weights = torch.tensor(shares)
    return {n: 1 + weights @ torch.stack([z[n] - 1 for z in experts]) for n in experts[0]}


@torch.no_grad()
def _generate(
    engine: TransformersEngine, requests: Sequence[GenerateRequest], endless: bool = False
) -> list[Generated]:
    """By ``generate`` of transformers, all in one batch."""
    first = requests[0]
    width = max(len(request.context) for request in requests)
    model: Any = engine.model
    pad = engine.tokenizer.pad_token_id or 0
    ids = torch.full((len(requests), width), pad)
    mask = torch.zeros_like(ids)
    for row, request in enumerate(requests):
        ids[row, width - len(request.context) :] = torch.tensor(request.context)
        mask[row, width - len(request.context) :] = 1
    more: dict[str, Any] = {"min_new_tokens": first.max_new_tokens} if endless else {}
    if first.stop and not endless:
        more |= {"stop_strings": list(first.stop), "tokenizer": engine.tokenizer}
    out: Any = model.generate(
        input_ids=ids.to(engine.device),
        attention_mask=mask.to(engine.device),
        max_new_tokens=first.max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        **more,
    )
    return [Generated(_cut(engine, row, first.stop)) for row in out[:, width:].tolist()]


def _cut(engine: TransformersEngine, tokens: Sequence[int], stop: Sequence[str]) -> tuple[int, ...]:
    """An answer up to and with the token that ends it."""
    end = engine.model.generation_config.eos_token_id
    ends = {engine.tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])}
    for length in range(1, len(tokens) + 1):
        text = engine.tokenizer.decode(list(tokens[:length]))
        if tokens[length - 1] in ends or any(part in text for part in stop):
            return tuple(tokens[:length])
    return tuple(tokens)


def _best(engine: TransformersEngine, answers: Sequence[Generated], gold: Sequence[str], candidates: int) -> int:
    def value(number: int) -> tuple[int, int, int]:
        own = answers[number * len(gold) : (number + 1) * len(gold)]
        texts = [str(engine.tokenizer.decode(list(answer.tokens))) for answer in own]
        numbers = [re.findall(r"-?\d+", text.replace(",", "")) for text in texts]
        right = sum(bool(n) and n[-1] == g for n, g in zip(numbers, gold, strict=True))
        held = sum(g in n for n, g in zip(numbers, gold, strict=True))
        return right, held, -number

    return max(range(candidates), key=value)


def _multiplications(engine: TransformersEngine) -> float:
    """Multiplications of a token in activation form over those of the base: the floor of its time where these bind."""
    model: Any = engine.model
    head = int(model.get_output_embeddings().weight.numel())
    base = head + sum(target.parameter.numel() for target in engine.targets.values())
    return (base + sum(2 * target.rank**2 for target in engine.targets.values())) / base
