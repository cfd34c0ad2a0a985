"""The CPU time that a Linux control group (a container's limit, a batch system's) grants this process."""

from __future__ import annotations

import math
from pathlib import Path


def cpu_quota(root: Path = Path("/")) -> float:
    """CPUs that this process may keep busy, by the tightest of the groups around it; infinite without a limit.

    Both versions of control groups are read: ``cpu.max`` holds "quota period" (https://docs.kernel.org/admin-guide/
    cgroup-v2.html), the older ``cpu.cfs_quota_us`` and ``cpu.cfs_period_us`` one number each (https://docs.kernel.org/
    scheduler/sched-bwc.html). ``root`` is the root of the file system that is read.
    """
    return min((_limit(folder) for folder in _groups(root)), default=math.inf)


def _groups(root: Path) -> list[Path]:
    """The folders of the groups around this process that may limit its CPU time."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # no Linux, or no /proc
        return []
    folders = []
    for line in lines:
        _, controllers, name = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / controllers
        group = mount / name.lstrip("/")
        # A container's own group may be mounted as the root of what it sees: the name leads nowhere, its parents do.
        folders += [folder for folder in (group, *group.parents) if folder.is_relative_to(mount)]
    return folders


def _limit(folder: Path) -> float:
    """What one group grants."""
    files = ["cpu.max"] if (folder / "cpu.max").exists() else ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
    try:
        quota, period = " ".join((folder / file).read_text() for file in files).split()
        return int(quota) / int(period) if int(quota) > 0 else math.inf
    except (OSError, ValueError):  # no such group; "max": no limit
        return math.inf
