"""What the registry tells and takes: the shapes that the service, the HTTP API and both clients share.

Times are UTC. A field that is None is not known or does not apply; it is always there.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

from t2.core.curve import CurvePoint
from t2.core.manifest import Kind
from t2.core.references import ALIAS_PATTERN, DIGEST_PATTERN, METRIC_PATTERN, NAME_PATTERN, TAG_PATTERN
from t2.registry.names import MAX_METRICS, MAX_NUMBER

Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Alias = Annotated[str, StringConstraints(pattern=ALIAS_PATTERN)]
Tag = Annotated[str, StringConstraints(pattern=TAG_PATTERN)]
MetricName = Annotated[str, StringConstraints(pattern=METRIC_PATTERN)]
Digest = Annotated[str, StringConstraints(pattern=DIGEST_PATTERN)]
NO_NUL = r"^[^\x00]*$"
"""Pattern of text without NUL, which PostgreSQL cannot store."""
Text = Annotated[str, StringConstraints(max_length=4000, pattern=NO_NUL)]
ShortText = Annotated[str, StringConstraints(max_length=200, pattern=NO_NUL)]
MatrixName = Annotated[str, StringConstraints(min_length=1, max_length=200, pattern=NO_NUL)]
BaseId = MatrixName


def _whole(value: object) -> object:
    """Convert 3.0 to 3: JSON does not distinguish them."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Number = Annotated[int, Field(ge=1, le=MAX_NUMBER), BeforeValidator(_whole)]
Step = Annotated[int, Field(ge=0, le=MAX_NUMBER), BeforeValidator(_whole)]
Targets = Annotated[dict[MatrixName, Number], Field(min_length=1, max_length=10_000)]
Metrics = Annotated[dict[MetricName, float], Field(max_length=MAX_METRICS)]
Scope = Literal["read", "write", "admin"]

VALIDATION_SCORE = "validation.score"
"""The metric by which default experts are chosen: the best score on validation docs, larger being better."""

MAX_PAGE = 200
T = TypeVar("T")


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


M = TypeVar("M", bound=_Frozen)


def known(model: type[M], values: dict[str, Any]) -> M:
    """A shape of values that the database gave and that need no check; a list has hundreds of them.

    ``model_construct`` would be the official way, and takes as long as checking.

    Args:
        values: all fields of the model, right in number and type; they are not copied.
    """
    made = model.__new__(model)
    for name, value in (
        ("__dict__", values),
        ("__pydantic_fields_set__", set(values)),
        ("__pydantic_extra__", None),
        ("__pydantic_private__", None),
    ):
        object.__setattr__(made, name, value)
    return made


class Page(_Frozen, Generic[T]):
    """One page of a list.

    Attributes:
        items: in the order asked for.
        next: give it as ``cursor`` for the page after this one; None on the last. Opaque, and good for the same query.
    """

    items: list[T]
    next: str | None = None


class Namespace(_Frozen):
    """A namespace: a team or a person."""

    name: Name
    description: str
    created_at: datetime


class BaseModelInfo(_Frozen):
    """A base model that experts belong to.

    Attributes:
        fingerprint: digest of its adapted matrices, its identity.
        id: the name it was loaded by.
        targets: rank of each adaptable matrix, by parameter name; None while only experts for it are known. Once it is
            known an upload must agree with it.
    """

    fingerprint: Digest
    id: str
    revision: str | None
    targets: dict[str, int] | None
    created_at: datetime


class Version(_Frozen):
    """One immutable version of an expert, with what may change about it: aliases, metrics, deletion.

    Attributes:
        name: ``namespace/name``.
        version: its number, from 1.
        digest: SHA-256 of the file.
        size: bytes of the file.
        base_model, base_fingerprint: the base model's id and fingerprint.
        matrices, values: how many matrices it scales, and how many numbers it holds.
        training_docs: how many document hashes its manifest lists.
        aliases: that point to it now.
        metrics: numbers about it; :data:`VALIDATION_SCORE` is the best score on validation docs.
        created_by: who uploaded it, as ``source:subject``.
        created: False where an upload found the same content there already.
    """

    name: str
    version: int
    digest: Digest
    size: int
    kind: Kind
    task: str | None
    domain: str | None
    method: str | None
    description: str
    base_model: str
    base_fingerprint: Digest
    matrices: int
    values: int
    training_docs: int
    aliases: tuple[str, ...]
    metrics: dict[str, float]
    created_at: datetime
    created_by: str
    deleted_at: datetime | None
    created: bool = True

    @property
    def reference(self) -> str:
        """``namespace/name@version``."""
        return f"{self.name}@{self.version}"


