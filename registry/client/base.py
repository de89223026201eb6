"""The one protocol of registry clients, for an embedded registry and for a server alike.

Both implementations raise the same errors for the same mistakes (``RegistryError`` and below, in
:mod:`t2.core.errors`), and the same tests run on both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Protocol, Self

from t2.core.curve import CurvePoint
from t2.core.references import ExpertName, Reference
from t2.registry.schemas import (
    AliasEvent,
    AliasInfo,
    AliasRun,
    AuditEntry,
    BaseModelInfo,
    Board,
    BoardPage,
    BoardQuery,
    Curve,
    Expert,
    ExpertQuery,
    Judgement,
    Lineage,
    Namespace,
    NewToken,
    Page,
    Run,
    RunDetail,
    RunQuery,
    Scope,
    TokenInfo,
    VerdictQuery,
    Version,
    VersionDetail,
    VersionQuery,
)


class RegistryClient(Protocol):
    """A registry of experts.

    Every method may raise :class:`~t2.core.errors.UnavailableError`, and over HTTP
    :class:`~t2.core.errors.UnauthorizedError` and :class:`~t2.core.errors.ForbiddenError`. ``limit`` is at most
    :data:`~t2.registry.schemas.MAX_PAGE`. What is not there is a :class:`~t2.core.errors.NotFoundError`.

    Attributes:
        location: URL or folder, for people.
    """

    location: str

    def publish(
        self, name: ExpertName, data: bytes, *, description: str = "", idempotency_key: str | None = None
    ) -> Version:
        """Upload an expert's file as the next version of ``name``; the namespace and the expert are made when new.

        The version is there, whole and for ever, once this returns. The same content under the same name again gives
        the version that is there, with ``created`` False.

        Args:
            data: the file's bytes.
            description: a note on this version, at most 2000 bytes in UTF-8.
            idempotency_key: an upload repeated under the same key within a day does nothing more than the first.

        Raises:
            InvalidRequestError: the file breaks the strict profile, or its ranks differ from its base model's.
            TooLargeError: it is over the registry's limit.
            ConflictError: the expert is of another kind, or the content was deleted under this name (restore it), or
                the key was used for another upload.
        """
        ...

    def get_expert(self, name: ExpertName) -> Expert: ...

    def list_experts(
        self, query: ExpertQuery | None = None, *, cursor: str | None = None, limit: int = 50
    ) -> Page[Expert]:
        """Experts that meet the query.

        Raises:
            InvalidRequestError: the cursor is damaged or of another query.
        """
        ...

    def describe_expert(self, name: ExpertName, description: str) -> Expert: ...

    def resolve(self, reference: Reference) -> VersionDetail:
        """The version that a reference means; without a selector by ``production``, else the latest.

        By bare digest the first version ever uploaded with that content is told.
        """
        ...

    def list_versions(self, name: ExpertName, *, cursor: str | None = None, limit: int = 50) -> Page[Version]:
        """Versions of one expert, newest first, the deleted ones among them."""
        ...

    def search_versions(self, query: VersionQuery, *, cursor: str | None = None, limit: int = 50) -> Page[Version]:
        """Versions of all experts, newest first."""
        ...

    def download(self, digest: str) -> bytes:
        """The file with this SHA-256, an expert or the samples of a run, checked against it.

        Raises:
            RegistryError: the registry gave other bytes.
        """
        ...

    def set_metrics(self, name: ExpertName, version: int, metrics: Mapping[str, float]) -> Version:
        """Set these metrics; others stay."""
        ...

    def list_aliases(self, name: ExpertName) -> Sequence[AliasInfo]: ...

    def set_alias(self, name: ExpertName, alias: str, version: int, *, reason: str = "") -> AliasInfo:
        """Point an alias to a version that is not deleted."""
        ...

    def delete_alias(self, name: ExpertName, alias: str, *, reason: str = "") -> None: ...

    def alias_history(
        self, name: ExpertName, alias: str | None = None, *, cursor: str | None = None, limit: int = 50
    ) -> Page[AliasEvent]:
        """Newest first."""
        ...

    def change_tags(self, name: ExpertName, *, add: Iterable[str] = (), remove: Iterable[str] = ()) -> Expert: ...

    def delete(self, name: ExpertName, version: int | None = None) -> None:
        """Mark a version, or the whole expert, as deleted: it is in no list and no alias, and can be restored.

        Raises:
            ConflictError: an alias points to the version; move or remove it first.
        """
        ...

    def restore(self, name: ExpertName, version: int | None = None) -> None: ...

    def add_points(self, name: ExpertName, version: int, points: Sequence[CurvePoint]) -> int:
        """Add points to a version's reward curve, at most 10,000 a call; returns how many are new.

        A point with the step and split of one that is there replaces nothing; an equal one is passed over.

        Raises:
            ConflictError: a point differs from the one there.
        """
        ...

    def curve(self, name: ExpertName, version: int, *, split: str | None = None, points: int | None = None) -> Curve:
        """A version's reward curve: whole, or downsampled to at most ``points`` a split (at least 3)."""
        ...

    def lineage(self, digest: str) -> Lineage: ...

    def push_run(self, namespace: str, data: bytes) -> Run:
        """Put a run on the boards; the namespace is made when new.

        The same run again in the same namespace gives the one that is there, with ``created`` False.

        Args:
            data: the file of a run (:mod:`t2.core.runfile`).

        Raises:
            InvalidRequestError: it is no such file, or tells other than its samples do.
            TooLargeError: it is over the registry's limit.
        """
        ...

    def list_runs(self, query: RunQuery | None = None, *, cursor: str | None = None, limit: int = 50) -> Page[Run]:
        """Runs that meet the query, newest first."""
        ...

    def get_run(self, namespace: str, digest: str) -> RunDetail: ...

    def delete_run(self, namespace: str, digest: str) -> None:
        """Take a run off the boards, for ever; it can be pushed again."""
        ...

    def list_boards(
        self, *, task: str | None = None, base: str | None = None, cursor: str | None = None, limit: int = 50
    ) -> Page[Board]:
        """Boards that have runs, newest first; ``base`` is a name, identity or fingerprint."""
        ...

    def board(self, query: BoardQuery, *, cursor: str | None = None, limit: int = 50) -> BoardPage:
        """A board, the best run first."""
        ...

    def alias_runs(self, name: ExpertName, alias: str, *, cursor: str | None = None, limit: int = 50) -> Page[AliasRun]:
        """Runs of the versions that an alias points or pointed to, newest first."""
        ...

    def verdict(self, query: VerdictQuery) -> Judgement:
        """Compare runs that the registry holds, document by document.

        Raises:
            InvalidRequestError: a reference names neither a run nor an expert, or more than one run.
            ConflictError: the runs cannot be compared; the message is the reason.
            TooLargeError: their samples are over the registry's limit.
        """
        ...

    def create_namespace(self, name: str, description: str = "") -> Namespace:
        """Raises ConflictError where it exists."""
        ...

    def list_namespaces(self, *, cursor: str | None = None, limit: int = 50) -> Page[Namespace]: ...

    def put_base_model(
        self, fingerprint: str, id: str, revision: str | None, targets: Mapping[str, int]
    ) -> BaseModelInfo:
        """Tell the ranks of a base model's matrices; uploads must agree with them from then on.

        Raises:
            ConflictError: other ranks are known already, or an expert is there that disagrees.
        """
        ...

    def get_base_model(self, fingerprint: str) -> BaseModelInfo: ...

    def list_base_models(self, *, cursor: str | None = None, limit: int = 50) -> Page[BaseModelInfo]: ...

    def create_token(self, name: str, scopes: Sequence[Scope], *, days: float | None = None) -> NewToken:
        """Make an access token; ``days`` until it expires, None for never."""
        ...

    def list_tokens(self) -> Sequence[TokenInfo]: ...

    def revoke_token(self, id: int) -> TokenInfo: ...

    def audit(self, *, cursor: str | None = None, limit: int = 50) -> Page[AuditEntry]:
        """Newest first."""
        ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
