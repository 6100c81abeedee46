"""Builds the extension with the emulated Metal back end, and the module _emulator, into a folder kept between runs.

CMake and ninja decide what is out of date. conftest.py enters the environment, in which the package is the emulated one
in this process and in those that it starts, for DEVICE=emulated; FUSED_ADAM_EMULATED_GPU=1 DEVICE=gpu calls it a GPU.
Run: python tests/emulator/build.py [--environment COMMAND…], which builds, or runs a command in that environment.
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


def is_built() -> bool:
    return any(folder().glob("_ext.*.so"))


def _run(*command: str | Path) -> None:
    result = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{command[0]} failed:\n{result.stdout}{result.stderr}")


def build(target: str = "_ext", suffix: str = ".*.so") -> Path:
    """Brings one module (or the stub beside it) up to date, prepares the environment for it and returns its file."""
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
    files = sorted(place.glob(target.removesuffix("_stub") + suffix))
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
    """The emulated counterpart of mlx_fused_adam._ext, beside that one in the same process (or that one, if
    entered).
    """
    if str(environment()) in sys.path:
        return importlib.import_module("mlx_fused_adam._ext")
    return _load("_ext", "mlx_fused_adam_emulated._ext")


def load_emulator() -> ModuleType:
    """The module _emulator (bindings.cpp), which runs single kernels and steers the emulated extension."""
    return _load("_emulator", "_emulator")


def environment() -> Path:
    """The folder that, on the path, makes the emulated package the one that is imported."""
    return folder() / "environment"


def enter() -> None:
    """Makes the package the emulated one, here and in the processes that this one starts."""
    extension, stub = build(), build("_ext_stub", ".pyi")
    package = environment() / "mlx_fused_adam"
    package.mkdir(parents=True, exist_ok=True)
    sources = {path.name: path for path in (ROOT / "python" / "mlx_fused_adam").iterdir()}
    for path in (extension, stub, folder() / "_build_info.py"):
        sources[path.name] = path
    sources.pop("__pycache__", None)
    for stale in set(os.listdir(package)) - {*sources, "__pycache__"}:
        (package / stale).unlink()
    for name, path in sources.items():
        link = package / name
        if not (link.is_symlink() and link.readlink() == path):
            link.unlink(missing_ok=True)
            link.symlink_to(path)
    before = os.environ.get("PYTHONPATH")
    if str(environment()) not in (before or "").split(os.pathsep):
        os.environ["PYTHONPATH"] = os.pathsep.join([str(environment()), *([before] if before else [])])
    if str(environment()) not in sys.path:
        sys.path.insert(0, str(environment()))
    imported = importlib.import_module("mlx_fused_adam._ext")
    if Path(imported.__file__).parent != package:
        raise RuntimeError(
            f"the emulated package is in {package}, but Python imports {imported.__file__}; "
            "an editable installation comes first: install without -e"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--environment"]:
        enter()
        os.environ["FUSED_ADAM_EMULATED_GPU"] = "1"
        os.execvp(sys.argv[2], sys.argv[2:])
    print(build())