class VersionDetail(Version):
    """A version with its manifest.

    Attributes:
        manifest: as in the file, without the hashes of the training docs, which may be a megabyte.
    """

    manifest: dict[str, Any]


class Expert(_Frozen):
    """An expert: a name under which versions are kept.

    Attributes:
        latest: its newest version that is not deleted; None where all are.
        versions: how many there are that are not deleted.
        tags: sorted.
        updated_at: when it last got a version, an alias, a tag or a description.
        aliases: the version that each alias points to, by alias; None from a server of an older t2.
    """

    name: str
    kind: Kind
    description: str
    tags: tuple[str, ...]
    versions: int
    latest: Version | None
    created_at: datetime
    updated_at: datetime
    deleted_at: datetime | None
    aliases: dict[str, int] | None = None


class AliasInfo(_Frozen):
    """Where an alias points."""

    alias: str
    version: int
    digest: Digest
    updated_at: datetime
    updated_by: str


class AliasEvent(_Frozen):
    """One entry of an alias's history, which only grows.

    Attributes:
        version: what it pointed to from then on; None when it was removed.
        previous: what it pointed to before; None when it was new.
    """

    alias: str
    version: int | None
    previous: int | None
    at: datetime
    by: str
    reason: str


class Curve(_Frozen):
    """A reward curve, or a downsampled one.

    Attributes:
        points: by step, training before validation at the same step.
        total: points that the registry holds, of the asked splits.
    """

    points: tuple[CurvePoint, ...]
    total: int


class LineageNode(_Frozen):
    """An expert in a family tree.

    Attributes:
        digest: its identity.
        references: the versions that have this content, as ``namespace/name@version``, the twenty oldest at most; none
            where it is not here.
        kind: None where it is not here.
    """

    digest: Digest
    references: tuple[str, ...]
    kind: Kind | None


class LineageEdge(_Frozen):
    """``child`` was made of ``alpha`` times ``parent``, and perhaps others."""

    child: Digest
    parent: Digest
    alpha: float


class Lineage(_Frozen):
    """Ancestors and descendants of one content.

    Attributes:
        root: the digest that was asked for.
        truncated: whether the tree is larger than the limit of nodes.
    """

    root: Digest
    nodes: tuple[LineageNode, ...]
    edges: tuple[LineageEdge, ...]
    truncated: bool


class MetricRange(_Frozen):
    """Both ends belong to the range; None is open."""

    name: MetricName
    minimum: float | None = None
    maximum: float | None = None


Sort = Literal["-updated", "updated", "name", "-name", "-score", "score", "-created", "created"]


class ExpertQuery(_Frozen):
    """What a list of experts is narrowed to; what is None or empty narrows nothing.

    Every condition but ``namespace``, ``text`` and ``tags`` is about an expert's latest version.

    Attributes:
        text: part of the name, the description or the task, upper and lower case alike.
        base: a base model's fingerprint, or its id.
        tags: all of them.
        metrics: all of these ranges.
        sort: order, ``-`` is descending; ``score`` is :data:`VALIDATION_SCORE` and lists only experts that have one.
        deleted: list the deleted ones instead.
    """

    namespace: Name | None = None
    text: Annotated[str, StringConstraints(min_length=1, max_length=100)] | None = None
    base: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    task: Annotated[str, StringConstraints(max_length=200)] | None = None
    domain: Annotated[str, StringConstraints(max_length=200)] | None = None
    kind: Kind | None = None
    tags: tuple[Tag, ...] = Field(default=(), max_length=10)
    metrics: tuple[MetricRange, ...] = Field(default=(), max_length=5)
    sort: Sort = "-updated"
    deleted: bool = False


class VersionQuery(_Frozen):
    """What a list of versions, of all experts, is narrowed to; deleted ones are never in it.

    Attributes:
        fingerprint: of the base model.
        digest: the content.
        alias: versions that this alias points to.
    """

    fingerprint: Digest | None = None
    kind: Kind | None = None
    domain: Annotated[str, StringConstraints(max_length=200)] | None = None
    digest: Digest | None = None
    alias: Alias | None = None


