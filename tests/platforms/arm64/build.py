"""Makes an arm64 Linux in a folder: Debian's Python, MLX's aarch64 wheels, and this project, cross-built by its own
CMake.

    python tests/platforms/arm64/build.py        # then run.py runs tests in it

Needs qemu-user-static, debootstrap and g++-aarch64-linux-gnu of Debian or Ubuntu and the packages of the test extra;
downloads once, by debootstrap and pip. Everything lands in build/arm64. The CPU kernels of Apple silicon are the same
arm64 code.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CACHE = ROOT / "build" / "arm64"
SYSTEM = CACHE / "system"
BIN = CACHE / "bin"
QEMU = "qemu-aarch64-static"
PROGRAMS = (QEMU, "debootstrap", "aarch64-linux-gnu-g++", "dpkg-deb")
# The release of Debian whose Python is of the version that builds: the extension is for that version alone.
RELEASES = {(3, 11): "bookworm", (3, 13): "trixie"}
PACKAGES = "python3,libpython3-dev,libblas3,liblapack3,libgfortran5,libstdc++6"
PLATFORMS = [f"manylinux_2_{minor}_aarch64" for minor in (35, 34, 31, 28, 17)]
TEST_PACKAGES = ["hypothesis", "ml-dtypes", "numpy", "pytest"]


class DownloadError(RuntimeError):
    """The arm64 system or its packages cannot be had here."""


def what_is_missing() -> str:
    """Why none of this can be done here; empty if it can."""
    if sys.platform != "linux":
        return "arm64 Linux is emulated on Linux alone"
    if sys.version_info[:2] not in RELEASES:
        known = ", ".join(f"{major}.{minor}" for major, minor in RELEASES)
        return f"needs Python {known}, which a release of Debian has"
    missing = [program for program in PROGRAMS if not shutil.which(program, path=_path())]
    return f"needs {', '.join(missing)}" if missing else ""


def _path() -> str:
    return os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/sbin"])  # debootstrap's


def _run(*command: str | Path, env: dict[str, str] | None = None) -> str:
    """The output of the command; all of it is in the error if it fails."""
    environment = os.environ | {"PATH": _path()} | (env or {})
    arguments = [str(part) for part in command]
    result = subprocess.run(arguments, cwd=ROOT, env=environment, text=True, capture_output=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(arguments)}\n{result.stdout}\n{result.stderr}")
    return result.stdout


def python_version() -> str:
    return f"3.{sys.version_info.minor}"


def site_packages() -> Path:
    return CACHE / f"site-packages-{version('mlx')}"


def fetch_system() -> None:
    """Debian's packages unpacked, none of them configured: nothing but Python is started in it."""
    if SYSTEM.exists():
        return
    unfinished = CACHE / "system-unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    options = ["--foreign", "--arch=arm64", "--variant=minbase", f"--include={PACKAGES}"]
    try:
        _run("debootstrap", *options, RELEASES[sys.version_info[:2]], unfinished)
    except RuntimeError as error:
        raise DownloadError(error) from error
    archives = unfinished / "var/cache/apt/archives"
    for package in sorted(archives.glob("*.deb")):
        _run("dpkg-deb", "--extract", package, unfinished)
    shutil.rmtree(archives)
    unfinished.rename(SYSTEM)


def fetch_packages() -> None:
    """The very version of MLX that is installed here, and what the tests import."""
    if site_packages().exists():
        return
    unfinished = CACHE / "site-packages-unfinished"
    shutil.rmtree(unfinished, ignore_errors=True)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", unfinished]
    chosen = ["--only-binary=:all:", "--python-version", python_version()]
    for platform in PLATFORMS:
        chosen += ["--platform", platform]
    try:
        _run(*pip, *chosen, f"mlx[cpu]=={version('mlx')}", *TEST_PACKAGES)
    except RuntimeError as error:
        raise DownloadError(error) from error
    unfinished.rename(site_packages())


def write_programs() -> None:
    """A python that is the emulated one, child processes included, and the g++ that mx.compile calls."""
    shutil.rmtree(BIN, ignore_errors=True)
    BIN.mkdir(parents=True)
    (CACHE / "tmp").mkdir(exist_ok=True)
    site = site_packages()
    settings = {
        "PYTHONHOME": SYSTEM / "usr",
        "PYTHONPATH": site,
        "PYTHONDONTWRITEBYTECODE": 1,
        "LD_LIBRARY_PATH": site / "mlx/lib",
        "TMPDIR": CACHE / "tmp",  # mx.compile keeps libraries in it, which the host must not meet
    }
    guest = " ".join(f"-E {name}='{value}'" for name, value in settings.items())
    interpreter = SYSTEM / f"usr/bin/python{python_version()}"
    scripts = {
        # The emulated program starts others as the host does, so that its own name must be this script's.
        "python": f"exec {QEMU} -0 '{BIN}/python' -L '{SYSTEM}' {guest} '{interpreter}' \"$@\"",
        "g++": 'unset LD_LIBRARY_PATH\nexec aarch64-linux-gnu-g++ "$@"',
    }
    for name, script in scripts.items():
        (BIN / name).write_text(f"#!/bin/sh\n{script}\n")
        (BIN / name).chmod(0o755)


def build() -> Path:
    """Builds the project's wheel for arm64 and returns its path."""
    site = site_packages()
    defines = {
        "ARM64_ROOT": SYSTEM,
        "CMAKE_TOOLCHAIN_FILE": HERE / "toolchain-arm64-linux.cmake",
        "MLX_DIR": site / "mlx/share/cmake/MLX",
        "Python_INCLUDE_DIR": SYSTEM / f"usr/include/python{python_version()}",
    }
    settings = {f"cmake.define.{name}": str(value) for name, value in defines.items()}
    settings["build-dir"] = str(CACHE / "cmake")
    cross = {  # how a Python build is told that it is for another platform
        "_PYTHON_HOST_PLATFORM": "linux-aarch64",
        "SETUPTOOLS_EXT_SUFFIX": f".cpython-3{sys.version_info.minor}-aarch64-linux-gnu.so",
    }
    program = (
        "import json, sys, scikit_build_core.build as b; print(b.build_wheel(sys.argv[1], json.loads(sys.argv[2])))"
    )
    printed = _run(sys.executable, "-c", program, CACHE / "dist", json.dumps(settings), env=cross)
    return CACHE / "dist" / printed.split()[-1]


def prepare() -> Path:
    """Brings all of it up to date and returns the python to run."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        fetch_system()
        fetch_packages()
        write_programs()
        wheel = build()
        site = site_packages()
        for old in site.glob("mlx_fused_adam*"):
            shutil.rmtree(old)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(site)
    return BIN / "python"


if __name__ == "__main__":
    if missing := what_is_missing():
        raise SystemExit(missing)
    print(prepare())
