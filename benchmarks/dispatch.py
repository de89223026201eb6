"""How often a dispatch names the right domain, on real test documents, clean and disturbed.

    python benchmarks/dispatch.py [--docs 50] [--seed 0] [--dtype bfloat16] [--typos 0.05] [--output FILE]

Prompts come from scored splits, which no training and no calibration reads: GSM8K, MATH-500 (math), MBPP, HumanEval
(code), ARC-Easy, ARC-Challenge (reasoning), HellaSwag, BoolQ and, of a kind that ``t2_domains`` has not, WinoGrande
(others), in the form in which t2's tasks ask them. Beside them the same prompts

* with typos: at the stated rate a character is left out, doubled, swapped with the next, or becomes another letter;
* in upper and in lower case;
* in other words: wrapped as no training prompt is;
* mixed: with a prompt of another domain after it, where either of the two domains counts as right;
* with a distractor: after a sentence that belongs to another domain, where the prompt's own domain counts as right.

Each is given to ``adapt=prompt`` and to ``adapt=classifier``, with the threshold of 0 (what is named) and with the
calibrated one (how often the decision stands, and how often it is right then). Intervals are Wilson's at 95%.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from t2.adapters.engine.transformers import TransformersEngine
from t2.adapters.expert import Expert
from t2.adapters.strategies import Job, Options
from t2.adapters.strategies.dispatch import Route, route
from t2.adapters.strategies.question import OTHERS
from t2.core.digests import doc_hash
from t2.core.errors import ModelError
from t2.core.files import atomic_write
from t2.core.seeds import generator
from t2.core.statistics import mean_interval
from t2.harness.base import base_id, open_base
from t2.harness.data import load_rows
from t2.harness.defaults import default_classifier, default_experts
from t2.harness.domains import LABELS
from t2.harness.held_out import held_out_prompts
from t2.harness.tasks import encode_pair, load_task, prompt_text

TASKS = {
    "t2_gsm8k": "math",
    "t2_math500": "math",
    "t2_mbpp": "code",
    "t2_humaneval": "code",
    "t2_arc_easy": "reasoning",
    "t2_arc_challenge_letter": "reasoning",
}
TEXTS: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "hellaswag": lambda row: str(row["text"]),
    "boolq": lambda row: f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:",
    "winogrande": lambda row: f"{row['sentence']} Does _ stand for {row['option1']} or for {row['option2']}?",
}
"""Of no expert's domain; WinoGrande is of a kind that no classifier was trained on."""
WORDINGS = (
    "hey, got a sec? my teacher gave me this one and i am stuck:\n\n{}\n\nthx in advance",
    "### Instruction\n{}\n\n### Response\n",
    "The following was sent to us through the contact form. Deal with it.\n---\n{}\n---",
    "<task>{}</task>",
    "Imagine that you are an expert with thirty years of experience. {}",
)
DISTRACTORS = {
    "math": "Yesterday 14 of the 35 pupils were absent, which is 40 percent.",
    "code": "By the way, I have just closed my editor with main.py and utils.py in it.",
    "reasoning": "As you know, plants turn sunlight into sugar and the Moon causes the tides.",
    OTHERS: "I had such a nice walk with my aunt and her dog this morning.",
}


