"""How many cores this process may keep busy: its affinity, its container's quota, and the ranks beside it."""

import math
import os
from pathlib import Path


def share(root: Path = Path("/")) -> int:
    """Cores for this process.

    The ranks of one machine (LOCAL_WORLD_SIZE) share its cores and the quota. A launcher may have given each of them
    cores of its own already: no process has more than its affinity, and no less for that than its part of the whole.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    whole = min(_of_the_job(), math.ceil(min(quota(root), 1 << 20)))
    return max(min(len(os.sched_getaffinity(0)), whole // ranks), 1)


def own(root: Path = Path("/")) -> list[int]:
    """The cores of `share`, other ones than those of the ranks beside it; none under a quota.

    A quota names no cores: every container of the machine would take the first ones.
    """
    mine, count = sorted(os.sched_getaffinity(0)), share(root)
    if quota(root) < len(mine):
        return []
    at = int(os.environ.get("LOCAL_RANK", "0")) % (len(mine) // count) * count
    return mine[at : at + count]


def quota(root: Path = Path("/")) -> float:
    """Cores' worth of time that the control groups of this process allow it, of version 1 and 2; inf without a limit.

    Those above a group limit it too. A container that sees the host's path, but its own group at the root, is found
    by the root.
    """
    found = [math.inf]
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return math.inf
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        for name in (controllers, "cpu") if controllers else ("", "unified"):
            base, below = root / "sys/fs/cgroup" / name, Path(path.lstrip("/"))
            found += [_limit(base / folder) for folder in (below, *below.parents)]
    return min(found)


def _limit(folder: Path) -> float:
    try:
        if (folder / "cpu.max").exists():
            allowed, period = (folder / "cpu.max").read_text().split()
        else:
            allowed, period = ((folder / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        cores = int(allowed) / int(period)
    except (OSError, ValueError, ZeroDivisionError):  # "max", or no such controller
        return math.inf
    return cores if cores > 0 else math.inf  # -1: no limit


def _of_the_job() -> int:
    """Cores of all its ranks on this machine: SLURM's word, or what the process has that started them."""
    mine = len(os.sched_getaffinity(0))
    if "TORCHELASTIC_RUN_ID" not in os.environ and (slurm := os.environ.get("SLURM_CPUS_ON_NODE", "")).isdigit():
        return max(int(slurm), mine)
    try:
        return max(len(os.sched_getaffinity(os.getppid())), mine)
    except OSError:  # it has ended
        return mine
