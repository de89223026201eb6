"""How fast t2 adapts, against the reference procedure, plain models and PEFT; a table of ratios.

    python -m benchmarks.speed [NAME …] [--device cuda] [--repeats 3] [--quick] [--output FILE]

A name is that of a module of ``benchmarks/speed``; without one all run. Both sides of each ratio are measured in turn
in the same run. ``--quick`` uses the smallest sizes, to see whether everything works; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path

import torch

from benchmarks.machine import describe_machine, describe_versions
from benchmarks.speed.rows import Row
from t2.core.errors import ArgumentError, nearest
from t2.core.files import atomic_write

_NOT = ("__main__", "rows", "reference", "shapes")


def main() -> None:
    """Run the benchmarks that are named and print their rows."""
    names = sorted(path.stem for path in Path(__file__).parent.glob("*.py") if path.stem not in _NOT)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(names))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path, help="a JSON file for the rows")
    args = parser.parse_args()
    for name in args.names:
        if name not in names:
            raise SystemExit(str(ArgumentError(f"there is no benchmark {name}{nearest(name, names)}")))
    print(f"command: {' '.join(['python -m benchmarks.speed', *sys.argv[1:]])}")
    graphics = f"; {torch.cuda.get_device_name()}" if args.device.startswith("cuda") else ""
    print(f"machine: {describe_machine()}{graphics}")
    print(f"versions: {describe_versions('torch', 'transformers', 'lm-eval')}\n", flush=True)
    print("| what | against | ratio | target | met | figures |\n|---|---|---|---|---|---|", flush=True)
    rows: list[Row] = []
    for name in args.names or names:
        for row in importlib.import_module(f"benchmarks.speed.{name}").run(args):
            rows.append(row)
            sign = "" if row.bound is None else f" {'≥' if row.better == 'above' else '≤'} {row.bound:g}"
            met = {True: "yes", False: "no", None: "–"}[row.met]
            print(
                f"| {row.what} | {row.against} | {row.ratio:.2f} | {row.target}{sign} | {met} | {row.detail} |",
                flush=True,
            )
    if args.output:
        atomic_write(args.output, json.dumps([row.json() for row in rows], indent=2).encode())


if __name__ == "__main__":
    main()
