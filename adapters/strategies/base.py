"""The strategy protocol: what a strategy is given, and the plan it returns."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from t2.adapters.engine.base import Engine
from t2.adapters.expert import Expert, Normalise, Space, Z
from t2.adapters.search.budget import NO_BUDGET, Budget
from t2.core.digests import digest_of, doc_hash
from t2.core.record import Calibration, Considered, Generation, HeldOut, Preselection, SearchReport

Per = Literal["expert", "layer", "matrix"]
Memory = MutableMapping[tuple[str, str], tuple[float, ...]]
"""Answers to the questions of a dispatch: log-likelihoods of the labels, or the number of the generated one."""
Economy = Literal["none", "exact", "early", "halving"]
ECONOMIES: tuple[Economy, ...] = ("none", "exact", "early", "halving")


@dataclass(frozen=True)
class Options:
    """Settings of a strategy; they are the model_args of the same names.

    Attributes:
        alpha: for ``mix``: one coefficient per expert; None means uniform.
        search: which search ``cem`` and ``auto`` use, one of :data:`t2.adapters.search.SEARCHES`.
        population, generations, elite: of the search.
        budget: what ``cem`` and ``auto`` may spend.
        economy: what a search leaves out: nothing (``none``); what provably cannot change its held-out score
            (``exact``); also generations after some without a higher score (``early``); also, of each generation, the
            half that does worse on a part of the docs (``halving``).
        preselect: of more experts than this a search first picks so many; None lets all take part.
        per: one α per expert, per expert and layer, or per expert and matrix.
        space, normalise: see :func:`t2.adapters.expert.mix`.
        rescale: ``nuclear`` keeps each matrix's nuclear norm.
        rank: only the first so many components may move; None lets all.
        dispatch: how a prompt's domain is decided: by the likelihood of each label, or by the label that is generated.
        threshold: confidence below which a decision does not stand; None calibrates it on held-out prompts.
        fallback: what answers then: the mixture of all experts by their posteriors, or the base.
        seed: the user's ``adapt_seed``.
    """

    alpha: tuple[float, ...] | None = None
    search: str = "cem"
    population: int = 32
    generations: int = 100
    elite: float = 0.2
    budget: Budget = NO_BUDGET
    economy: Economy = "exact"
    preselect: int | None = 8
    per: Per = "expert"
    space: Space = "paper"
    normalise: Normalise = "none"
    rescale: Literal["none", "nuclear"] = "none"
    rank: int | None = None
    dispatch: Literal["likelihood", "generate"] = "likelihood"
    threshold: float | None = None
    fallback: Literal["mixture", "base"] = "mixture"
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
        prompts: the text of each of them, without few-shot examples or template; what a dispatch reads.
        higher_is_better: direction of the task's metric; :class:`Score` is signed, records are not.
    """

    docs: int
    prompts: Sequence[str]
    higher_is_better: bool

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The least and the largest value that a doc may have, where the score of a set is the mean of its docs'.

        None where it is not, or no bounds are known.
        """
        ...

    def evaluate(self, mixtures: Sequence[Z | None], docs: Sequence[int] | None = None) -> list[Score]:
        """Answer adaptation docs under each mixture (None is the base) and score the answers.

        Args:
            mixtures: what answers.
            docs: positions of the docs to answer; None means all.
        """
        ...

    def combine(self, mixtures: Sequence[Z | None], rows: Sequence[int], docs: Sequence[int] | None = None) -> Score:
        """The score of answering each doc under a mixture of its own.

        Args:
            mixtures: the distinct mixtures.
            rows: for each doc the index of its mixture.
            docs: positions of the docs to answer; None means all.
        """
        ...

    def tie_break(self, mixtures: Sequence[Z | None], docs: Sequence[int] | None = None) -> list[float]:
        """Mean log-likelihood per token of each mixture's own right answers, in nats; −inf when it has none.

        For metrics that are not 0/1, of the gold answers. Only mixtures that :meth:`evaluate` has seen on these docs.
        """
        ...


@dataclass(frozen=True)
class DomainPrompts:
    """Prompts of known domain that no expert's score rests on.

    Attributes:
        prompts: pairs of text and domain.
        sources: for each domain where its prompts come from.
    """

    prompts: tuple[tuple[str, str], ...] = ()
    sources: Mapping[str, str] = field(default_factory=dict)

    def digest(self) -> str:
        """Hex SHA-256 over the hashes and domains of the prompts."""
        return digest_of([[doc_hash(text), domain] for text, domain in self.prompts])


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
        say: tells the user a line.
        clock: seconds of wall clock; a budget in seconds reads it.
        pace: seconds that a mixture needs for all adaptation docs, where that is known.
        classifier: the expert that names domains, for ``classifier``.
        held_out: gives prompts of known domain for some labels, as suits the classifier that names them, or the base; a
            dispatch is calibrated and judged on them.
        template: wraps a user message in the chat template.
        decode: the text of generated tokens.
        memory: what a dispatch was answered before, by who was asked and a digest of the question's tokens, so that
            nothing is asked twice.
        calibrations: the same of the held-out prompts, where it is to outlive the run; None puts it into ``memory``.
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
    say: Callable[[str], None] = lambda text: None
    clock: Callable[[], float] = time.perf_counter
    pace: float = 0.0
    classifier: Expert | None = None
    held_out: Callable[[Sequence[str], Expert | None], DomainPrompts] | None = None
    template: Callable[[str], str] = lambda text: text
    decode: Callable[[Sequence[int]], str] = lambda tokens: ""
    memory: Memory = field(default_factory=dict)
    calibrations: Memory | None = None


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
        search: what it spent and why it ended.
        preselected: the experts that a search began with, where there were more.
        considered: what ``auto`` chose among.
        dispatch: prompts by domain, for a dispatch.
        calibration: what a dispatch rests on.
        no_signal: all candidates tied and the base was kept.
    """

    choices: tuple[Choice, ...]
    rows: tuple[int, ...]
    note: str
    held_out: HeldOut | None = None
    history: tuple[Generation, ...] = ()
    search: SearchReport | None = None
    preselected: Preselection | None = None
    considered: tuple[Considered, ...] = ()
    dispatch: dict[str, int] = field(default_factory=dict)
    calibration: Calibration | None = None
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
