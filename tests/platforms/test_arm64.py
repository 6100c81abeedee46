"""The CPU kernels on arm64, as on Apple silicon: a part of the suite under qemu-user.

All of it: python tests/platforms/arm64/run.py. Built by arm64/build.py. Skipped, with the reason, where the Debian
packages that it needs are not installed.
"""

import platform
import subprocess
import sys
from pathlib import Path

import pytest

if platform.machine() in ("arm64", "aarch64"):
    pytest.skip("on arm64 the suite itself runs there", allow_module_level=True)

from kernels.test_cpu_isas import PROGRAM  # noqa: E402
from platforms.arm64 import build, run  # noqa: E402

if missing := build.what_is_missing():
    pytest.skip(missing, allow_module_level=True)


@pytest.fixture(scope="module")
def arm64_python() -> Path:
    try:
        return build.prepare()
    except build.DownloadError as error:
        pytest.skip(f"the arm64 system cannot be had here: {error}")


def digest(python: Path | str) -> str:
    result = subprocess.run([str(python), "-c", PROGRAM], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()[-1]


def test_it_is_arm64(arm64_python):
    code = "import platform; print(platform.machine())"
    result = subprocess.run([arm64_python, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "aarch64", result.stderr


def test_every_layout_and_dtype_gives_the_bits_of_this_processor(arm64_python):
    assert digest(arm64_python) == digest(sys.executable)


def test_a_part_of_the_suite_passes(arm64_python):
    """In-place updates, mx.compile included; without large matrix products, which take minutes here."""
    selection = ["-k", "not ordinary_loop and not stays_alive"]
    files = ["tests/optimizers/test_in_place.py"]
    command, environment = run.pytest_command(arm64_python, ["-q", *selection, *files])
    result = subprocess.run(command, cwd=build.ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
