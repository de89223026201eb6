"""The strategy protocol: what a strategy is given, and the plan it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from t2.adapters.engine.base import Engine
from t2.adapters.expert import Expert, Normalise, Space, Z
from t2.core.record import Generation, HeldOut

Per = Literal["expert", "layer", "matrix"]


@dataclass(frozen=True)
class Options:
    """Settings of a strategy; they are the model_args of the same names.

    Attributes:
        alpha: for ``mix``: one coefficient per expert; None means uniform.
        population, generations, elite: of the search.
        per: one α per expert, per expert and layer, or per expert and matrix.
        space, normalise: see :func:`t2.adapters.expert.mix`.
        rescale: ``nuclear`` keeps each matrix's nuclear norm.
        rank: only the first so many components may move; None lets all.
        seed: the user's ``adapt_seed``.
    """

    alpha: tuple[float, ...] | None = None
    population: int = 32
    generations: int = 100
    elite: float = 0.2
    per: Per = "expert"
    space: Space = "paper"
    normalise: Normalise = "none"
    rescale: Literal["none", "nuclear"] = "none"
    rank: int | None = None
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """How a mixture did on the adaptation docs.

    Attributes:
        value: the task's metric over the set, signed so that higher is better.
        per_doc: the metric of each doc, where it is a number.
    """

    value: float
    per_doc: tuple[float, ...] = ()


class Scorer(Protocol):
    """Scores mixtures on labelled adaptation docs; the harness makes one from a task.

    Attributes:
        docs: number of adaptation docs.
        higher_is_better: direction of the task's metric; :class:`Score` is signed, records are not.
    """

    docs: int
    higher_is_better: bool

    def evaluate(self, mixtures: Sequence[Z | None]) -> list[Score]:
        """Answer the adaptation docs under each mixture (None is the base) and score the answers."""
        ...

    def tie_break(self, mixtures: Sequence[Z | None]) -> list[float]:
        """Mean log-likelihood per token of each mixture's own right answers, in nats; −inf when it has none.

        For metrics that are not 0/1, of the gold answers. Only mixtures that :meth:`evaluate` has seen.
        """
        ...


@dataclass(frozen=True)
class Job:
    """One adaptation to do.

    Attributes:
        task: its name, for messages.
        prompts: the text of each doc to be answered, without few-shot examples or template; what a dispatch reads.
        experts: the experts, controls already applied.
        engine: runs the model.
        options: settings.
        encode_pair: tokens of (context, continuation), split at the border as the harness does it.
        render: wraps a user message in the chat template when the user asked for it; otherwise the identity.
        scorer: for strategies that need labels; made only then.
        progress: show progress bars.
    """

    task: str
    prompts: Sequence[str]
    experts: Sequence[Expert]
    engine: Engine
    options: Options
    encode_pair: Callable[[str, str], tuple[list[int], list[int]]]
    render: Callable[[str], str]
    scorer: Scorer | None = None
    progress: bool = True


@dataclass(frozen=True)
class Choice:
    """One mixture of a plan: α by expert name (empty for the base) and the effective z (None for the base)."""

    alpha: dict[str, float] = field(default_factory=dict)
    z: Z | None = None


@dataclass(frozen=True)
class Plan:
    """Which mixture answers which prompt, and why.

    Attributes:
        choices: the distinct mixtures.
        rows: for each prompt of the job the index of its mixture.
        note: the reason, in one sentence.
        held_out: scores before and after on the adaptation docs, for a search.
        history: the generations of a search.
        dispatch: prompts by domain, for a dispatch.
        no_signal: all candidates tied and the base was kept.
    """

    choices: tuple[Choice, ...]
    rows: tuple[int, ...]
    note: str
    held_out: HeldOut | None = None
    history: tuple[Generation, ...] = ()
    dispatch: dict[str, int] = field(default_factory=dict)
    no_signal: bool = False


class Strategy(Protocol):
    """A way to choose mixtures.

    Attributes:
        needs_experts: it does nothing without experts.
        needs_labels: it wants a scorer over labelled adaptation docs.
    """

    needs_experts: bool
    needs_labels: bool

    def plan(self, job: Job) -> Plan:
        """Choose the mixtures.

        Raises:
            T2Error: the job's experts or options do not fit the strategy.
        """
        ...
