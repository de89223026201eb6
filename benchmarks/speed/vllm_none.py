"""``adapt=none`` with ``engine=vllm``, against lm-eval's own ``vllm`` model: the wall time of one evaluation.

Both are asked over one vLLM that is running: what is compared is what t2 does to requests and answers. What it does
when it starts, reading the checkpoint for its fingerprint, is told beside it. Needs vLLM (``pip install
"t2-eval[vllm]"``); without it there are no rows. In the environment of ``make vllm-test``, in a few minutes:

    .venv-vllm/bin/t2 data fetch arc_easy
    .venv-vllm/bin/python -m benchmarks.speed vllm_none
"""

from __future__ import annotations

import argparse
import importlib.util
import logging
import os
import sys
import tempfile
import time
from typing import Any

from benchmarks.speed.rows import Row, in_turn

_TASK = "t2_arc_easy"


def run(args: argparse.Namespace) -> list[Row]:
    """Measure; see :class:`benchmarks.speed.rows.Benchmark`."""
    if importlib.util.find_spec("vllm") is None:
        print('vllm_none: vLLM is not installed (pip install "t2-eval[vllm]"), so this is left out', file=sys.stderr)
        return []
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    if not args.device.startswith("cuda"):
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from t2.harness.base import open_base
    from t2.harness.model import T2LM
    from t2.harness.tasks import load_task

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    limit = 8 if args.quick else 40
    with tempfile.TemporaryDirectory() as folder:
        demo = open_base(dtype="bfloat16", device="cpu")
        demo.model.save_pretrained(folder)
        demo.tokenizer.save_pretrained(folder)
        del demo
        start = time.perf_counter()
        lm = T2LM(
            engine="vllm",
            pretrained=folder,
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=2048,
            batch_size="auto",
        )
        begun = time.perf_counter() - start
        theirs: Any = lm.inner
        start = time.perf_counter()
        theirs.engine(theirs.checkpoint("refuse"), "demo")
        own = time.perf_counter() - start

        def evaluate(model: Any) -> Any:
            return simple_evaluate(
                model,
                tasks=[load_task(_TASK)],
                task_manager=TaskManager(include_defaults=False),
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
            )

        (ours, other), results = in_turn([lambda: evaluate(lm), lambda: evaluate(theirs)], args.repeats, args.device)
        lm.inner.close()
    same = results[0]["results"][_TASK]["acc,none"] == results[1]["results"][_TASK]["acc,none"]
    return [
        Row(
            what=f"adapt=none, engine=vllm, {limit} docs of {_TASK}, bfloat16",
            against="lm-eval's vllm",
            ratio=ours / other,
            target="wall time of ours / theirs",
            bound=1.02,
            better="below",
            detail=f"{ours:.2f} s against {other:.2f} s, {'equal' if same else 'OTHER'} scores; "
            f"of a start of {begun:.0f} s {own:.1f} s are ours",
            numbers={"seconds": [ours, other], "start": begun, "own_start": own, "equal": same},
        )
    ]
