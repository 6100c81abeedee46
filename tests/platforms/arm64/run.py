"""Runs the tests on the CPU kernels of arm64, under qemu-user: python tests/platforms/arm64/run.py [PYTEST ARGUMENTS]

Without arguments, every test of the CPU that needs no compiler for the host. See build.py for what it needs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from platforms.arm64 import build  # noqa: E402

# These compile for the host, or measure: not arm64's business.
NOT_HERE = (
    "arm64 bench cost cuda_compile cuda_link emulator emulator_calibration half_conversions hostile_gpu "
    "macos_build metal_faults parallel_for shader_strict state_formats_metal tables threads train_example"
).split()


def default_tests() -> list[str]:
    excluded = {f"test_{name}.py" for name in NOT_HERE}
    found = sorted((build.ROOT / "tests").rglob("test_*.py"))
    return [str(path) for path in found if path.name not in excluded]


def pytest_command(python: Path, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """pytest in the emulated Python: command and environment, with an arm64 compiler for mx.compile."""
    path = os.pathsep.join([str(build.BIN), os.environ.get("PATH", "")])
    # Without the options in pyproject.toml, which are for a plug-in that only the host has.
    options = ["-o", "addopts=--import-mode=importlib", "-p", "no:cacheprovider", "-ra"]
    command = [str(python), "-m", "pytest", *options, *arguments]
    return command, os.environ | {"PATH": path, "DEVICE": "cpu"}


def main() -> int:
    if missing := build.what_is_missing():
        raise SystemExit(missing)
    command, environment = pytest_command(build.prepare(), sys.argv[1:] or default_tests())
    return subprocess.run(command, cwd=build.ROOT, env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
