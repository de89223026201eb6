"""How much memory a device has left, a container's limit included."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil
import torch


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: of a CUDA device with what torch has cached, else of machine and container."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    free = int(psutil.virtual_memory().available)
    left = cgroup_bytes()
    return free if left is None else min(free, left)


def total_bytes(device: torch.device) -> int:
    """Total memory of a device in bytes; for a CPU that of the machine or its container."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = int(psutil.virtual_memory().total)
    limit = cgroup_bytes(used=True)
    return total if limit is None else min(total, limit)


@dataclass(frozen=True)
class _Files:
    """Where a version of cgroups says what is allowed, what is used, and what of that is cache that would give way."""

    root: str
    limit: str
    used: str
    cache: str


_VERSIONS = {
    "": _Files("sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    "memory": _Files("sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""By the controllers of a line of ``/proc/self/cgroup``: none in version 2."""


def cgroup_bytes(root: Path = Path("/"), used: bool = False) -> int | None:
    """Bytes that the control groups of this process leave it; None where they set no limit.

    Linux, Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst. A limit of any group above counts too, and
    file cache that is no longer used does not count as used.

    Args:
        root: of the file system.
        used: also count the bytes in use, so that the result is the limit itself.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    found = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        for name, files in _VERSIONS.items():
            if name in controllers.split(","):
                left = [_left(group, files, used) for group in _groups(root / files.root, path)]
                found += [count for count in left if count is not None]
    return min(found, default=None)


def _groups(mount: Path, path: str) -> Iterator[Path]:
    """A group and those above it; in a container the mount may itself be the group, whatever its path outside."""
    own = PurePosixPath(path.lstrip("/"))
    yield mount / own
    for above in own.parents:
        yield mount / above


def _left(group: Path, files: _Files, with_used: bool) -> int | None:
    try:
        limit = int((group / files.limit).read_text())
        if with_used:
            return limit
        used = int((group / files.used).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return max(0, limit - used + int(stat.get(files.cache, 0)))
    except (OSError, ValueError):  # no such group, or the limit is "max"
        return None
