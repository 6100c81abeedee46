"""Starts a program as several processes on this machine that talk over MLX's ring of sockets, as `mlx.launch` does for
users.

And what such a program begins with: `join_ring`.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

LAUNCH = shutil.which("mlx.launch", path=str(Path(sys.executable).parent))
needs_launch = pytest.mark.skipif(LAUNCH is None, reason="mlx.launch is not beside this Python")


def launch(size: int, program: Path, *arguments: object, timeout: int = 240) -> str:
    """What `size` processes of the program print, errors included.

    mlx.launch ends with 0 whatever the processes end with, and says on stderr which of them failed.
    """
    command = [LAUNCH, *of_ring(size), str(program), *map(str, arguments)]
    # A pipe that stays open and empty: mlx.launch would read without a pause from an input that has ended.
    read_end, write_end = os.pipe()
    try:
        started = subprocess.Popen(
            command,
            stdin=read_end,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output, _ = started.communicate(timeout=timeout)
        except BaseException:
            os.killpg(started.pid, signal.SIGKILL)  # the ranks too, which would wait for each other
            started.communicate()
            raise
    finally:
        os.close(read_end)
        os.close(write_end)
    assert started.returncode == 0, output
    return output


def of_ring(size: int) -> list[str]:
    """mlx.launch's arguments up to the Python that each of so many processes is, on ports that no other run has."""
    ports = ["--starting-port", str(free_ports(size))]
    return ["-n", str(size), "--backend", "ring", *ports, "--", sys.executable]


def launch_well(size: int, program: Path, *arguments: object) -> str:
    """The same, of processes that must all end with 0."""
    output = launch(size, program, *arguments)
    assert not failed_ranks(output, size), output
    return output


def failed_ranks(output: str, size: int) -> list[int]:
    return [i for i in range(size) if f"Node with rank {i} exited" in output]


def join_ring(folder: Path) -> mx.distributed.Group:
    """All processes of the launch, in each of them; on the CPU.

    MLX writes the kernels of mx.compile into the folder of temporary files, under the same names: processes that
    compile the same step at the same time would load each other's unfinished ones. So each has a folder of its own.
    """
    mx.set_default_device(mx.cpu)
    group = mx.distributed.init(backend="ring", strict=True)
    own = folder / f"compiled{group.rank()}"
    own.mkdir()
    os.environ["TMPDIR"] = str(own)
    return group


def free_ports(count: int) -> int:
    """The first of so many ports in a row that are free, so that runs beside each other do not meet."""
    rng = np.random.default_rng(int.from_bytes(os.urandom(8), "little"))
    while True:
        first = int(rng.integers(20_000, 32_000))  # below those that systems hand out
        sockets = [socket.socket() for _ in range(count)]
        try:
            for i, x in enumerate(sockets):
                x.bind(("127.0.0.1", first + i))
            return first
        except OSError:
            continue
        finally:
            for x in sockets:
                x.close()


def of_run(end: dict[str, mx.array], name: str) -> dict[str, mx.array]:
    """The part of all that a rank has written with which one run ended."""
    start = f"{name}/"
    return {path[len(start) :]: x for path, x in end.items() if path.startswith(start)}
