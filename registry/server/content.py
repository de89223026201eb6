"""Downloads: the bytes of an expert, whole or one range of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from t2.core.errors import NotFoundError, RegistryError
from t2.registry.server.limits import LEASE, Lease, Workers
from t2.registry.server.metrics import Metrics
from t2.registry.server.operations import BINARY
from t2.registry.server.problems import HttpError

CHUNK_BYTES = 256 * 1024
FOR_EVER = "private, max-age=31536000, immutable"
"""What is said of addresses that hold a digest; private, because another may lack the token."""
ASK_AGAIN = "private, no-cache"

_RANGE = re.compile(r"bytes=(?:([0-9]{1,19})-([0-9]{1,19})?|-([0-9]{1,19}))")


@dataclass(frozen=True)
class Blob:
    """A content that may be sent; ``read`` gets it, checked against the digest."""

    digest: str
    size: int
    filename: str
    read: Callable[[], bytes]

    @property
    def etag(self) -> str:
        return f'"{self.digest}"'


class ContentResponse(Response):
    """An answer that reads its blob only when memory is free, and leaves it when it is sent."""

    def __init__(
        self, blob: Blob, part: tuple[int, int] | None, headers: Mapping[str, str], reads: Workers, metrics: Metrics
    ) -> None:
        """Prepare; ``part`` are the first and last byte to send, None for all."""
        first, last = part or (0, blob.size - 1)
        given = {"Content-Length": str(last - first + 1), **headers}
        if part is not None:
            given["Content-Range"] = f"bytes {first}-{last}/{blob.size}"
        super().__init__(status_code=206 if part is not None else 200, headers=given, media_type=BINARY)
        self._blob, self._first, self._last = blob, first, last
        self._reads, self._metrics = reads, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["method"] == "HEAD":
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await send({"type": "http.response.body", "body": b""})
            return
        lease: Lease = scope[LEASE]
        await lease.promise(self._blob.size)
        data = memoryview(await self._reads.run(lease.owner, self._read))
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        for start in range(self._first, self._last + 1, CHUNK_BYTES):
            stop = min(start + CHUNK_BYTES, self._last + 1)
            await send({"type": "http.response.body", "body": bytes(data[start:stop]), "more_body": True})
            self._metrics.downloaded(stop - start)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _read(self) -> bytes:
        try:
            data = self._blob.read()
        except NotFoundError as error:
            # A row points to it, so its absence is the server's fault and not the client's.
            raise RegistryError(str(error)) from error
        if len(data) != self._blob.size:
            raise RegistryError(f"the blob {self._blob.digest} has {len(data)} bytes and not {self._blob.size}")
        return data


def content(
    headers: Headers, blob: Blob, *, immutable: bool, location: str | None, reads: Workers, metrics: Metrics
) -> Response:
    """The answer to a request for content.

    Args:
        headers: of the request: If-None-Match, Range, If-Range.
        immutable: whether the address means this content for ever.
        location: where the content can be had instead; None to send it.

    Raises:
        HttpError: the range lies outside of the content.
    """
    caching = {"ETag": blob.etag, "Cache-Control": FOR_EVER if immutable else ASK_AGAIN}
    if matches(headers.get("if-none-match"), blob.etag):
        return Response(status_code=304, headers=caching)
    if location is not None:
        return Response(status_code=307, headers={"Location": location, "Cache-Control": "no-store"})
    given = {
        **caching,
        "Accept-Ranges": "bytes",
        "Content-Disposition": f'attachment; filename="{blob.filename}"',
    }
    wanted = headers.get("range")
    if wanted is not None and headers.get("if-range", blob.etag).strip() != blob.etag:
        wanted = None
    try:
        part = byte_range(wanted, blob.size)
    except ValueError as error:
        raise HttpError(
            416, f"the range lies outside of the {blob.size} bytes", {"Content-Range": f"bytes */{blob.size}"}
        ) from error
    return ContentResponse(blob, part, given, reads, metrics)


def matches(if_none_match: str | None, etag: str) -> bool:
    """Whether the client has this content already (RFC 9110, section 13.1.2)."""
    if if_none_match is None or len(if_none_match) > 4000:
        return False
    tags = [tag.strip().removeprefix("W/") for tag in if_none_match.split(",")]
    return etag in tags or tags == ["*"]


def byte_range(header: str | None, size: int) -> tuple[int, int] | None:
    """The first and last byte of a Range header; None to send everything.

    Several ranges, other units and what cannot be read are passed over, as RFC 9110, section 14.2, allows: no request
    costs more than one plain download.

    Raises:
        ValueError: no byte of the content is in the range.
    """
    match = _RANGE.fullmatch(header.strip()) if header is not None else None
    if match is None:
        return None
    first, last, suffix = match.groups()
    if suffix is not None:
        if int(suffix) == 0:
            raise ValueError("an empty range")
        return max(0, size - int(suffix)), size - 1
    if last is not None and int(last) < int(first):
        return None
    if int(first) >= size:
        raise ValueError("it begins behind the end")
    return int(first), min(int(last), size - 1) if last is not None else size - 1
