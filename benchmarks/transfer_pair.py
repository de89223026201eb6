"""Experts of another base on the demo model: the paper's Tables 5 and 9 on a real pair, from nothing, in one command.

    python -m benchmarks.transfer_pair FOLDER [--base-steps N] [--expert-steps N] [--limit N] [--seeds 0,1,2]
    [--own demo/reasoning] [--search population=12,generations=5] [--prepare]
    [--second pretrained=MODEL[,gguf_file=FILE]]

Makes another base of the same shape by fine-tuning SmolLM2-135M-Instruct on GSM8K's solutions (LoRA of all matrices,
next token, merged), trains an expert for ARC-Easy on it, and compares on ARC-Challenge with the demo model: each expert
in order and shuffled, and the search over own, foreign, and all experts, by ``transfer=strict``. With ``--second`` the
expert is trained on that model instead, of whatever depth and width, and taken over by ``transfer=resample``.

What FOLDER holds of the same settings is not done again, so a stopped run goes on where it was. ``--prepare`` ends
before the comparison, whose command is printed either way.
"""

from __future__ import annotations

import argparse
import gc
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from t2.adapters.convert.merge import ORIGIN, write_merged
from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.peft_folder import put_in, read_folder
from t2.core.errors import T2Error
from t2.harness.base import base_id, open_base
from t2.harness.compare.methods import parse_pairs
from t2.training.api import TrainResult, finished, train
from t2.training.config import TrainConfig

BASE, ADAPTER, EXPERT = "smollm2-gsm8k", "gsm8k-lora", "arc-easy"
METHODS = "expert,cem(experts=own|foreign|own+foreign)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of models, experts and the comparison")
    parser.add_argument("--second", help="model_args of another base to train the expert on")
    parser.add_argument("--dtype", default="bfloat16", help="of all models")
    parser.add_argument("--base-steps", type=int, default=40, help="of the fine-tuning, 4 documents each")
    parser.add_argument("--expert-steps", type=int, default=20, help="of the expert's training, 32 documents each")
    parser.add_argument("--validation-docs", type=int, default=192, help="of the expert's training")
    parser.add_argument("--own", default="demo/math+demo/code+demo/reasoning", help="experts of the demo model")
    parser.add_argument("--limit", type=int, default=200, help="documents that are scored")
    parser.add_argument("--seeds", default="0", help="of the comparison")
    parser.add_argument("--search", default="population=12,generations=5", help="model_args of the searches")
    parser.add_argument("--prepare", action="store_true", help="end before the comparison")
    args = parser.parse_args()
    try:
        pair(args)
    except T2Error as error:
        raise SystemExit(str(error)) from error


def pair(args: argparse.Namespace) -> None:
    """Make what is missing, print the command of the comparison, and run it."""
    if args.second is None:
        second = {"pretrained": str(fine_tuned(args.folder, args.dtype, args.base_steps)), "dtype": args.dtype}
    else:
        second = {**parse_pairs("--second", args.second), "dtype": args.dtype}
    expert = trained(reasoning(second, args.expert_steps, args.validation_docs), args.folder / "experts")
    print(f"expert on its own base: {expert.base_score:.3f} → {expert.best_score:.3f} of its validation documents")
    transfer = "strict" if args.second is None else "resample"
    options = {
        "--tasks": "t2_arc_challenge",
        "--limit": args.limit,
        "--experts": f"{args.own}+{expert.path.parent}",
        "--model-args": f"dtype={args.dtype},transfer={transfer},{args.search}",
        "--methods": METHODS,
        "--controls": "none,shuffle",
        "--seeds": args.seeds,
        "--batch-size": 16,
        "--output": args.folder / "comparison",
    }
    words = ["compare", *(str(word) for option in options.items() for word in option)]
    print(shlex.join(["t2", *words]), flush=True)
    if not args.prepare:
        raise SystemExit(subprocess.run([sys.executable, "-m", "t2.cli", *words], check=False).returncode)


def fine_tuned(folder: Path, dtype: str, steps: int) -> Path:
    """The folder of the demo model fine-tuned on GSM8K."""
    config = TrainConfig(
        task="t2_gsm8k",
        name=ADAPTER,
        method="lora",
        objective="next-token",
        select="reward",
        model_args={"dtype": dtype},
        # It is measured by the likelihood of solutions; the few short answers are only for the curve.
        gen_kwargs={"max_gen_toks": 8},
        validation_docs=16,
        validate_every=steps,
        steps=steps,
        batch=4,
        learning_rate=1e-3,
        clip=1.0,
    )
    adapter = trained(config, folder / "adapters")
    target = folder / BASE
    if not (target / ORIGIN).exists():
        lm = open_base(dtype=dtype)
        plain = TransformersEngine(lm.model, lm.tokenizer, base_id(None))
        merged: Any = put_in(lm.model, read_folder(adapter.path.parent), plain.base).merge_and_unload()
        plain.close()
        engine = TransformersEngine(merged, lm.tokenizer, BASE)
        write_merged(engine, lm.tokenizer, None, target, {"adapter": adapter.digest, "config": config.model_dump()})
        engine.close()
    return target


def reasoning(model_args: dict[str, Any], steps: int, validation_docs: int) -> TrainConfig:
    """The training of demo/reasoning on another model; the expected reward tells the best of few steps."""
    return TrainConfig(
        task="t2_arc_easy",
        name=EXPERT,
        model_args=model_args,
        validation_docs=validation_docs,
        validate_every=min(5, steps),
        steps=steps,
        batch=32,
        learning_rate=5e-3,
        clip=1.0,
        select="reward",
    )


def trained(config: TrainConfig, folder: Path) -> TrainResult:
    """The result of a training, which is made where it is not there."""
    found = finished(config, folder)
    if found is None:
        if (folder / config.name).exists():
            raise SystemExit(f"{folder / config.name} was trained with other settings; name another FOLDER")
        found = train(config, folder=folder)
        gc.collect()
    return found


if __name__ == "__main__":
    main()
