"""What a benchmark's figures hold for: the machine, and the versions of what ran."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path


def describe_machine() -> str:
    """The processor, the cores that may be used, and the memory."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        models = [line.partition(":")[2].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        name = models[0] if models else name
    gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    load = os.getloadavg()[0]
    return f"{name}, {len(os.sched_getaffinity(0))} cores, {gib:.0f} GiB; load average before the run {load:.2f}"


def describe_versions(*packages: str) -> str:
    """Python's version and those of packages."""
    found = [f"Python {platform.python_version()}"]
    return ", ".join(found + [f"{name} {importlib.metadata.version(name)}" for name in packages])


def resident_bytes(process: int) -> int:
    """Resident memory of a process and of all its descendants, pages they share counted once for each."""
    return sum(int(fields[21]) for fields in _family(process)) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(process: int) -> float:
    """Processor time that a process, its descendants and those of them that have ended took."""
    return sum(sum(map(int, fields[11:15])) for fields in _family(process)) / os.sysconf("SC_CLK_TCK")


def _family(process: int) -> Iterator[list[str]]:
    """What /proc/PID/stat tells, from the state on, of a process and its descendants."""
    children: dict[int, list[int]] = {}
    stats: dict[int, list[str]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            with contextlib.suppress(OSError):
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
                children.setdefault(int(fields[1]), []).append(int(folder.name))
                stats[int(folder.name)] = fields
    waiting = [process]
    while waiting:
        current = waiting.pop()
        if current in stats:
            yield stats[current]
        waiting += children.get(current, [])