@dataclass(frozen=True)
class Prompt:
    """A text, the domains that count as right for it, and the data set it is from."""

    text: str
    right: frozenset[str]
    source: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--docs", type=int, default=50, help="prompts of each domain")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--typos", type=float, default=0.05, help="share of characters that are disturbed")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()

    start = time.perf_counter()
    clean = read_prompts(args.docs)
    suites = disturbed(clean, args.seed, args.typos)
    lm = open_base(dtype=args.dtype)
    engine = TransformersEngine(lm.model, lm.tokenizer, base_id(None))
    experts, classifier = default_experts(engine.base), default_classifier(engine.base)
    if classifier is None:
        raise ModelError("no classifier for this model; train one on t2_domains")
    scored = {doc_hash(prompt.text) for prompt in clean}
    report: dict[str, Any] = {
        "base": engine.base.model_dump(),
        "dtype": args.dtype,
        "docs": args.docs,
        "seed": args.seed,
        "typos": args.typos,
        "experts": {expert.name: expert.digest for expert in (*experts, classifier)},
        "cpus": os.cpu_count(),
        "torch": torch.__version__,
        "strategies": {},
    }
    for strategy, asked in (("prompt", None), ("classifier", classifier)):
        memory: dict[Any, Any] = {}

        def job(threshold: float | None, asked: Expert | None = asked, memory: dict[Any, Any] = memory) -> Job:
            return Job(
                "benchmark",
                (),
                experts,
                engine,
                Options(threshold=threshold),
                lambda context, text: encode_pair(lm, context, text),
                lambda text: text,
                classifier=asked,
                held_out=lambda labels, asked: held_out_prompts(labels, experts, asked, scored),
                memory=memory,
            )

        begun = time.perf_counter()
        found = {name: route(job(0.0), [prompt.text for prompt in prompts]) for name, prompts in suites.items()}
        stood = {name: route(job(None), [prompt.text for prompt in prompts]) for name, prompts in suites.items()}
        report["strategies"][strategy] = {
            "calibration": stood["clean"].calibration.model_dump(mode="json", exclude={"below", "scored"}),
            "suites": {name: judged(suites[name], found[name], stood[name]) for name in suites},
            "sources": by_source(clean, found["clean"]),
            "confusion": confusion(clean, found["clean"]),
            "seconds": round(time.perf_counter() - begun, 1),
        }
    report["seconds"] = round(time.perf_counter() - start, 1)
    show(report, suites)
    if args.output:
        atomic_write(args.output, json.dumps(report, indent=2).encode())


def read_prompts(docs: int) -> list[Prompt]:
    """``docs`` prompts of each domain, of its data sets in equal parts, drawn by content hash."""
    texts: dict[str, dict[str, list[str]]] = {label: {} for label in LABELS}
    for name, domain in TASKS.items():
        task = load_task(name)
        texts[domain][name] = [prompt_text(task, doc) for doc in task.eval_docs]
    for name, text in TEXTS.items():
        texts[OTHERS][name] = [text(row) for row in load_rows(name, "validation")]
    prompts = []
    for domain, sources in texts.items():
        for place, (name, own) in enumerate(sources.items()):
            count = docs // len(sources) + (place < docs % len(sources))
            prompts += [Prompt(text, frozenset([domain]), name) for text in sorted(set(own), key=doc_hash)[:count]]
    return prompts


def disturbed(clean: Sequence[Prompt], seed: int, typos: float) -> dict[str, list[Prompt]]:
    """The clean prompts and every way in which they are disturbed."""
    rng = generator(seed, "dispatch benchmark")

    def each(change: Callable[[str], str]) -> list[Prompt]:
        return [Prompt(change(prompt.text), prompt.right, prompt.source) for prompt in clean]

    mixed, distracted = [], []
    for prompt in clean:
        others = [other for other in clean if other.right != prompt.right]
        other = others[int(rng.integers(len(others)))]
        pair = [prompt.text, other.text]
        mixed.append(Prompt("\n\n".join(pair), prompt.right | other.right, prompt.source))
        aside = DISTRACTORS[next(iter(other.right))]
        distracted.append(Prompt(f"{aside}\n\n{prompt.text}", prompt.right, prompt.source))
    return {
        "clean": list(clean),
        f"typos, {typos:.0%} of characters": each(lambda text: misspelt(text, typos, rng)),
        f"typos, {3 * typos:.0%} of characters": each(lambda text: misspelt(text, 3 * typos, rng)),
        "upper case": each(str.upper),
        "lower case": each(str.lower),
        "other words": each(lambda text: WORDINGS[int(rng.integers(len(WORDINGS)))].format(text)),
        "mixed domains": mixed,
        "with a distractor": distracted,
    }


