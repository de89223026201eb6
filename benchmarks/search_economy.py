"""What each ``economy`` of a search saves and costs, on simulated docs.

    python -m benchmarks.search_economy [--seeds 30] [--searches cem cma random] [--output FILE]

A doc is answered rightly where its margin is above 0; margins are smooth functions of α with a best point of their own
per simulation, and their mean stands for the likelihood. A simulation is a search of the paper's size: 32 candidates,
at most 100 generations, 10 docs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import torch

from t2.adapters.expert import Expert, Z
from t2.adapters.strategies import STRATEGIES, Job, Options, Plan, Score
from t2.adapters.strategies.base import ECONOMIES, Economy
from t2.core.files import atomic_write
from t2.core.manifest import BaseModelRef, Manifest
from t2.core.seeds import generator

_MATRIX = "w"


class Margins:
    """A scorer over simulated docs; a mixture's α is read off its z, which has a component for each expert.

    Args:
        experts: number of coefficients.
        docs: number of docs.
        easy: mean margin of the base; 0 has it answer about half of the docs.
        seed: of the margins.
    """

    higher_is_better = True

    def __init__(self, experts: int, docs: int, easy: float, seed: int) -> None:
        rng = generator(seed, "margins", experts, docs)
        self.docs = docs
        self.prompts: Sequence[str] = [""] * docs
        self.bounds: tuple[float, float] | None = (0.0, 1.0)
        self.answered: set[tuple[bytes, int]] = set()
        self.base = rng.normal(easy, 1.2, docs)
        self.slopes = rng.normal(0, 0.8, (docs, experts))
        self._best = rng.normal(0.4, 0.4, experts)
        self._width = rng.uniform(0.3, 1.5)

    def margins(self, z: Z | None) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Of every doc."""
        alpha = np.zeros(len(self._best)) if z is None else np.round(z[_MATRIX].double().numpy() - 1, 4)
        lost = self._width * ((alpha - self._best) ** 2).sum()
        return np.asarray(self.base + self.slopes @ alpha - lost)

    def evaluate(self, mixtures: Sequence[Z | None], docs: Sequence[int] | None = None) -> list[Score]:
        """See :class:`t2.adapters.strategies.Scorer`."""
        shown = list(range(self.docs) if docs is None else docs)
        found = []
        for z in mixtures:
            name = b"" if z is None else z[_MATRIX].numpy().tobytes()
            self.answered.update((name, doc) for doc in shown)
            right = tuple((self.margins(z)[shown] > 0).astype(float).tolist())
            found.append(Score(sum(right) / len(right), right))
        return found

    def combine(self, mixtures: Sequence[Z | None], rows: Sequence[int], docs: Sequence[int] | None = None) -> Score:
        """See :class:`t2.adapters.strategies.Scorer`."""
        shown = range(self.docs) if docs is None else docs
        right = [self.evaluate([mixtures[row]], [doc])[0].value for doc, row in zip(shown, rows, strict=True)]
        return Score(sum(right) / len(right), tuple(right))

    def tie_break(self, mixtures: Sequence[Z | None], docs: Sequence[int] | None = None) -> list[float]:
        """See :class:`t2.adapters.strategies.Scorer`."""
        shown = list(range(self.docs) if docs is None else docs)
        return [float(self.margins(z)[shown].mean()) for z in mixtures]


def simulate(scorer: Margins, experts: int, seed: int = 0, **options: Any) -> Plan:
    """A search over simulated docs; z − 1 is α in the delta space."""
    manifest = Manifest.model_construct(name="", domain=None)
    found = []
    for k in range(experts):
        z = torch.ones(experts)
        z[k] = 2.0
        found.append(Expert(manifest.model_copy(update={"name": f"e{k}"}), {_MATRIX: z}, str(k)))
    engine = SimpleNamespace(bases=lambda names: {}, base=BaseModelRef(id="simulated", fingerprint="0" * 64))
    settings: dict[str, Any] = {"space": "delta", "preselect": None, "seed": seed, **options}
    job = Job(
        "simulated",
        [""],
        found,
        cast(Any, engine),
        Options(**settings),
        lambda context, text: ([0], [0]),
        lambda text: text,
        scorer,
        progress=False,
    )
    return STRATEGIES["cem"]().plan(job)


def compare(search: str, experts: int, seeds: int) -> dict[Economy, dict[str, float]]:
    """For each economy the evaluations spent, and in how many searches the held-out score was another than in full."""
    rows: dict[Economy, dict[str, float]] = {}
    full: list[float] = []
    for economy in ECONOMIES:
        spent, scores = 0.0, []
        for seed in range(seeds):
            scorer = Margins(experts, 10, easy=(-1.0, 0.0, 1.0)[seed % 3], seed=seed)
            plan = simulate(scorer, experts, seed, search=search, economy=economy)
            assert plan.search is not None
            assert plan.held_out is not None
            spent += plan.search.evaluations
            scores.append(float(plan.held_out.after or 0.0))
        full = full or scores
        rows[economy] = {
            "evaluations": spent / seeds,
            "lower": sum(a < b - 1e-9 for a, b in zip(scores, full, strict=True)),
            "higher": sum(a > b + 1e-9 for a, b in zip(scores, full, strict=True)),
        }
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", nargs="+", default=["cem", "cma", "random"])
    parser.add_argument("--experts", nargs="+", type=int, default=[3, 8])
    parser.add_argument("--seeds", type=int, default=30)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    report = []
    print(f"{args.seeds} searches a row\n")
    print("| search | experts | economy | evaluations | saved | held-out score lower | higher |")
    print("|---|---|---|---|---|---|---|")
    for search in args.searches:
        for experts in args.experts:
            rows = compare(search, experts, args.seeds)
            for economy, row in rows.items():
                saved = rows["none"]["evaluations"] / row["evaluations"]
                shown = f"{row['evaluations']:.0f} | {saved:.2f}× | {row['lower']:.0f} | {row['higher']:.0f} |"
                print(f"| `{search}` | {experts} | `{economy}` | {shown}", flush=True)
                report.append({"search": search, "experts": experts, "economy": economy, "saved": saved, **row})
    if args.output:
        atomic_write(args.output, json.dumps(report, indent=2).encode())


if __name__ == "__main__":
    main()
