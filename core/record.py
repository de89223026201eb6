"""The adaptation record: all that is needed to repeat and to judge one adaptation."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, SerializerFunctionWrapHandler, model_serializer

from t2.core.digests import digest_of
from t2.core.manifest import BaseModelRef, Hex


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


_FOUND = {"reference", "reason"}
"""How an expert was found says nothing of what it is."""

Number = Annotated[float | None, BeforeValidator(_finite_or_none)]
"""A metric; None where it is NaN or infinite, which JSON cannot say."""


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelRef(BaseModelRef):
    """The model that gave the answers.

    Attributes:
        identity: digest of everything that determines its answers: weights, buffers, configuration, tokenizer and
            arguments. (The fingerprint says which experts fit it.) None in records that are older than identities.
    """

    identity: Hex | None = None

    @model_serializer(mode="wrap")
    def _omit_unknown_identity(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # So that older records keep their digests.
        return {name: value for name, value in dump(self).items() if name != "identity" or value is not None}

    @property
    def base(self) -> BaseModelRef:
        """The model as an expert's manifest names it."""
        return BaseModelRef(id=self.id, revision=self.revision, fingerprint=self.fingerprint)


def _as_model(base: Any) -> Any:
    return base.model_dump() if type(base) is BaseModelRef else base


class Transferred(_Frozen):
    """Where an expert that ``transfer=`` took to another base model came from.

    Attributes:
        base: the model that it was trained on.
        matrices: of the base in use, how many it moves there.
        left_out: roles of its matrices (their names after the layer) that the base in use does not have.
    """

    base: BaseModelRef
    matrices: int
    left_out: tuple[str, ...] = ()


class ExpertRef(_Frozen):
    """An expert that took part.

    Attributes:
        name: what its file calls it.
        digest: of its file.
        domain: what it is for.
        reference: the version of a registry that it came from, ``namespace/name@version``, or by digest where it was
            named so; None for a file.
        reason: why it is among the experts; None where it was named.
        transferred: the base model that it was taken from; None for an expert of this one.
    """

    name: str
    digest: str
    domain: str | None = None
    reference: str | None = None
    reason: str | None = None
    transferred: Transferred | None = None

    @property
    def content(self) -> dict[str, Any]:
        """What it is, as JSON, whichever way it was found."""
        # Without a transfer it says nothing of one, as before there were any: records keep their digests.
        unsaid = _FOUND if self.transferred is not None else {*_FOUND, "transferred"}
        return self.model_dump(mode="json", exclude=unsaid)


class Objective(_Frozen):
    """What a search maximised: the task's metric, the filter before it, and its direction."""

    metric: str
    filter: str
    higher_is_better: bool = True


class HeldOut(_Frozen):
    """Scores on the adaptation docs of the base and of the chosen mixture."""

    docs: int
    before: Number
    after: Number


class Overlap(_Frozen):
    """How many of the docs of a result an expert was trained on, by hash, under whatever label.

    Attributes:
        expert: its name.
        scored: of the docs that are scored.
        adaptation: of the labelled docs that the search saw.
    """

    expert: str
    scored: int
    adaptation: int


class UsedMixture(_Frozen):
    """One mixture that answered prompts: α by expert name (empty for the base) and the number of requests."""

    alpha: dict[str, float]
    requests: int


class Generation(_Frozen):
    """One generation of a search.

    Attributes:
        best: the best score so far.
        mean: of those of its candidates that answered all adaptation docs.
        evaluations: what it cost: whole mixtures, and parts where some answered a part of the docs.
    """

    best: Number
    mean: Number
    evaluations: int | float


class SearchReport(_Frozen):
    """What a search spent: its algorithm, the evaluations, and why it ended.

    One evaluation is a mixture answering all adaptation docs; on a part of them it counts as that part.
    """

    algorithm: str
    evaluations: float
    stopped: str


class Preselected(_Frozen):
    """An expert that was chosen for a search, and its own score on the adaptation docs."""

    name: str
    score: Number


class Preselection(_Frozen):
    """Of how many experts the chosen ones, from the best on, and the evaluations it cost.

    Those that a search began with; the one that ``adapt=best`` took.
    """

    of: int
    experts: tuple[Preselected, ...]
    evaluations: float


