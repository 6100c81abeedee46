"""Cross-compiles the arm64 macOS wheel: the project's own build, MLX's macOS wheels, ziglang.

    python tests/platforms/macos/build.py        # builds, then prints the wheel's path

MLX comes in one wheel for each of several macOS releases: built is against the oldest, linked with
each. Needs the packages of the test extra and, once, downloads by pip. Everything lands in build/macos.
Nothing of it can be run elsewhere than on a Mac, but all of csrc/ is compiled for one and linked
against the library that one loads.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
CACHE = ROOT / "build" / "macos"
OLDEST = 14
NEWER_THAN_ANY = 99  # pip then takes the newest wheel
PLATFORM = f"macosx_{OLDEST}_0_arm64"
EXT_SUFFIX = f".cpython-3{sys.version_info.minor}-darwin.so"

sys.path.insert(0, str(ROOT / "tests"))
from platforms.macos.system_stubs import write_stubs  # noqa: E402


class DownloadError(RuntimeError):
    """MLX's macOS wheels cannot be had here."""


@dataclass(frozen=True)
class MacMLX:
    """MLX for one macOS, unpacked as an installation would be, and the linker stubs derived from it."""

    macos: int  # the release it is for
    site_packages: Path
    stubs: Path

    @property
    def library(self) -> Path:
        return self.site_packages / "mlx/lib/libmlx.dylib"


def run(command: list[str | Path], cwd: Path = ROOT, env: dict[str, str] | None = None) -> str:
    """The output of the command; all of it is in the error if it fails."""
    result = subprocess.run(command, cwd=cwd, env=env, text=True, capture_output=True)
    if result.returncode:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{result.stdout}\n{result.stderr}")
    return result.stdout


def fetch_mlx(macos: int = OLDEST, cache: Path = CACHE) -> MacMLX:
    """The wheels that a Mac of that release installs as the very version of MLX that is installed here."""
    mlx_version = version("mlx")
    asked = cache / f"mlx-{mlx_version}-cp3{sys.version_info.minor}-for-macos-{macos}"
    if not asked.exists():
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        wanted = [f"mlx=={mlx_version}", f"mlx-metal=={mlx_version}"]
        platform = ["--only-binary=:all:", "--platform", f"macosx_{macos}_0_arm64"]
        wheels = cache / "wheels"
        shutil.rmtree(wheels, ignore_errors=True)
        try:
            run([*pip, *platform, "--dest", wheels, *wanted])
        except RuntimeError as error:
            raise DownloadError(error) from error
        found = re.search(r"macosx_(\d+)_0", next(wheels.glob("mlx_metal-*.whl")).name)
        assert found, "a wheel of mlx-metal without a macOS release in its name"
        unfinished = asked.with_name(f"{asked.name}-unfinished")
        _unpack(wheels, unfinished)
        (unfinished / "release").write_text(found[1])
        unfinished.rename(asked)
    release = int((asked / "release").read_text())
    return MacMLX(release, asked / "site-packages", asked / "stubs")


def _unpack(wheels: Path, folder: Path) -> None:
    site_packages = folder / "site-packages"
    for wheel in sorted(wheels.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            kernels = {name for name in archive.namelist() if name.endswith(".metallib")}
            archive.extractall(site_packages, set(archive.namelist()) - kernels)
    shutil.rmtree(wheels)
    libraries = [site_packages / "mlx/lib/libmlx.dylib", *site_packages.glob("mlx/core.*.so")]
    write_stubs(libraries, folder / "stubs")


def fetch_every_mlx(cache: Path = CACHE) -> list[MacMLX]:
    """One for each macOS release that MLX has a wheel for, the newest first: pip asked downwards."""
    flavours = [fetch_mlx(NEWER_THAN_ANY, cache)]
    while flavours[-1].macos > OLDEST:
        flavours.append(fetch_mlx(flavours[-1].macos - 1, cache))
    return flavours


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
    mac = fetch_mlx(cache=cache)
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
        "import json, sys, scikit_build_core.build as b; print(b.build_wheel(sys.argv[1], json.loads(sys.argv[2])))"
    )
    shutil.rmtree(cache / "cmake", ignore_errors=True)
    command = [sys.executable, "-c", program, cache / "dist", json.dumps(settings)]
    printed = run(command, cwd=source, env=environment(cache) | cross)
    return cache / "dist" / printed.split()[-1]


if __name__ == "__main__":
    print(build())
