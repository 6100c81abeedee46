"""The default number of threads of a CPU update: MLX_FUSED_ADAM_NUM_THREADS, else OMP_NUM_THREADS, else the
CPUs that the process may use.

Those are the CPUs of its affinity mask (taskset, batch systems) or the quota of its control group (containers), rounded
up, whichever is less.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

MOST_THREADS = 256


def default_num_threads(environment: Mapping[str, str] = os.environ) -> int:
    """The environment's settings, else the CPUs that the process may use, from 1 to 256.

    Raises:
        ValueError: If the setting is not a whole number in that range.
    """
    setting = environment.get("MLX_FUSED_ADAM_NUM_THREADS", "")
    if not setting:
        # What PyTorch, NumPy and batch systems go by; a list is for nested regions, of which the first counts here.
        others = environment.get("OMP_NUM_THREADS", "").split(",")[0].strip()
        wanted = int(others) if others.isascii() and others.isdigit() and int(others) > 0 else available_cpus()
        return min(wanted, MOST_THREADS)
    if not (setting.isascii() and setting.isdigit() and 1 <= int(setting) <= MOST_THREADS):
        raise ValueError(
            f"[num_threads] MLX_FUSED_ADAM_NUM_THREADS must be from 1 to {MOST_THREADS} but got {setting!r}"
        )
    return int(setting)


def available_cpus(root: Path = Path("/")) -> int:
    """The number of CPUs that the process may use; ``root`` is the root of the file system, another one in tests."""
    if hasattr(os, "sched_getaffinity"):
        cpus = len(os.sched_getaffinity(0))
    else:
        cpus = os.cpu_count() or 1
    return max(1, min([cpus, *(math.ceil(quota) for quota in _quotas(root))]))


def _quotas(root: Path) -> Iterator[float]:
    """The limits, in CPUs, of the process's control group and of those around it (cgroup versions 1 and 2)."""
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            top = root / "sys/fs/cgroup"
        elif "cpu" in controllers.split(","):
            top = root / "sys/fs/cgroup/cpu"
        else:
            continue
        # In a container the path may be the host's, and the group is at the top.
        group = top / path.strip("/")
        for folder in (group, *group.parents):
            if controllers == "":
                limit = _read(folder / "cpu.max").split()
            else:
                limit = [
                    *_read(folder / "cpu.cfs_quota_us").split(),
                    *_read(folder / "cpu.cfs_period_us").split(),
                ]
            if len(limit) == 2 and limit[0].isdigit() and int(limit[1]) > 0:
                yield int(limit[0]) / int(limit[1])
            if folder == top:
                break


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
