"""The shader through nvcc, and the cases that tests/platforms/cuda/run.py runs on a GPU, here run by the emulator."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from emulator import build, project_shader, traffic
from platforms.cuda import cuda_cases as cases
from platforms.cuda import cuda_times as times

CUDA = Path(__file__).parent / "cuda"


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc, of the CUDA toolkit")
def test_every_kernel_compiles_with_nvcc(tmp_path):
    command = [sys.executable, str(CUDA / "run.py"), "--compile-only", "--folder", str(tmp_path)]
    result = subprocess.run([*command, "--arch", "sm_80"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "libadam_cuda.so").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="the emulator runs on Linux")
@pytest.mark.parametrize("types", [("float",), ("bfloat", "half")], ids="-".join)
def test_the_cases_for_the_gpu_hold_under_emulation(types):
    emulator = build.load_emulator()
    source = project_shader.full_source(types)
    include_dirs = [str(d) for d in project_shader.INCLUDE_DIRS]

    def run(kernel, buffers, grid, threads_per_threadgroup):
        emulator.run(source, kernel, buffers, grid, threads_per_threadgroup, [], include_dirs)

    assert len(list(cases.check(run, types, large=False))) == 10 * len(types) ** 3


@pytest.mark.skipif(sys.platform != "linux", reason="the emulator runs on Linux")
def test_a_wrong_result_is_seen():
    with pytest.raises(AssertionError, match="12 of 12 elements of output 0 are wrong"):

        def run_nothing(kernel, buffers, grid, threads_per_threadgroup):
            for _, array, use in buffers:
                if use == "both":
                    array[...] = 0

        update, grid, threads = cases.linear(("float", "float", "float"), 12, in_place=True)
        update.run(run_nothing, grid, threads)


@pytest.mark.skipif(sys.platform != "linux", reason="the emulator runs on Linux")
@pytest.mark.parametrize("kernel", ["adam_linear", "adam_tiled"])
def test_what_is_timed_is_a_whole_update(kernel, monkeypatch):
    """Each access is within its buffer, every result is written, and the bytes are those that move."""
    monkeypatch.setenv("FUSED_ADAM_EMULATOR_ORDERS", "forward")
    emulator = build.load_emulator()
    updates = [times.case(kernel, types, rows=64, columns=96) for types in times.FORMATS.values()]
    source = (project_shader.ROOT / "metal" / "adam.metal").read_text()
    for update in updates:
        name = f"{kernel}<{update.name.split('<', 1)[1]}"
        source += f'template [[host_name("{name}")]] [[kernel]] decltype({name}) {name};\n'
    for update in updates:
        buffers, written = [], 0
        for buffer in update.buffers:
            is_result = buffer.use == "both" and buffer.same_as is not None
            memory = np.full(buffer.size, 0x3C, np.uint8) if buffer.values is None else buffer.values
            use = "output" if is_result else "input" if buffer.use == "both" else buffer.use
            buffers.append((buffer.index, memory, use))
            written += is_result * buffer.size
        include_dirs = [str(d) for d in project_shader.INCLUDE_DIRS]
        # Results in memory of their own: the emulator demands that every byte is written.
        emulator.run(source, update.name, buffers, update.grid, update.group, [], include_dirs)
        gradient = next(b for b in update.buffers if b.index == times.SHARED["kGradient"])
        assert update.bytes == 2 * written + gradient.size


def test_times_become_a_table():
    def row(kernel: str) -> dict:
        sizes = {"size": "16M", "elements": 1, "bytes": 28}
        return {"kernel": kernel, "format": "float32", **sizes, "ms": 2, "copy_ms": 1.9}

    measured = times.measured(lambda update: [3.0, 1.0, 2.0], lambda size: [1.0], "a card")
    assert len(measured["rows"]) == 2 * 2 * len(times.FORMATS)
    assert {r["ms"] for r in measured["rows"]} == {2.0}
    results = {"card": "a card", "rows": [row("adam_linear")], "torch": [{"format": "float32", "size": "16M", "ms": 3}]}
    lines = list(times.table(results))
    assert lines[0] == "On one a card:"
    assert lines[-1] == "| float32 | `adam_linear` | 16M | 0 | 95 % | 1.50× |"


def test_the_published_table_is_of_the_stored_times():
    assert traffic.published("cuda") == list(times.table(times.stored()))
