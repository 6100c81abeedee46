"""Cross-compiles the arm64 macOS wheel: the project's own build, MLX's macOS wheels, ziglang.

    python tests/macos/build.py        # builds, then prints the wheel's path

Needs the packages of the test extra and, once, downloads by pip. Everything lands in build/macos.
Nothing of it can be run elsewhere than on a Mac, but all of csrc/ is compiled for one and linked
against the library that one loads.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CACHE = ROOT / "build" / "macos"
PLATFORM = "macosx_14_0_arm64"
EXT_SUFFIX = f".cpython-3{sys.version_info.minor}-darwin.so"

sys.path.insert(0, str(HERE.parent))
from macos.system_stubs import write_stubs  # noqa: E402


class DownloadError(RuntimeError):
    """MLX's macOS wheels cannot be had here."""


@dataclass(frozen=True)
class MacMLX:
    """MLX for macOS, unpacked as an installation would be, and the linker stubs derived from it."""

    site_packages: Path
    stubs: Path

    @property
    def library(self) -> Path:
        return self.site_packages / "mlx/lib/libmlx.dylib"


def run(command: list[str | Path], cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """What the command prints; its whole output is in the error if it fails."""
    result = subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}")
    return result.stdout


def fetch_mlx(cache: Path = CACHE) -> MacMLX:
    """The macOS wheels of the very version of MLX that is installed here."""
    mlx_version = version("mlx")
    folder = cache / f"mlx-{mlx_version}-cp3{sys.version_info.minor}"
    mac = MacMLX(folder / "site-packages", folder / "stubs")
    done = folder / "done"
    if done.exists():
        return mac
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    wanted = [f"mlx=={mlx_version}", f"mlx-metal=={mlx_version}"]
    try:
        run([*pip, "--platform", PLATFORM, "--dest", folder / "wheels", *wanted])
    except RuntimeError as error:
        raise DownloadError(error) from error
    for wheel in sorted((folder / "wheels").glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            kernels = {name for name in archive.namelist() if name.endswith(".metallib")}
            archive.extractall(mac.site_packages, set(archive.namelist()) - kernels)
    shutil.rmtree(folder / "wheels")
    write_stubs([mac.library, *mac.site_packages.glob("mlx/core.*.so")], mac.stubs)
    done.touch()
    return mac


def stage_python_headers(cache: Path = CACHE) -> Path:
    """This Python's headers with a pyconfig.h for arm64 macOS, the only one that differs."""
    staged = cache / f"python3.{sys.version_info.minor}"
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    for header in Path(sysconfig.get_path("include")).iterdir():
        (staged / header.name).symlink_to(header)
    (staged / "pyconfig.h").unlink()
    (staged / "pyconfig.h").symlink_to(HERE / "sdk/python/pyconfig.h")
    return staged


def environment(cache: Path) -> dict[str, str]:
    """The compiler keeps what it makes in the cache too."""
    folder = str(cache / "zig")
    return os.environ | {"ZIG_GLOBAL_CACHE_DIR": folder, "ZIG_LOCAL_CACHE_DIR": folder}


def compile_alone(source: Path, output: Path, mac: MacMLX, cache: Path = CACHE) -> None:
    """Compiles and links one file outside the project's build, as that would."""
    include = mac.site_packages / "mlx/include"
    compiler = [sys.executable, HERE / "compiler.py", "-std=c++20", "-O1", "-I", include]
    run([*compiler, "-c", source, "-o", output.with_suffix(".o")], env=environment(cache))
    inputs = [output.with_suffix(".o"), mac.library, mac.stubs / "lib/libc++.tbd"]
    lenient = "-Wl,-undefined,dynamic_lookup"
    run([*compiler, "-shared", lenient, *inputs, "-o", output], env=environment(cache))


def build(source: Path = ROOT, cache: Path = CACHE) -> Path:
    """Builds the macOS wheel and returns its path."""
    mac = fetch_mlx(cache)
    defines = {
        "CMAKE_TOOLCHAIN_FILE": HERE / "toolchain-arm64-macos.cmake",
        "MACOS_PYTHON": sys.executable,
        "MACOS_STUBS": mac.stubs,
        "MLX_DIR": mac.site_packages / "mlx/share/cmake/MLX",
        "Python_INCLUDE_DIR": stage_python_headers(cache),
        "FUSED_ADAM_GPU": "metal",
    }
    settings = {f"cmake.define.{name}": str(value) for name, value in defines.items()}
    settings |= {"build-dir": str(cache / "cmake"), "install.strip": "false"}
    cross = {  # how a Python build is told that it is for another platform
        "_PYTHON_HOST_PLATFORM": "macosx-14.0-arm64",
        "SETUPTOOLS_EXT_SUFFIX": EXT_SUFFIX,
    }
    program = (
        "import json, sys, scikit_build_core.build as b; "
        "print(b.build_wheel(sys.argv[1], json.loads(sys.argv[2])))"
    )
    shutil.rmtree(cache / "cmake", ignore_errors=True)
    command = [sys.executable, "-c", program, cache / "dist", json.dumps(settings)]
    printed = run(command, cwd=source, env=environment(cache) | cross)
    return cache / "dist" / printed.split()[-1]


if __name__ == "__main__":
    print(build())