class RunScore(_Frozen):
    """What a metric said of a run.

    Attributes:
        score, stderr: as lm-eval told them; None where that is no number.
        low, high: 95% interval of the score; None where neither samples nor a standard error tell one.
        n: documents it was computed from.
        confirmed: whether the registry computed the same score from the run's samples.
    """

    metric: str
    filter: str
    score: float | None
    stderr: float | None
    low: float | None
    high: float | None
    n: int
    higher_is_better: bool
    confirmed: bool = False


class RunExpert(_Frozen):
    """An expert that took part in a run.

    Attributes:
        references: the versions with its content, as ``namespace/name@version``, twenty at most; empty if the registry
            does not have it. Those of the queried expert come first, then the one by which the run named it, then those
            of the run's namespace, then the newest.
    """

    name: str
    digest: Digest
    domain: str | None
    references: tuple[str, ...]


class Run(_Frozen):
    """One task of one evaluation.

    Attributes:
        digest: its identity in its namespace: the same evaluation again, with the same samples, has the same one.
        docs, docs_digest: how many documents were scored, and which.
        prompts_digest: how they were asked.
        samples_digest, samples_size: SHA-256 and bytes of the file of samples.
        model: lm-eval's name of the model, such as ``t2`` or ``hf``.
        base, base_revision: the base model's name and revision.
        base_fingerprint, base_identity: digests of the base model, only of runs of t2. Experts are matched by
            fingerprint, runs by identity.
        strategy, control, seed: how it was adapted, and the seed of that.
        record_digest: of t2's adaptation record.
        scores: by metric and filter, the task's first one first.
        evaluated_at: when, by the clock of whoever evaluated.
        created_by: who pushed it, as ``source:subject``.
        created: False where a push found it there already.
    """

    namespace: Name
    digest: Digest
    task: str
    task_version: str
    n_shot: int
    docs: int
    docs_digest: Digest
    prompts_digest: Digest
    samples_digest: Digest
    samples_size: int
    model: str
    base: str
    base_revision: str | None
    base_fingerprint: Digest | None
    base_identity: Digest | None = None
    strategy: str
    control: str
    seed: int | None
    record_digest: Digest | None
    experts: tuple[RunExpert, ...]
    scores: tuple[RunScore, ...]
    evaluated_at: datetime | None
    created_at: datetime
    created_by: str
    created: bool = True

    @property
    def reference(self) -> str:
        """``namespace/digest``."""
        return f"{self.namespace}/{self.digest}"


class RunDetail(Run):
    """A run with all that was told of it.

    Attributes:
        header: the first line of its file: settings, seeds, versions, adaptation record.
    """

    header: dict[str, Any]


class RunQuery(_Frozen):
    """What a list of runs is narrowed to; what is None narrows nothing.

    Attributes:
        base: a base model's name, identity or fingerprint.
        expert: runs with an expert: a reference to a version, ``@sha256:…``, or a name for any of its versions.
        digest: of the run; its first characters will do.
    """

    namespace: Name | None = None
    task: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    base: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    expert: Annotated[str, StringConstraints(min_length=1, max_length=300)] | None = None
    strategy: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    digest: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{6,64}$")] | None = None


class Board(_Frozen):
    """What can be compared: one version of a task, with as many shots, on the same documents, by one base model.

    Attributes:
        base: the model's name.
        base_identity: the model's identity; None if no run has one. Runs without one, such as those of other models of
            lm-eval, are on every board of their model's name.
        runs: how many there are.
    """

    task: str
    task_version: str
    n_shot: int
    base: str
    base_identity: Digest | None = None
    docs: int
    docs_digest: Digest
    runs: int


class BoardQuery(_Frozen):
    """Which board, and by which metric; what is None is chosen.

    Of several boards that one is taken that has most documents, and of these the one with the newest run. Without a
    metric the first one of its newest run is taken, of runs with a confirmed first score if there are any.

    Attributes:
        base: a base model's name, identity or fingerprint.
    """

    task: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    base: Annotated[str, StringConstraints(min_length=1, max_length=200)]
    task_version: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    n_shot: Annotated[int, Field(ge=0, le=10_000)] | None = None
    docs_digest: Digest | None = None
    metric: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None
    filter: Annotated[str, StringConstraints(min_length=1, max_length=200)] | None = None


