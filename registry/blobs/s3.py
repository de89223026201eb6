"""Blobs in a bucket of an S3-compatible store: ``prefix/ab/abcdef…``."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import boto3.session
from botocore.client import Config
from botocore.exceptions import BotoCoreError, ClientError
from urllib3.exceptions import HTTPError

from t2.core.digests import sha256
from t2.core.errors import ArgumentError, NotFoundError, RegistryError, UnavailableError
from t2.core.expertfile import MAX_FILE_BYTES
from t2.core.references import is_digest
from t2.registry.blobs.base import BlobInfo

ATTEMPTS = 4
"""How often one call is tried; the pauses between grow from half a second, with jitter."""
CONNECTIONS = 32
_PROBE = "probe"
_MISSING = frozenset({"404", "NoSuchKey", "NotFound"})
_PRESENT = frozenset({"412", "PreconditionFailed", "ConditionalRequestConflict"})
_REFUSED = frozenset({"501", "NotImplemented", "InvalidArgument", "InvalidRequest", "InvalidHeader", "XNotImplemented"})
"""What stores answer to a header that they do not know."""


@dataclass(frozen=True)
class Credentials:
    """An access key and its secret; never printed."""

    access_key: str
    secret_key: str

    def __repr__(self) -> str:
        return "Credentials(…)"


class S3Blobs:
    """A :class:`~t2.registry.blobs.base.BlobStore` in a bucket; safe to share between threads.

    The store checks what it receives against MD5 and SHA-256 and creates each object once, as far as it knows these
    headers; headers that it rejects are not sent again. An upload is acknowledged only if the store's checksum of the
    object is right; without a checksum the object is read back.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        endpoint: str | None = None,
        region: str = "us-east-1",
        credentials: Credentials | None = None,
        path_style: bool = True,
        timeout: float = 10.0,
    ) -> None:
        """Set the client up; nothing is sent yet.

        Args:
            prefix: of all keys, without slashes at its ends.
            endpoint: URL of the store; AWS without.
            credentials: boto3's own chain of credentials without.
            path_style: ``endpoint/bucket/key`` and not ``bucket.endpoint/key``.
            timeout: seconds to wait for each answer, of at most :data:`ATTEMPTS`.

        Raises:
            ArgumentError: the endpoint is no URL, or boto3 refuses a setting.
        """
        self._bucket = bucket
        self._prefix = f"{prefix.strip('/')}/" if prefix.strip("/") else ""
        self.location = f"s3://{bucket}/{self._prefix}".rstrip("/")
        self._left_out: frozenset[str] = frozenset()

        session = boto3.session.Session()

        def client(attempts: int, seconds: float) -> Any:
            return session.client(
                "s3",
                endpoint_url=endpoint,
                region_name=region,
                aws_access_key_id=credentials.access_key if credentials is not None else None,
                aws_secret_access_key=credentials.secret_key if credentials is not None else None,
                config=Config(
                    connect_timeout=min(seconds, 5.0),
                    read_timeout=seconds,
                    retries={"mode": "standard", "total_max_attempts": attempts},
                    max_pool_connections=CONNECTIONS,
                    signature_version="s3v4",
                    s3={"addressing_style": "path" if path_style else "virtual"},
                    # Its own checksums are trailers, which not every store reads; put() sends better ones.
                    request_checksum_calculation="when_required",
                    response_checksum_validation="when_required",
                ),
            )

        try:
            self._client = client(ATTEMPTS, timeout)
            self._prober = client(2, min(timeout, 5.0))
        except (ValueError, BotoCoreError) as error:
            raise ArgumentError(f"the store {self.location}: {error}; check s3_endpoint and s3_region") from None

    def put(self, digest: str, data: bytes) -> bool:
        key = self._key(digest)
        there = self._head(digest)
        if there is not None and self._holds(digest, len(data), there):
            return False
        # An object with other bytes is left over from a failed upload and is replaced.
        md5 = hashlib.md5(data, usedforsecurity=False)
        headers: dict[str, Any] = {
            "ContentMD5": base64.b64encode(md5.digest()).decode(),
            "ChecksumSHA256": _checksum(digest),
        }
        if there is None:
            headers["IfNoneMatch"] = "*"
        with self._translated():
            try:
                answer = self._put(key, data, headers)
            except ClientError as error:
                if _code(error) not in _PRESENT:
                    raise
            else:
                # An ETag that equals the MD5 confirms the received bytes, as the checksum does.
                if answer.get("ChecksumSHA256") != _checksum(digest) and answer.get("ETag") != f'"{md5.hexdigest()}"':
                    self._check_stored(digest, len(data))
                return True
        # Another upload came first, or this one did and its answer was lost on the way.
        self._check_stored(digest, len(data))
        return False

    def get(self, digest: str) -> bytes:
        key = self._key(digest)
        for left in (2, 1, 0):
            with self._translated():
                try:
                    answer = self._client.get_object(Bucket=self._bucket, Key=key)
                    if answer["ContentLength"] > MAX_FILE_BYTES:
                        break
                    data: bytes = answer["Body"].read()
                except ClientError as error:
                    if _code(error) in _MISSING:
                        raise NotFoundError(
                            f"the store {self.location} has no blob {digest}; run t2 registry doctor"
                        ) from None
                    raise
                except (BotoCoreError, HTTPError, OSError):
                    # boto3 tries again what fails before the body begins, not what breaks off within it.
                    if not left:
                        raise
                    continue
            if sha256(data) == digest:
                return data
        raise RegistryError(
            f"{self.location}/{key.removeprefix(self._prefix)} is damaged: its content is not that of its digest; "
            "restore it from a backup"
        )

    def info(self, digest: str) -> BlobInfo | None:
        answer = self._head(digest)
        return BlobInfo(digest, answer["ContentLength"], answer["LastModified"]) if answer is not None else None

    def delete(self, digest: str) -> None:
        with self._translated():
            self._client.delete_object(Bucket=self._bucket, Key=self._key(digest))

    def list(self) -> Iterator[BlobInfo]:
        pages = self._client.get_paginator("list_objects_v2").paginate(Bucket=self._bucket, Prefix=self._prefix)
        with self._translated():
            for page in pages:
                for entry in page.get("Contents", ()):
                    folder, slash, name = entry["Key"].removeprefix(self._prefix).partition("/")
                    if slash and is_digest(name) and name[:2] == folder:
                        yield BlobInfo(name, entry["Size"], entry["LastModified"])

    def sweep(self, before: datetime, *, dry_run: bool) -> Sequence[str]:
        return []

    def url(self, digest: str, seconds: int, filename: str) -> str | None:
        name = re.sub(r"[^A-Za-z0-9._-]", "_", filename)
        with self._translated():
            url: str = self._client.generate_presigned_url(
                "get_object",
                Params={
                    "Bucket": self._bucket,
                    "Key": self._key(digest),
                    "ResponseContentDisposition": f'attachment; filename="{name}"',
                    "ResponseContentType": "application/octet-stream",
                },
                ExpiresIn=seconds,
            )
        return url

    def check(self) -> None:
        key = f"{self._prefix}{_PROBE}"
        with self._translated():
            self._prober.put_object(Bucket=self._bucket, Key=key, Body=b"t2")
            self._prober.head_object(Bucket=self._bucket, Key=key)

    def _head(self, digest: str) -> dict[str, Any] | None:
        """Return an object's headers, with the checksum if the store has one; None if it is missing."""
        parameters = {"Bucket": self._bucket, "Key": self._key(digest)}
        with self._translated():
            try:
                if "ChecksumMode" not in self._left_out:
                    try:
                        return dict(self._client.head_object(**parameters, ChecksumMode="ENABLED"))
                    except ClientError as error:
                        if _code(error) not in {*_REFUSED, "400"}:  # a response to HEAD has no body with an error code
                            raise
                answer = dict(self._client.head_object(**parameters))
                self._left_out |= {"ChecksumMode"}
                return answer
            except ClientError as error:
                if _code(error) in _MISSING:
                    return None
                raise

    def _holds(self, digest: str, size: int, head: dict[str, Any]) -> bool:
        """Whether an object has a digest's content, by the store's checksum or by reading it."""
        if head["ContentLength"] != size:
            return False
        checksum = head.get("ChecksumSHA256")
        if checksum is not None and head.get("ChecksumType", "FULL_OBJECT") == "FULL_OBJECT":
            return bool(checksum == _checksum(digest))
        try:
            self.get(digest)
        except UnavailableError:
            raise
        except RegistryError:
            return False
        return True

    def _check_stored(self, digest: str, size: int) -> None:
        """Check that the store holds a blob that was just put, here or by another upload.

        Raises:
            UnavailableError: the object is missing or has other bytes.
        """
        head = self._head(digest)
        if head is None or not self._holds(digest, size, head):
            raise UnavailableError(
                f"the store {self.location} does not hold the bytes that were just put at {self._key(digest)}; try "
                "again, and check the store if this repeats"
            )

    def _put(self, key: str, data: bytes, headers: dict[str, Any]) -> dict[str, Any]:
        """Put an object with the headers that the store accepts; return the store's response.

        Rejected headers are remembered and not sent again.
        """
        headers = {name: value for name, value in headers.items() if name not in self._left_out}
        dropped: set[str] = set()
        while True:
            try:
                answer: dict[str, Any] = self._client.put_object(Bucket=self._bucket, Key=key, Body=data, **headers)
            except ClientError as error:
                if _code(error) not in _REFUSED or not headers:
                    raise
                name = next(name for name in ("IfNoneMatch", "ChecksumSHA256", "ContentMD5") if name in headers)
                del headers[name]
                dropped.add(name)
            else:
                self._left_out |= dropped
                return answer

    def _key(self, digest: str) -> str:
        if not is_digest(digest):
            raise RegistryError(f"{digest[:80]!r} is not a digest")
        return f"{self._prefix}{digest[:2]}/{digest}"

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Errors of the store in one line; boto3's own texts may hold URLs with what signs them."""
        try:
            yield
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", "?")
            raise UnavailableError(
                f"the store {self.location} answers {_code(error)} (status {status}); check bucket and credentials"
            ) from error
        except (BotoCoreError, HTTPError, OSError) as error:
            raise UnavailableError(f"the store {self.location} does not answer ({type(error).__name__})") from error


def _checksum(digest: str) -> str:
    """Encode a digest as S3 does, in base64."""
    return base64.b64encode(bytes.fromhex(digest)).decode()


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", "?"))
