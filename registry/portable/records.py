"""What stands in an archive of a registry: ``records/*.jsonl``, one record a line, ``blobs/<digest>`` and
``samples/<digest>``.

A record comes after everything that it refers to, the blobs among them. The first is :class:`RegistryRecord`, the last
:class:`EndRecord`. Fields that follow from an expert's file are not here: they are read from the file again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints, TypeAdapter

from t2.core.curve import CurvePoint
from t2.core.digests import canonical_json, sha256
from t2.core.errors import ArgumentError, InvalidRequestError
from t2.core.expertfile import MAX_FILE_BYTES
from t2.core.manifest import Kind
from t2.core.references import is_digest, parse_name
from t2.core.times import Time
from t2.core.validation import first_fault
from t2.registry.names import MAX_ALIASES, MAX_POINTS_A_CALL, MAX_TAGS, check_namespace
from t2.registry.portable import tar
from t2.registry.schemas import (
    NO_NUL,
    Alias,
    BaseId,
    Digest,
    Metrics,
    Name,
    ShortText,
    Step,
    Tag,
    Targets,
    Text,
)
from t2.registry.services import tokens

FORMAT = 1
CHUNK = 1 << 20
"""Bytes of a file of records, about; longer by one record at most."""
MAX_RECORDS_BYTES = 16 << 20
POINTS = 1000
"""Points of a curve in one record."""
BLOBS, SAMPLES, RECORDS = "blobs/", "samples/", "records/"


def _path(text: str) -> str:
    try:
        return str(parse_name(text))
    except ArgumentError as error:
        raise ValueError(str(error)) from error


def _validator_of(check: Callable[[str], object]) -> Callable[[str], str]:
    """Build a validator from a check of the API, which raises InvalidRequestError."""

    def validate(text: str) -> str:
        try:
            check(text)
        except InvalidRequestError as error:
            raise ValueError(str(error)) from error
        return text

    return validate


def _plain_json(value: dict[str, Any]) -> dict[str, Any]:
    canonical_json(value)  # raises ValueError for NaN and infinity, which databases refuse
    return value


MAX_ARCHIVED_VERSION = 900_000_000
"""Below :data:`~t2.registry.names.MAX_VERSION`, to leave room for a hundred million uploads."""

ExpertPath = Annotated[str, AfterValidator(_path)]
Namespace = Annotated[Name, AfterValidator(_validator_of(check_namespace))]
Number = Annotated[int, Field(ge=1, le=MAX_ARCHIVED_VERSION)]
Last = Annotated[int, Field(ge=0, le=MAX_ARCHIVED_VERSION)]
Source = Annotated[str, StringConstraints(max_length=16, pattern=NO_NUL)]
Subject = Annotated[str, StringConstraints(max_length=100, pattern=NO_NUL)]
Action = Annotated[str, StringConstraints(max_length=64, pattern=NO_NUL)]
TokenName = Annotated[str, AfterValidator(_validator_of(tokens.check_name))]


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class RegistryRecord(_Record):
    """Where the archive comes from.

    Attributes:
        revision: of the database's schema.
        namespace: what it is restricted to; None for everything.
    """

    type: Literal["registry"] = "registry"
    format: Literal[1] = 1
    revision: ShortText
    exported_at: Time
    namespace: Namespace | None


class NamespaceRecord(_Record):
    type: Literal["namespace"] = "namespace"
    name: Namespace
    description: Text
    created_at: Time


class BaseModelRecord(_Record):
    type: Literal["base-model"] = "base-model"
    fingerprint: Digest
    id: BaseId
    revision: ShortText | None
    targets: Targets | None
    created_at: Time


class ExpertRecord(_Record):
    """An expert; ``last`` is the highest number that it ever gave to a version."""

    type: Literal["expert"] = "expert"
    expert: ExpertPath
    kind: Kind
    description: Text
    tags: Annotated[tuple[Tag, ...], Field(max_length=MAX_TAGS)]
    last: Last
    created_at: Time
    updated_at: Time
    deleted_at: Time | None


class VersionRecord(_Record):
    type: Literal["version"] = "version"
    expert: ExpertPath
    number: Number
    digest: Digest
    description: Text
    metrics: Metrics
    created_at: Time
    created_by: Text
    deleted_at: Time | None


class PurgedRecord(_Record):
    """A name whose expert was purged, and its highest version number ever."""

    type: Literal["purged"] = "purged"
    path: ExpertPath
    last: Last


class PointOfCurve(CurvePoint):
    """A point of a reward curve."""

    step: Step


class PointsRecord(_Record):
    """A part of a version's reward curve, by split and step."""

    type: Literal["points"] = "points"
    expert: ExpertPath
    number: Number
    points: Annotated[tuple[PointOfCurve, ...], Field(max_length=MAX_POINTS_A_CALL)]


class AliasEventRecord(_Record):
    """One entry of the history of an expert's aliases, oldest first."""

    type: Literal["alias-event"] = "alias-event"
    expert: ExpertPath
    alias: Alias
    number: Number | None
    previous: Number | None
    at: Time
    by: Text
    reason: Text


class AliasTarget(_Record):
    number: Number
    updated_at: Time
    updated_by: Text


