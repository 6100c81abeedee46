"""Sharing work among threads (csrc/cpu/threads.cpp) by itself: what a body that throws does to the others, and who
helps.
"""

import os
import shutil
import subprocess
from pathlib import Path

import mlx.core as mx
import pytest

ROOT = Path(__file__).parents[2]


def test_every_body_runs_once_whatever_throws_and_never_alone(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if not compiler:
        pytest.skip("needs a C++ compiler, by CXX or as c++")
    headers = Path(mx.__file__).parent / "include"
    program = tmp_path / "parallel_for"
    sources = [ROOT / "tests/kernels/parallel_for.cpp", ROOT / "csrc/cpu/threads.cpp"]
    command = [
        *compiler.split(),
        "-std=c++20",
        "-O1",
        "-pthread",
        "-I",
        ROOT / "csrc",
        "-I",
        headers,
    ]
    built = subprocess.run([*command, *sources, "-o", program], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    done = subprocess.run([program], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "right\n"), done.stdout + done.stderr
