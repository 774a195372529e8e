"""How much of the machine's time this process may take, as containers limit it.

A container with the time of 2 cores sees all 64 of its host. With a thread for each it would be
stopped for most of every tenth of a second, in the middle of kernels.
"""
from __future__ import annotations

import math
import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path


def usable_cores() -> int:
    """Cores on which this process may run: all, where the system does not say which."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@cache
def cpu_quota(groups: Path = Path("/proc/self/cgroup"),
              root: Path = Path("/sys/fs/cgroup")) -> float:
    """Cores whose time this process may take, by its control group and those around that;
    infinity where no limit is set, or none can be read. It is asked once a process.

    groups, root  files of the system, see "Control Group v2" of Linux's Admin Guide: cpu.max; of
                  version 1 cpu.cfs_quota_us and cpu.cfs_period_us
    """
    limits = [math.inf]
    for folder in _folders(groups, root):
        for texts in ((folder / "cpu.max",),
                      (folder / "cpu.cfs_quota_us", folder / "cpu.cfs_period_us")):
            try:
                quota, period = " ".join(path.read_text() for path in texts).split()
                limits.append(int(quota) / int(period))
            except (OSError, ValueError, ZeroDivisionError):     # no such file, or "max"
                continue
    return min(limit for limit in limits if limit > 0)           # version 1 has -1 for none


def _folders(groups: Path, root: Path) -> Iterator[Path]:
    """Of the process's control groups, each followed by those around it."""
    try:
        lines = groups.read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = root / "cpu" if controllers else root
        folder = top / path.lstrip("/")
        while folder != top:
            yield folder
            folder = folder.parent
        yield top