class Considered(_Frozen):
    """A strategy that ``auto`` considered.

    Attributes:
        strategy: what it is.
        score: on the adaptation docs, none of which was used to fit what answered it; None where it was not judged.
        docs: how many those are.
        cost: predicted, in evaluations (answering all adaptation docs once).
        seconds: predicted, by what an evaluation took on this machine; not part of the record's digest.
        chosen: whether it was chosen.
        reason: why, or why not.
    """

    strategy: str
    score: Number = None
    docs: int = 0
    cost: float | None = None
    seconds: float | None = None
    chosen: bool = False
    reason: str = ""


class Calibration(_Frozen):
    """What the decisions of a dispatch rest on.

    Attributes:
        labels: the domains that could be named.
        temperature: the log-likelihoods of the labels were divided by it.
        threshold: confidence below which a decision did not stand; None where answers were generated.
        below: number of prompts below it.
        unparsed: number of generated answers that named no domain, and count as "others".
        docs: number of held-out prompts of known domain.
        docs_digest: hex SHA-256 over their hashes and domains.
        sources: where those of each domain come from.
        accuracy: share of them whose domain was named right.
        confusion: for each domain how many of its held-out prompts were given each name.
        scored: the same of the scored prompts, where the task says of which domain it is.
    """

    labels: tuple[str, ...]
    temperature: float | None = None
    threshold: float | None = None
    below: int = 0
    unparsed: int = 0
    docs: int = 0
    docs_digest: str
    sources: dict[str, str] = Field(default_factory=dict)
    accuracy: float | None = None
    confusion: dict[str, dict[str, int]] = Field(default_factory=dict)
    scored: dict[str, dict[str, int]] = Field(default_factory=dict)


class Timing(_Frozen):
    """Seconds of wall clock: pass 1 finds the mixture, pass 2 answers."""

    pass1: float = 0.0
    pass2: float = 0.0


class AdaptationRecord(_Frozen):
    """One adaptation of one base model to one task.

    Attributes:
        key: identity of the adaptation: its built requests, objective, base, experts, settings and seed.
        experts: what took part; the way to them (``reference``, ``reason``) is not part of :meth:`digest`.
        settings: the model_args that bear on the adaptation, resolved.
        adaptation_docs: content hashes of the labelled docs that the search saw.
        pool: the split they were drawn from, and how many of them an expert was trained on, if any.
        search: what a search spent, and why it ended.
        preselected: the experts that a search began with, where there were more than ``preselect``.
        considered: what ``adapt=auto`` chose among.
        overlap: the experts that were trained on docs of this result: it looks better than it is.
        mixtures: what answered the scored requests.
        no_signal: all candidates tied, so the base was kept.
        dispatch: number of prompts by domain, for the strategies that name one.
        calibration: what the decisions of a dispatch rest on.
        note: why this mixture, in one sentence.
        timing: seconds; not part of :meth:`digest`.
    """

    schema_version: Literal[1] = 1
    key: str
    task: str
    task_version: str
    strategy: str
    base: Annotated[ModelRef, BeforeValidator(_as_model)]
    dtype: str
    experts: tuple[ExpertRef, ...] = ()
    control: str = "none"
    settings: dict[str, Any] = Field(default_factory=dict)
    objective: Objective | None = None
    adaptation_docs: tuple[str, ...] = ()
    pool: str | None = None
    held_out: HeldOut | None = None
    history: tuple[Generation, ...] = ()
    search: SearchReport | None = None
    preselected: Preselection | None = None
    considered: tuple[Considered, ...] = ()
    overlap: tuple[Overlap, ...] = ()
    mixtures: tuple[UsedMixture, ...] = ()
    dispatch: dict[str, int] = Field(default_factory=dict)
    calibration: Calibration | None = None
    no_signal: bool = False
    note: str = ""
    command: str = ""
    timing: Timing = Timing()

    def digest(self) -> str:
        """Hex SHA-256 of the record without seconds, command line and the way to its experts.

        Equal adaptations have equal digests.
        """
        content = self.model_dump(
            mode="json",
            exclude={
                "timing": True,
                "command": True,
                "considered": {"__all__": {"seconds"}},
                "experts": True,
            },
        )
        return digest_of({**content, "experts": [expert.content for expert in self.experts]})
