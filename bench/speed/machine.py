"""The machine of a run, and whether it was idle."""

import os
import platform
import subprocess
from pathlib import Path
from time import perf_counter
from typing import Any

from mlx_fused_adam import _ext

from .implementations import versions

BUSY = 0.5  # cores kept busy by others, above which a run is not worth quoting


def describe(device: str, backend: str) -> dict[str, Any]:
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_GiB": round(memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "backend": backend,
        "threads": _ext.num_threads(),
        "instruction_set": _ext.cpu_isa(),
        "load": round(os.getloadavg()[0], 2),
        "versions": versions(),
    }


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _cpu_model() -> str:
    try:
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return platform.processor() or platform.machine()


class OthersWatch:
    """Counts the cores that other processes keep busy, from its creation on. On Linux only."""

    def __init__(self) -> None:
        self._start = self._times()

    def busy_cores(self) -> float | None:
        """The mean so far; None where it is not counted."""
        if self._start is None:
            return None
        wall, everyone, own = (x - y for x, y in zip(self._times(), self._start, strict=True))
        return max(0.0, everyone - own) / wall

    @staticmethod
    def _times() -> tuple[float, float, float] | None:
        """Seconds: by the clock, of all processes, and of this one with the children it has waited for."""
        try:
            ticks = Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:]
        except OSError:
            return None
        user, nice, system, _idle, _wait, interrupts, soft_interrupts = map(int, ticks[:7])
        own = os.times()
        return (
            perf_counter(),
            (user + nice + system + interrupts + soft_interrupts) / os.sysconf("SC_CLK_TCK"),
            own.user + own.system + own.children_user + own.children_system,
        )
