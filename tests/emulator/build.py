"""Builds the extension with the emulated Metal back end, and the module _emulator, into a folder kept between runs.

CMake and ninja decide what is out of date. conftest.py calls build() for DEVICE=emulated.
Run: python tests/emulator/build.py [FOLDER]
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]


def folder() -> Path:
    """Where the build and the compiled shaders are kept; FUSED_ADAM_EMULATOR_BUILD names another place."""
    # CMake remembers the Python that it was configured for, so each environment has a build of its own.
    environment = hashlib.sha256(sys.prefix.encode()).hexdigest()[:8]
    tag = f"emulated-{sys.implementation.cache_tag}-{environment}"
    return Path(os.environ.get("FUSED_ADAM_EMULATOR_BUILD", ROOT / "build" / tag))


def _run(*command: str | Path) -> None:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{result.stdout}{result.stderr}")


def build(target: str = "_ext") -> Path:
    """Brings one module up to date, prepares the environment for it and returns its file."""
    place = folder()
    (place / "shaders").mkdir(parents=True, exist_ok=True)
    os.environ["FUSED_ADAM_EMULATOR_PYTHON"] = sys.executable
    os.environ["FUSED_ADAM_EMULATOR_CACHE"] = str(place / "shaders")
    with open(place / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (place / "build.ninja").exists():
            options = [f"-DPython_EXECUTABLE={sys.executable}", "-DFUSED_ADAM_GPU=emulated"]
            _run(sys.executable, "-m", "cmake", "-S", ROOT, "-B", place, "-G", "Ninja", *options)
        _run(sys.executable, "-m", "cmake", "--build", place, "--target", target)
    files = sorted(place.glob(f"{target}.*.so"))
    if len(files) != 1:
        raise RuntimeError(f"expected one {target} in {place} but found {len(files)}")
    return files[0]


@functools.cache
def _load(target: str, module_name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(module_name, build(target))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load_extension() -> ModuleType:
    """The emulated counterpart of mlx_fused_adam._ext, beside that one in the same process."""
    return _load("_ext", "mlx_fused_adam_emulated._ext")


def load_emulator() -> ModuleType:
    """The module _emulator (bindings.cpp), which runs single kernels and steers the emulated extension."""
    return _load("_emulator", "_emulator")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        os.environ["FUSED_ADAM_EMULATOR_BUILD"] = sys.argv[1]
    print(build())
