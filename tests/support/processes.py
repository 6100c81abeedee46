"""Python programs in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path


def run_python(
    *arguments: str | Path, timeout: float = 300, cwd: Path | None = None, **variables: str
) -> subprocess.CompletedProcess:
    """Runs this Python with more environment variables; output and errors are kept as text."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        capture_output=True, text=True, timeout=timeout, cwd=cwd, env=os.environ | variables,
    )  # fmt: skip


def output_of_python(*arguments: str | Path, **how: object) -> str:
    """The same for a program that must end with 0."""
    done = run_python(*arguments, **how)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout
