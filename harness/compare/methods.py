"""The rows of a grid: methods as a user names them, and the controls and seeds that make cells of them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from lm_eval.utils import simple_parse_args_string

from t2.adapters.controls import CONTROLS
from t2.adapters.peft_folder import read_folder
from t2.adapters.strategies import STRATEGIES
from t2.core.digests import digest_of
from t2.core.errors import ArgumentError, nearest
from t2.harness.args import MODEL_ARGS
from t2.harness.compare.alternatives import variants
from t2.harness.compare.members import Member, select

METHODS = {
    "base": "none",
    "expert": "expert",
    "mix": "mix",
    "best": "best",
    "prompt": "prompt",
    "classifier": "classifier",
    "cem": "cem",
    "auto": "auto",
}
"""Methods by name, and what they are as ``adapt=``; ``expert`` stands for each expert in a row of its own."""
DEFAULT = ("base", "expert", "mix", "best", "prompt", "classifier", "cem")
BASE = "base"

_OF_THE_GRID = {
    "adapt": "--methods",
    "experts": "--experts",
    "peft": "--adapters",
    "control": "--controls",
    "control_seed": "--seeds",
    "adapt_seed": "--seeds",
    "record": "--output",
    "batch_size": "--batch-size",
    "device": "--device",
}
"""Model_args that the options of a grid stand for."""


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        label: as its rows are called.
        adapt: the strategy.
        args: model_args of its own.
        members: names of the experts that it uses, see :func:`t2.harness.compare.members.select`; None for all.
        choice: what the row is called that takes it, or another, by their held-out scores; None where it is alone.
    """

    label: str
    adapt: str
    args: Mapping[str, Any] = field(default_factory=dict)
    members: tuple[str, ...] | None = None
    choice: str | None = None

    @property
    def draws(self) -> bool:
        """Whether a seed matters without a control: it draws labelled docs."""
        return STRATEGIES[self.adapt]().needs_labels

    @property
    def takes_experts(self) -> bool:
        """Whether experts take part."""
        return STRATEGIES[self.adapt]().needs_experts


@dataclass(frozen=True)
class Cell:
    """One evaluation of a grid: one run of lm-eval over one task.

    Attributes:
        task: its name.
        method: the label of its row.
        control: of the experts.
        seed: that of the control, and that which draws adaptation docs; None where nothing is drawn.
        args: the model_args of the cell.
    """

    task: str
    method: str
    control: str
    seed: int | None
    args: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Its folder."""
        parts = [self.method, *([] if self.control == "none" else [self.control])]
        parts += [] if self.seed is None else [str(self.seed)]
        text = ".".join(parts)
        plain = re.sub(r"[^\w.+=-]+", "_", text)
        return f"{self.task}/{plain}" if plain == text else f"{self.task}/{plain}.{digest_of(text)[:8]}"

    def __str__(self) -> str:
        """What it is, for people."""
        control = "" if self.control == "none" else f", {self.control}"
        return f"{self.task}: {self.method}{control}" + ("" if self.seed is None else f", seed {self.seed}")


def parse_methods(text: str) -> tuple[Method, ...]:
    """Read ``base,mix,cem(shots=3),cem(per=expert|layer)``; the base always takes part, as the first.

    Raises:
        ArgumentError: an unknown method, one named twice, or an argument that the grid sets itself.
    """
    found: list[Method] = []
    for part in _parts(text):
        match = re.fullmatch(r"\s*([\w-]+)\s*(?:\((.*)\))?\s*", part)
        if match is None:
            raise ArgumentError(f"--methods: {part!r} is not of the form method or method(key=value,…)")
        name, inner = match[1], match[2]
        if name == "peft":
            raise ArgumentError("--methods: peft takes its rows from --adapters; name the folders there")
        if name not in METHODS:
            raise ArgumentError(f"--methods: {name} is not a method{nearest(name, METHODS)}")
        for variant in variants("--methods", inner or ""):
            label = f"{name}({variant.text})" if variant.text else name
            args = dict(variant.args)
            words = args.pop("experts", None)
            check_free(args, f"--methods: {part.strip()}")
            if name == BASE and variant.args:
                raise ArgumentError(f"--methods: {part.strip()}: the base takes no arguments; they go to --model-args")
            if label in [method.label for method in found]:
                raise ArgumentError(f"--methods names {label} twice")
            members = None if words is None else tuple(str(words).split("+"))
            method = Method(label, METHODS[name], args, members)
            chosen = f"{name}({variant.among})" if variant.among is not None and method.draws else None
            found.append(replace(method, choice=chosen))
    base = [method for method in found if method.label == BASE] or [Method(BASE, METHODS[BASE])]
    return (*base, *(method for method in found if method.label != BASE))


def parse_controls(text: str) -> tuple[str, ...]:
    """Read ``none,shuffle``; ``none`` always takes part, as the first.

    Raises:
        ArgumentError: an unknown control, or one named twice.
    """
    found = [part.strip() for part in text.split(",")]
    for control in found:
        if control not in CONTROLS:
            raise ArgumentError(
                f"--controls: {control or 'an empty name'} is not a control{nearest(control, CONTROLS)}"
            )
        if found.count(control) > 1:
            raise ArgumentError(f"--controls names {control} twice")
    return ("none", *(control for control in found if control != "none"))


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read ``0,1,2``.

    Raises:
        ArgumentError: something else than whole numbers from 0, or one of them twice.
    """
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ArgumentError(f"--seeds {text} must be whole numbers, such as 0,1,2") from None
    if min(seeds) < 0 or len(set(seeds)) < len(seeds):
        raise ArgumentError(f"--seeds {text} must be different numbers, none below 0")
    return seeds