class AliasesRecord(_Record):
    """All aliases of an expert, after their history."""

    type: Literal["aliases"] = "aliases"
    expert: ExpertPath
    aliases: Annotated[dict[Alias, AliasTarget], Field(max_length=MAX_ALIASES)]


class RunRecord(_Record):
    """A run of a leaderboard; its samples are a blob before it.

    Attributes:
        header: the first line of the run's file, which tells everything else.
    """

    type: Literal["run"] = "run"
    namespace: Namespace
    samples: Digest
    header: str
    created_at: Time
    created_by: Text


class TokenRecord(_Record):
    """An access token; ``hash`` is the SHA-256 of its secret, which has 256 random bits and is nowhere kept."""

    type: Literal["token"] = "token"
    name: TokenName
    prefix: Annotated[str, StringConstraints(pattern=r"^t2r_[0-9a-f]{6}$")]
    hash: Digest
    scopes: Annotated[str, AfterValidator(_validator_of(tokens.parse_scopes))]
    created_at: Time
    expires_at: Time | None
    last_used_at: Time | None
    revoked_at: Time | None


class AuditRecord(_Record):
    type: Literal["audit"] = "audit"
    at: Time
    source: Source
    subject: Subject
    action: Action
    object: Text
    detail: Annotated[dict[str, Any], AfterValidator(_plain_json)]


class EndRecord(_Record):
    """How many records of each type, and blobs, came before."""

    type: Literal["end"] = "end"
    counts: dict[str, int]


Record = (
    RegistryRecord
    | NamespaceRecord
    | BaseModelRecord
    | ExpertRecord
    | PurgedRecord
    | VersionRecord
    | PointsRecord
    | AliasEventRecord
    | AliasesRecord
    | RunRecord
    | TokenRecord
    | AuditRecord
    | EndRecord
)
_ADAPTER: TypeAdapter[Record] = TypeAdapter(Annotated[Record, Field(discriminator="type")])


class Writer:
    """Writes an archive, blobs at once and records in chunks."""

    def __init__(self, file: IO[bytes]) -> None:
        self.counts: dict[str, int] = {}
        self._file = file
        self._lines: list[bytes] = []
        self._size = 0
        self._chunks = 0

    def blob(self, digest: str, data: bytes) -> None:
        """Add an expert's file."""
        self._count("blob")
        tar.write_member(self._file, BLOBS + digest, data)

    def samples(self, digest: str, data: bytes) -> None:
        """Add the samples of a run."""
        self._count("samples")
        tar.write_member(self._file, SAMPLES + digest, data)

    def record(self, record: Record) -> None:
        """Add a record."""
        self._count(record.type)
        line = record.model_dump_json().encode() + b"\n"
        self._lines.append(line)
        self._size += len(line)
        if self._size >= CHUNK:
            self.flush()

    def end(self) -> None:
        """Finish the archive; nothing can be added after."""
        self.record(EndRecord(counts=dict(self.counts)))
        self.flush()
        tar.write_end(self._file)

    def flush(self) -> None:
        """End the chunk of records."""
        if self._lines:
            self._chunks += 1
            tar.write_member(self._file, f"{RECORDS}{self._chunks:08}.jsonl", b"".join(self._lines))
        self._lines, self._size = [], 0

    def _count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1


@dataclass(frozen=True)
class Content:
    """A blob of an archive, whose digest was checked.

    Attributes:
        offset: offset of the first byte in the archive.
        is_expert: whether it is an expert's file; else it is the samples of a run.
    """

    digest: str
    data: bytes
    offset: int
    is_expert: bool


def read(file: IO[bytes]) -> Iterator[Content | list[Record]]:
    """The blobs and the chunks of records of an archive, in order.

    One blob or one chunk is in memory at a time.

    Args:
        file: seekable, positioned at its start.

    Raises:
        InvalidRequestError: the archive is cut, damaged, or holds what no archive of a registry holds.
    """
    for name, data in tar.read_members(file, MAX_FILE_BYTES):
        folder, _, digest = name.rpartition("/")
        if f"{folder}/" in (BLOBS, SAMPLES) and is_digest(digest):
            if sha256(data) != digest:
                raise InvalidRequestError(f"the content of {name} is not that of its digest")
            end = file.tell()
            yield Content(digest, data, end - tar.padded_size(len(data)), f"{folder}/" == BLOBS)
            file.seek(end)  # the caller may have read another blob
        elif name.startswith(RECORDS) and len(data) <= MAX_RECORDS_BYTES:
            end = file.tell()
            yield [_parse(name, number, line) for number, line in enumerate(data.splitlines(), start=1)]
            file.seek(end)
        else:
            raise InvalidRequestError(f"its member {name[:100]!r} is none of an archive of a registry")


def _parse(name: str, number: int, line: bytes) -> Record:
    try:
        return _ADAPTER.validate_json(line)
    except pydantic.ValidationError as error:
        raise InvalidRequestError(f"{name!r}, line {number}: {_one_line(first_fault(error))}") from None


def _one_line(text: str) -> str:
    """Escape and shorten a message that may quote the archive: one line of 500 characters."""
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text[:500])
