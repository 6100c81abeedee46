"""macos/compile_shaders.py, which a Mac's CI runs: with no compiler, with one that accepts, with one that refuses."""

import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

if sys.platform == "win32":
    pytest.skip("the stand-in for xcrun is a shell script", allow_module_level=True)

SCRIPT = Path(__file__).resolve().parent / "macos" / "compile_shaders.py"

# Knows Metal 3.1 and 3.2; refuses a shader that holds a word.
XCRUN = """#!/bin/sh
case "$*" in
  *--version*) echo "a compiler";;
  *metal4.0*) exit 1;;
  *shader.metal*) for f in "$@"; do case $f in *shader.metal) file=$f;; esac; done
    test "$(grep -c 'host_name' "$file")" -gt 200 || { echo "few kernels" >&2; exit 1; }
    if grep -q 'WORD' "$file"; then echo "error: no such thing" >&2; exit 1; fi;;
esac
"""


def compile_with(folder: Path, xcrun: str | None) -> subprocess.CompletedProcess:
    if xcrun:
        file = folder / "xcrun"
        file.write_text(xcrun)
        file.chmod(file.stat().st_mode | stat.S_IXUSR)
    path = os.pathsep.join([str(folder), *(["/bin", "/usr/bin"] if xcrun else [])])
    return subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, env={**os.environ, "PATH": path})


def test_without_a_compiler_nothing_is_done(tmp_path):
    done = compile_with(tmp_path, None)
    assert done.returncode == 0 and done.stdout.startswith("Apple's compiler is not here, nothing is compiled")


def test_every_dialect_that_the_compiler_knows_is_compiled(tmp_path):
    done = compile_with(tmp_path, XCRUN.replace("WORD", "a word that no shader holds"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split("\n")[:1] == ["a compiler"]
    assert "metal3.1: compiled" in done.stdout and "metal3.2: compiled" in done.stdout
    assert "metal4.0: unknown to this compiler" in done.stdout


def test_a_shader_that_is_refused_is_an_exit_status(tmp_path):
    done = compile_with(tmp_path, XCRUN.replace("WORD", "adam_linear"))
    assert done.returncode == 1 and "metal3.1: FAILED\nerror: no such thing" in done.stdout
