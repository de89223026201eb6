"""Where the bytes of experts lie: one small protocol, and a store for a folder and one for S3.

Blobs are content-addressed: the path is made of the digest and of nothing that a user wrote.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol


@dataclass(frozen=True)
class BlobInfo:
    """A blob in the store; ``modified`` is UTC."""

    digest: str
    size: int
    modified: datetime


class BlobStore(Protocol):
    """Bytes by their SHA-256.

    Every method raises :class:`~t2.core.errors.UnavailableError` where the store cannot be reached or used.

    Attributes:
        location: folder or ``s3://bucket/prefix``, for people; no credentials.
    """

    location: str

    def put(self, digest: str, data: bytes) -> bool:
        """Store bytes; they are there, whole and durable, once this returns. False where they were there already."""
        ...

    def get(self, digest: str) -> bytes:
        """All bytes, checked against the digest.

        Raises:
            NotFoundError: there is no such blob.
            RegistryError: the store holds other bytes.
        """
        ...

    def info(self, digest: str) -> BlobInfo | None:
        """Size and time of a blob; None where there is none."""
        ...

    def delete(self, digest: str) -> None:
        """Remove a blob; nothing happens where there is none."""
        ...

    def list(self) -> Iterator[BlobInfo]:
        """Every blob, in any order; files and objects that are not blobs are passed over."""
        ...

    def sweep(self, before: datetime, *, dry_run: bool) -> Sequence[str]:
        """Remove what writers that were killed before then have left behind; tells what, also where it only would."""
        ...

    def url(self, digest: str, seconds: int, filename: str) -> str | None:
        """A presigned URL from which anyone can read the blob for so many seconds; None where the store has none.

        Args:
            filename: what a browser should save it as.
        """
        ...

    def check(self) -> None:
        """Return when the store can be read and written; cheap enough for a readiness probe."""
        ...
