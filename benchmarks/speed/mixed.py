"""A batch whose rows belong to four experts.

In activation form, a z for each row, against

* PEFT's mixed batch of four LoRA adapters (r = 16, the same matrices, ``adapter_names=``) over the same rows;
* four runs grouped by expert in weight form, the changes of the weights included, their weights still in memory, and
  composed anew.

Read are prompts of 64 tokens (the logits at their end), and generated 16 tokens after them. The model has random
weights: on a CPU ten layers of SmolLM2-135M's shapes in float32, on a GPU four of an 8B model's in bfloat16.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from typing import Any

import torch

from benchmarks.speed.rows import Row, in_turn
from benchmarks.speed.shapes import engine_of, random_experts, random_model

EXPERTS, PROMPT, NEW = 4, 64, 16


def run(args: argparse.Namespace) -> Iterator[Row]:
    """Measure; see :class:`benchmarks.speed.rows.Benchmark`."""
    import peft

    on_gpu = args.device.startswith("cuda")
    dtype = torch.bfloat16 if on_gpu else torch.float32
    layers = 2 if args.quick else None
    engine = engine_of(random_model(args.device, dtype, layers, args.seed))
    experts = random_experts(engine, EXPERTS, args.seed)
    config = peft.LoraConfig(r=16, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    lora = peft.get_peft_model(random_model(args.device, dtype, layers, args.seed), config, adapter_name="0")
    for k in range(1, EXPERTS):
        lora.add_adapter(str(k), config)
    lora.eval()
    for size in [4, 8] if args.quick else [4, 16, 64]:
        ids = torch.randint(2, 16384, (size, PROMPT), device=args.device)
        owner = [row * EXPERTS // size for row in range(size)]
        for what in ("reading", "generating"):

            def ask(model: Any, rows: torch.Tensor, what: str = what, **kwargs: Any) -> torch.Tensor:
                if what == "reading":
                    logits: torch.Tensor = model(input_ids=rows, use_cache=False, logits_to_keep=1, **kwargs).logits
                    return logits
                length = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
                tokens: torch.Tensor = model.generate(
                    input_ids=rows, attention_mask=torch.ones_like(rows), **length, **kwargs
                )
                return tokens

            def in_rows(ask: Callable[..., torch.Tensor] = ask, ids: Any = ids, owner: Any = owner) -> torch.Tensor:
                with torch.no_grad(), engine.activation(experts, torch.tensor(owner)):
                    return ask(engine.model, ids)

            def by_lora(ask: Callable[..., torch.Tensor] = ask, ids: Any = ids, owner: Any = owner) -> torch.Tensor:
                with torch.no_grad():
                    return ask(lora, ids, adapter_names=[str(k) for k in owner])

            def grouped(ask: Callable[..., torch.Tensor] = ask, ids: Any = ids, owner: Any = owner) -> torch.Tensor:
                answers = []
                for k, z in enumerate(experts):
                    with torch.no_grad(), engine.applied(z):
                        answers.append(ask(engine.model, ids[[i for i, own in enumerate(owner) if own == k]]))
                return torch.cat(answers)

            def anew(grouped: Callable[[], torch.Tensor] = grouped) -> torch.Tensor:
                engine.forms.release()
                return grouped()

            grouped()  # held from the second time on
            seconds, answers = in_turn([in_rows, by_lora, grouped], args.repeats, args.device)
            (composed,), _ = in_turn([anew], 1, args.device, warm=False)
            chosen = [answer.argmax(-1) if what == "reading" else answer for answer in (answers[0], answers[2])]
            alike = int((chosen[0] == chosen[1]).flatten(1).all(1).sum())
            figures = (
                f"{seconds[0] * 1e3:.0f} ms; LoRA {seconds[1] * 1e3:.0f} ms, grouped {seconds[2] * 1e3:.0f} ms with "
                f"the weights in memory, {composed * 1e3:.0f} ms with weights composed anew; tokens as grouped in "
                f"{alike} rows"
            )
            name = f"mixed batch of {EXPERTS} experts, {what}, {size} rows"
            yield Row(
                name, "PEFT's mixed LoRA batch", seconds[0] / seconds[1], "time / LoRA's",
                1 if on_gpu else None, "below", figures,
            )  # fmt: skip
            for against, other in [("weights in memory", seconds[2]), ("composed anew", composed)]:
                yield Row(
                    name, f"grouped, {against}", seconds[0] / other, "time / grouped", None, "below", "as above"
                )  # fmt: skip