class BoardEntry(_Frozen):
    """A run on a board, and the score that it stands by."""

    score: RunScore
    run: Run


class BoardPage(_Frozen):
    """A page of a board.

    Attributes:
        items: confirmed scores before the others, the best first by the metric's direction; runs without a number are
            left out.
        next: as of :class:`Page`.
    """

    board: Board
    metric: str
    filter: str
    higher_is_better: bool
    items: list[BoardEntry]
    next: str | None = None


class AliasRun(_Frozen):
    """A run of a version that an alias points or pointed to.

    Attributes:
        version: which.
        since: when the alias was last moved to it.
        current: whether it points to it now.
    """

    version: int
    since: datetime
    current: bool
    run: Run


Label = Annotated[str, StringConstraints(min_length=1, max_length=200)]
RunReference = Annotated[str, StringConstraints(min_length=1, max_length=300)]


class VerdictQuery(_Frozen):
    """What to judge, and how (:func:`t2.core.comparison.compare_results`).

    A reference is a run, by ``namespace/digest`` or the first characters of the digest, or an expert, whose newest run
    of each task counts, of those with no other expert and no control: ``team/math@3``, ``team/math@production``, which
    ``team/math`` alone is too, or ``@sha256:…``.

    Attributes:
        baseline, candidate: references.
        margin: the largest drop that does not matter, in the unit of the score.
        noise: references of repeats of one evaluation, at least two, or none.
        tasks: those to compare; all if empty.
        metric, filter: what to compare by; each task's first where not told.
        level: of the intervals.
        power: of the smallest drop that is told.
        seed: of the bootstrap.
    """

    baseline: RunReference
    candidate: RunReference
    margin: Annotated[float, Field(ge=0)]
    noise: Annotated[tuple[RunReference, ...], Field(max_length=20)] = ()
    tasks: Annotated[tuple[Label, ...], Field(max_length=100)] = ()
    metric: Label | None = None
    filter: Label | None = None
    level: Annotated[float, Field(gt=0, lt=1)] = 0.95
    power: Annotated[float, Field(gt=0.5, lt=1)] = 0.8
    seed: int = 0


VerdictName = Literal["REGRESSED", "IMPROVED", "NO CHANGE", "UNDERPOWERED"]


class JudgedTask(_Frozen):
    """The verdict on one task.

    Attributes:
        baseline_run, candidate_run: the runs, as ``namespace/digest``.
        n: documents.
        baseline, candidate: mean scores.
        difference: of the candidate; above 0 it is better, also where lower scores are.
        interval: of the difference.
        test: how p was found.
        p, p_holm: of no difference, and adjusted for the number of tasks.
        wins, losses: documents.
        noise: the noise floor; 0 without repeats.
        smallest_drop: that would have been found with the power; None where none would.
    """

    task: str
    baseline_run: str
    candidate_run: str
    verdict: VerdictName
    metric: str
    filter: str
    higher_is_better: bool
    n: int
    baseline: float
    candidate: float
    difference: float
    interval: tuple[float, float]
    test: Literal["mcnemar", "bootstrap", "signs"]
    p: float
    p_holm: float
    wins: int
    losses: int
    noise: float
    smallest_drop: float | None


class Judgement(_Frozen):
    """The verdict on a candidate beside a baseline.

    Attributes:
        verdict: on all tasks together.
        reason: what it means, for people.
        margin, level, power: as asked.
        tasks: sorted by name.
        unpaired: skipped tasks, whose score in the baseline is not a mean over documents.
    """

    verdict: VerdictName
    reason: str
    margin: float
    level: float
    power: float
    tasks: list[JudgedTask]
    unpaired: list[str] = []


class TokenInfo(_Frozen):
    """An access token, without its secret."""

    id: int
    name: str
    prefix: str
    scopes: tuple[Scope, ...]
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    revoked_at: datetime | None


class NewToken(TokenInfo):
    """A token just made; its ``secret`` is told this once."""

    secret: str


class AuditEntry(_Frozen):
    """Who did what: ``source:subject:action`` on an object.

    Attributes:
        source: ``api``, ``embedded`` or ``cli``.
        subject: the token's name, or the user of the machine.
        action: such as ``version.create``.
        object: such as ``team/math@3``.
    """

    id: int
    at: datetime
    source: str
    subject: str
    action: str
    object: str
    detail: dict[str, Any]