def parse_pairs(option: str, text: str) -> dict[str, Any]:
    """Read ``key=value,…`` as lm-eval reads them.

    Raises:
        ArgumentError: a part has no name or no value.
    """
    for part in filter(None, text.split(",")):
        name, equals, value = part.partition("=")
        if not (name.strip() and equals and value.strip()):
            raise ArgumentError(f"{option} {text}: {part!r} is not of the form key=value")
    return dict(simple_parse_args_string(text))


def check_free(args: Mapping[str, Any], where: str) -> None:
    """Refuse what the grid sets itself.

    Raises:
        ArgumentError: such an argument was given.
    """
    for name in args:
        if name in _OF_THE_GRID:
            raise ArgumentError(f"{where}: {name} is set by {_OF_THE_GRID[name]}; leave it out")


def rows(methods: Sequence[Method], experts: Sequence[Member], classifier: str | None) -> list[Method]:
    """Methods with the experts that they use; ``expert`` becomes a row for each.

    Args:
        methods: as named.
        experts: those of the comparison.
        classifier: the value of ``experts=`` of the classifier, where there is one.

    Raises:
        ArgumentError: a method names experts that do not take part.
    """
    found = []
    for method in methods:
        if not method.takes_experts:
            found.append(method)
            continue
        taking = select(method.members, experts, method.label)
        if method.adapt == "expert":
            found += [
                replace(method, label=f"{method.label} {one.label}", args={"experts": one.value, **method.args})
                for one in taking
            ]
        else:
            asked = [classifier] if classifier is not None and method.adapt in ("classifier", "auto") else []
            values = "+".join([*(one.value for one in taking), *asked])
            found.append(replace(method, args={"experts": values, **method.args}))
    return found


def adapter_rows(folders: Sequence[str]) -> list[Method]:
    """A row for each adapter of PEFT, named after its folder.

    Raises:
        ArgumentError: a folder is none of an adapter, two of them have one name, or model_args cannot say its path.
        DependencyError: PEFT is not installed.
        ExpertFileError: an adapter's files cannot be read.
    """
    found: list[Method] = []
    for folder in folders:
        if "," in folder:
            raise ArgumentError(f"--adapters: {folder} has a comma in its path, which model_args cannot say; rename it")
        label = f"peft {read_folder(folder).name}"
        if label in [method.label for method in found]:
            raise ArgumentError(f"--adapters names two adapters {label.removeprefix('peft ')}; rename a folder")
        found.append(Method(label, "peft", {"peft": folder}))
    return found


def cells(
    task: str, methods: Sequence[Method], controls: Sequence[str], seeds: Sequence[int], common: Mapping[str, Any]
) -> list[Cell]:
    """The cells of a task: each method once, or once for each seed where something is drawn, and so its controls."""
    found = []
    for method in methods:
        args = {"adapt": method.adapt, **effective(method.adapt, common), **method.args}
        for control in controls if method.takes_experts else ("none",):
            for seed in seeds if method.draws or control != "none" else (None,):
                own = {**args}
                if control != "none":
                    own |= {"control": control, "control_seed": seed}
                if method.draws:
                    own |= {"adapt_seed": seed}
                found.append(Cell(task, method.label, control, seed, own))
    return found


def effective(adapt: str, common: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the common model_args that a strategy takes."""
    return {
        name: value
        for name, value in common.items()
        if name not in MODEL_ARGS or not MODEL_ARGS[name].strategies or adapt in MODEL_ARGS[name].strategies
    }


def check_used(common: Mapping[str, Any], methods: Iterable[Method]) -> None:
    """Refuse common model_args that no method takes.

    Raises:
        ArgumentError: there is one.
    """
    strategies = [method.adapt for method in methods]
    for name in common:
        if not any(name in effective(adapt, common) for adapt in strategies):
            wanted = ", ".join(MODEL_ARGS[name].strategies)
            raise ArgumentError(
                f"--model-args: {name} has no effect with these methods, it is for {wanted}; leave it out"
            )


def _parts(text: str) -> list[str]:
    """Split by the commas that stand outside of brackets."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if depth < 0:
            break
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    if depth:
        raise ArgumentError(f"--methods {text}: brackets do not match")
    return parts
