"""What stands in an archive of a registry: ``records/*.jsonl``, one record a line, ``blobs/<digest>`` and
``samples/<digest>``.

A record comes after everything that it refers to, the blobs among them. The first is :class:`RegistryRecord`, the last
:class:`EndRecord`. Fields that follow from an expert's file are not here: they are read from the file again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Annotated, Any, Literal

import pydantic
from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, TypeAdapter

from t2.core.curve import CurvePoint
from t2.core.digests import sha256
from t2.core.errors import ArgumentError, InvalidRequestError
from t2.core.expertfile import MAX_FILE_BYTES, ExpertFile, decode_expert
from t2.core.manifest import Kind, Label
from t2.core.references import is_digest, parse_name
from t2.registry.portable import tar
from t2.registry.schemas import Alias, Digest, MetricName, Name, Tag, Text

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


ExpertPath = Annotated[str, AfterValidator(_path)]
Number = Annotated[int, Field(ge=1, lt=2**31)]


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
    revision: str
    exported_at: AwareDatetime
    namespace: Name | None


class NamespaceRecord(_Record):
    type: Literal["namespace"] = "namespace"
    name: Name
    description: Text
    created_at: AwareDatetime


class BaseModelRecord(_Record):
    type: Literal["base-model"] = "base-model"
    fingerprint: Digest
    id: Label
    revision: str | None
    targets: dict[str, Annotated[int, Field(ge=1)]] | None
    created_at: AwareDatetime


class ExpertRecord(_Record):
    """An expert; ``last`` is the highest number that it ever gave to a version."""

    type: Literal["expert"] = "expert"
    expert: ExpertPath
    kind: Kind
    description: Text
    tags: tuple[Tag, ...]
    last: Annotated[int, Field(ge=0, lt=2**31)]
    created_at: AwareDatetime
    updated_at: AwareDatetime
    deleted_at: AwareDatetime | None


class VersionRecord(_Record):
    type: Literal["version"] = "version"
    expert: ExpertPath
    number: Number
    digest: Digest
    description: Text
    metrics: dict[MetricName, float]
    created_at: AwareDatetime
    created_by: str
    deleted_at: AwareDatetime | None


class PointsRecord(_Record):
    """A part of a version's reward curve."""

    type: Literal["points"] = "points"
    expert: ExpertPath
    number: Number
    points: tuple[CurvePoint, ...]


class AliasEventRecord(_Record):
    """One entry of the history of an expert's aliases, oldest first."""

    type: Literal["alias-event"] = "alias-event"
    expert: ExpertPath
    alias: Alias
    number: Number | None
    previous: Number | None
    at: AwareDatetime
    by: str
    reason: Text


class AliasTarget(_Record):
    number: Number
    updated_at: AwareDatetime
    updated_by: str


class AliasesRecord(_Record):
    """All aliases of an expert, after their history."""

    type: Literal["aliases"] = "aliases"
    expert: ExpertPath
    aliases: dict[Alias, AliasTarget]


class RunRecord(_Record):
    """A run of a leaderboard; its samples are a blob before it.

    Attributes:
        header: the first line of the run's file, which tells everything else.
    """

    type: Literal["run"] = "run"
    namespace: Name
    samples: Digest
    header: str
    created_at: AwareDatetime
    created_by: str


class TokenRecord(_Record):
    """An access token; ``hash`` is the SHA-256 of its secret, which has 256 random bits and is nowhere kept."""

    type: Literal["token"] = "token"
    name: str
    prefix: str
    hash: Digest
    scopes: str
    created_at: AwareDatetime
    expires_at: AwareDatetime | None
    last_used_at: AwareDatetime | None
    revoked_at: AwareDatetime | None


class AuditRecord(_Record):
    type: Literal["audit"] = "audit"
    at: AwareDatetime
    source: str
    subject: str
    action: str
    object: str
    detail: dict[str, Any]


class EndRecord(_Record):
    """How many records of each type, and blobs, came before."""

    type: Literal["end"] = "end"
    counts: dict[str, int]


Record = (
    RegistryRecord
    | NamespaceRecord
    | BaseModelRecord
    | ExpertRecord
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
        expert: what it says as an expert's file; None for the samples of a run, which are checked with the run.
    """

    digest: str
    data: bytes
    expert: ExpertFile | None


def read(file: IO[bytes]) -> Iterator[Content | list[Record]]:
    """The blobs and the chunks of records of an archive, in order.

    One blob or one chunk is in memory at a time.

    Raises:
        InvalidRequestError: the archive is cut, damaged, or holds what no archive of a registry holds.
    """
    for name, data in tar.read_members(file, MAX_FILE_BYTES):
        folder, _, digest = name.rpartition("/")
        if f"{folder}/" in (BLOBS, SAMPLES) and is_digest(digest):
            if sha256(data) != digest:
                raise InvalidRequestError(f"the content of {name} is not that of its digest")
            yield Content(digest, data, decode_expert(data, name) if f"{folder}/" == BLOBS else None)
        elif name.startswith(RECORDS) and len(data) <= MAX_RECORDS_BYTES:
            yield [_parse(name, number, line) for number, line in enumerate(data.splitlines(), start=1)]
        else:
            raise InvalidRequestError(f"its member {name[:100]!r} is none of an archive of a registry")


def _parse(name: str, number: int, line: bytes) -> Record:
    try:
        return _ADAPTER.validate_json(line)
    except pydantic.ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise InvalidRequestError(f"{name}, line {number}: {where}: {first['msg']}") from None
