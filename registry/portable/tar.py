"""Tar archives of plain files only, written and read as streams: no links, no folders, no extensions, bounded memory.

Any tar program reads what is written here. What is read here is refused unless it is as plain as that: names of an
archive are never used as names of files, but an archive may come from anywhere.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO

from t2.core.errors import InvalidRequestError

_BLOCK = 512


def write_member(file: IO[bytes], name: str, data: bytes) -> None:
    """Append a file.

    Args:
        name: at most 100 ASCII characters.
    """
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    file.write(info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict"))
    file.write(data)
    file.write(bytes(padded_size(len(data)) - len(data)))


def padded_size(size: int) -> int:
    """Bytes of a file of ``size`` bytes in an archive, padding included."""
    return size + -size % _BLOCK


def write_end(file: IO[bytes]) -> None:
    """End the archive."""
    file.write(bytes(2 * _BLOCK))


def read_members(file: IO[bytes], limit: int) -> Iterator[tuple[str, bytes]]:
    """Names and contents of all files, in order.

    Args:
        limit: bytes of one file at most.

    Raises:
        InvalidRequestError: it is cut, not a tar archive, or not a plain one.
    """
    while True:
        block = _exactly(file, _BLOCK)
        if not any(block):
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "ascii", "strict")
        except (tarfile.HeaderError, UnicodeDecodeError, ValueError) as error:
            raise InvalidRequestError("it is not a tar archive, or it is damaged") from error
        if info.type != tarfile.REGTYPE:
            raise InvalidRequestError(f"its member {info.name[:100]!r} is no plain file")
        if not 0 <= info.size <= limit:
            raise InvalidRequestError(
                f"its member {info.name[:100]!r} of {info.size} bytes is over the limit of {limit}"
            )
        data = _exactly(file, info.size)
        _exactly(file, padded_size(info.size) - info.size)
        yield info.name, data


def _exactly(file: IO[bytes], size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise InvalidRequestError("it ends in the middle; copy it again")
    return data
