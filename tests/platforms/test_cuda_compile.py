"""The shader through nvcc, and the cases that tests/platforms/cuda/run.py runs on a GPU, here run by the emulator."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from emulator import build, project_shader
from platforms.cuda import cuda_cases as cases

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
