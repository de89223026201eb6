"""Pass 1 against pass 2 of ``adapt=prompt``, which asks the base model for the domain of each prompt.

For each task two runs: in the first nothing is kept, so that pass 1 asks about the held-out prompts too; in the second
their answers are found again, as in every later run over the same base. Pass 2 is that of the second run, over as many
documents and new tokens as the row says; the experts are those that come with t2.

The paper's bounds are for an 8B model on a GPU, where decoding waits for memory. On a CPU a token that is read costs
about as much as one that is generated, so no pass 1 that reads a text costs less than that text's share of the tokens;
the last figure of a row is that share.
"""

from __future__ import annotations

import argparse
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lm_eval import evaluator
from lm_eval.tasks import TaskManager

from benchmarks.speed.rows import Row
from t2.adapters.strategies.question import clip
from t2.core.record import AdaptationRecord
from t2.core.settings import cache_dir
from t2.harness.base import open_base
from t2.harness.model import T2LM
from t2.harness.tasks import load_task, prompt_text

TASKS = {"t2_math500": (16, 0.03), "t2_humaneval": (16, 0.05), "t2_arc_challenge_letter": (64, 0.15)}
"""Documents, and the ratio to reach."""


def run(args: argparse.Namespace) -> Iterator[Row]:
    """Measure; see :class:`benchmarks.speed.rows.Benchmark`."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    dtype = "bfloat16" if args.device.startswith("cuda") else "float32"
    loaded = open_base(dtype=dtype, device=args.device, batch_size=16)
    bases = cache_dir() / "bases"
    bases.mkdir(parents=True, exist_ok=True)
    before = os.environ.get("T2_CACHE_DIR")
    try:
        for name, (docs, bound) in list(TASKS.items())[-1 if args.quick else 0 :]:
            with tempfile.TemporaryDirectory() as folder:
                os.environ["T2_CACHE_DIR"] = folder
                (Path(folder) / "bases").symlink_to(bases)
                count = 2 if args.quick else docs
                first, _ = _evaluate(loaded, name, count, args.device, "max_gen_toks=1")
                shutil.rmtree(Path(folder) / "adaptations")
                record, tokens = _evaluate(loaded, name, count, args.device, "max_gen_toks=4" if args.quick else None)
            task = load_task(name)
            texts = [prompt_text(task, doc) for doc in list(task.test_docs())[:count]]
            read = sum(len(loaded.tok_encode(clip(text))) for text in texts)
            asked = sum(len(loaded.tok_encode(text)) for text in texts)
            share = read / (asked + tokens)
            pass1, whole, pass2 = record.timing.pass1, first.timing.pass1, record.timing.pass2
            detail = (
                f"{pass1:.2f} s, {whole:.2f} s and {pass2:.2f} s (pass 1, with calibration, pass 2) for {count} "
                f"documents with {tokens / count:.0f} new tokens; the text's share of the tokens of pass 2 {share:.0%}"
            )
            yield Row(f"pass 1, {name}, {dtype}", "pass 2", pass1 / pass2, "pass 1 / pass 2", bound, "below", detail)
            yield Row(
                f"pass 1 with calibration, {name}, {dtype}", "pass 2", whole / pass2, "pass 1 / pass 2", None, "below",
                f"as above; the held-out prompts are asked about once for a base model, {count} documents are few",
            )  # fmt: skip
    finally:
        os.environ.pop("T2_CACHE_DIR")
        if before is not None:
            os.environ["T2_CACHE_DIR"] = before


def _evaluate(loaded: Any, name: str, count: int, device: str, gen_kwargs: str | None) -> tuple[AdaptationRecord, int]:
    """The record of a run, and how many tokens pass 2 generated."""
    lm = T2LM(pretrained=loaded.model, tokenizer=loaded.tokenizer, device=device, batch_size=16, adapt="prompt")
    found: Any = evaluator.simple_evaluate(
        lm,
        tasks=[load_task(name)],
        task_manager=TaskManager(include_defaults=False),
        limit=count,
        bootstrap_iters=0,
        log_samples=True,
        gen_kwargs=gen_kwargs,
        confirm_run_unsafe_code=True,
    )
    answers = [text for sample in found["samples"][name] for given in sample["resps"] for text in given]
    return lm.records[0], sum(len(loaded.tok_encode(text)) for text in answers)
