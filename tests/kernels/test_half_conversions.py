"""float16 conversions by the processor's instructions give the bits of those in integer arithmetic, NaN staying NaN."""

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from mlx_fused_adam import _ext

ROOT = Path(__file__).resolve().parents[2]


def compile_and_run(folder: Path, compiler: str, options: list[str], launcher: list[str]) -> str:
    program = folder / "half_conversions"
    header = options[0]
    command = [compiler, "-std=c++20", "-O2", "-ffp-contract=off", *options[1:]]
    command += [f'-DHALF_HEADER="{header}"', f"-I{ROOT / 'csrc'}"]
    source = ROOT / "tests/kernels/half_conversions.cpp"
    subprocess.run([*command, str(source), "-o", str(program)], check=True)
    result = subprocess.run([*launcher, str(program)], capture_output=True, text=True)
    return result.stdout.strip() + result.stderr.strip()


OF_SETS = {
    "x86_64_v3": ["cpu/half/f16c.h", "-march=x86-64-v3"],
    "x86_64_v4": ["cpu/half/avx512.h", "-march=x86-64-v4"],
}


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
@pytest.mark.parametrize("isa", OF_SETS)
def test_on_x86(isa, tmp_path):
    if isa not in _ext.supported_cpu_isas():
        pytest.skip(f"this processor cannot run {isa}")
    assert compile_and_run(tmp_path, "c++", OF_SETS[isa], []) == "equal"


@pytest.mark.skipif(not shutil.which("c++"), reason="needs a C++ compiler")
@pytest.mark.skipif(platform.machine() not in ("arm64", "aarch64"), reason="needs an arm64 processor")
def test_on_arm64(tmp_path):
    assert compile_and_run(tmp_path, "c++", ["cpu/half/neon.h"], []) == "equal"


def test_on_arm64_emulated(tmp_path):
    compiler, emulator = "aarch64-linux-gnu-g++", "qemu-aarch64-static"
    missing = [program for program in (compiler, emulator) if not shutil.which(program)]
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")
    options = ["cpu/half/neon.h", "-static"]
    assert compile_and_run(tmp_path, compiler, options, [emulator]) == "equal"