def misspelt(text: str, rate: float, rng: np.random.Generator) -> str:
    """The text with characters left out, doubled, swapped or replaced; line breaks stay."""
    out, i = [], 0
    while i < len(text):
        char = text[i]
        if char != "\n" and rng.random() < rate:
            match int(rng.integers(4)):
                case 0:
                    pass
                case 1:
                    out.append(char * 2)
                case 2 if i + 1 < len(text):
                    out.append(text[i + 1] + char)
                    i += 1
                case _:
                    out.append(chr(ord("a") + int(rng.integers(26))))
        else:
            out.append(char)
        i += 1
    return "".join(out)


def judged(prompts: Sequence[Prompt], named: Route, stood: Route) -> dict[str, Any]:
    """Counts of one suite: named right; decisions that stand, and the right ones among them."""
    right = [name in prompt.right for prompt, name in zip(prompts, named.named, strict=True)]
    stand = [not below for below in stood.below]
    return {
        "n": len(prompts),
        "right": sum(right),
        "stand": sum(stand),
        "right_of_standing": sum(hit for hit, kept in zip(right, stand, strict=True) if kept),
    }


def by_source(prompts: Sequence[Prompt], found: Route) -> dict[str, dict[str, int]]:
    """Clean prompts and those named right, by data set."""
    table: dict[str, dict[str, int]] = {}
    for prompt, name in zip(prompts, found.named, strict=True):
        row = table.setdefault(prompt.source, {"n": 0, "right": 0})
        row["n"] += 1
        row["right"] += name in prompt.right
    return table


def confusion(prompts: Sequence[Prompt], found: Route) -> dict[str, dict[str, int]]:
    """Clean prompts of each domain by the name they were given."""
    table = {label: dict.fromkeys(LABELS, 0) for label in LABELS}
    for prompt, name in zip(prompts, found.named, strict=True):
        table[next(iter(prompt.right))][name] += 1
    return table


def show(report: Mapping[str, Any], suites: Mapping[str, Sequence[Prompt]]) -> None:
    """Print the tables; "always one domain" names the same for every prompt, the one that is right most often."""
    strategies = report["strategies"]
    print(
        "\n| prompts | n | always one domain | " + " | ".join(f"{s} | {s}, where it stands" for s in strategies) + " |"
    )
    print("|---|---|---|" + "---|---|" * len(strategies))
    for name, prompts in suites.items():
        best = max(sum(label in prompt.right for prompt in prompts) for label in LABELS)
        cells = [name, str(len(prompts)), f"{best / len(prompts):.0%}"]
        for found in strategies.values():
            row = found["suites"][name]
            cells += [
                _share(row["right"], row["n"]),
                f"{_share(row['right_of_standing'], row['stand'])} of {row['stand']}",
            ]
        print("| " + " | ".join(cells) + " |")
    print("\n| clean prompts of | n | " + " | ".join(f"{s} named right" for s in strategies) + " |")
    print("|---|---|" + "---|" * len(strategies))
    first = next(iter(strategies.values()))
    for source, row in first["sources"].items():
        print(
            f"| {source} | {row['n']} | "
            + " | ".join(str(s["sources"][source]["right"]) for s in strategies.values())
            + " |"
        )
    for name, found in strategies.items():
        print(f"\n| {name}: clean prompts of | " + " | ".join(f"named {label}" for label in LABELS) + " |")
        print("|---|" + "---|" * len(LABELS))
        for domain, counts in found["confusion"].items():
            print(f"| {domain} | " + " | ".join(str(counts[label]) for label in LABELS) + " |")
        own = found["calibration"]
        print(
            f"\n{name}: temperature {own['temperature']:.2f}, threshold {own['threshold']:.2f}, held-out prompts named "
            f"right {own['accuracy']:.0%} of {own['docs']} ({'; '.join(sorted(set(own['sources'].values())))}), "
            f"{found['seconds']} s"
        )


def _share(right: int, n: int) -> str:
    if n == 0:
        return "–"
    interval = mean_interval([1] * right + [0] * (n - right))
    return f"{right / n:.0%} ({interval.low:.0%}–{interval.high:.0%})"


if __name__ == "__main__":
    main()
