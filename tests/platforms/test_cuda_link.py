"""Beside MLX's CUDA back end: does the extension find there every symbol of MLX that it needs?

The packages mlx-cpu and mlx-cuda-… both bring mlx/lib/libmlx.so, and the extension loads whichever is installed.
Nothing is run. Skipped, with the reason, where lief or MLX's CUDA wheels (90 MB each, kept in build/cuda) cannot be
had.
"""

import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from support import tools
from support.extension import installed_extension

if sys.platform != "linux":
    pytest.skip("MLX has CUDA back ends on Linux alone", allow_module_level=True)
pytestmark = tools.module_needs("lief")

import lief  # noqa: E402

CACHE = Path(__file__).resolve().parents[2] / "build" / "cuda"


def fetch_libmlx(package: str) -> Path:
    """The library in the CUDA wheel of the very version of MLX that is installed here."""
    folder = CACHE / f"{package}-{version('mlx')}"
    library = folder / "mlx/lib/libmlx.so"
    if not library.exists():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            "--only-binary=:all:",
        ]
        wanted = ["--dest", str(folder), f"{package}=={version('mlx')}"]
        result = subprocess.run([*pip, *wanted], text=True, capture_output=True)
        if result.returncode:
            pytest.skip(f"{package} cannot be had here: {result.stderr.strip()}")
        (wheel,) = folder.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            archive.extract("mlx/lib/libmlx.so", folder)
        wheel.unlink()
    return library


def dynamic_symbols(path: Path) -> tuple[set[str], set[str]]:
    """Names that the library exports, and names that it needs from others."""
    binary = lief.ELF.parse(str(path))
    assert binary is not None, path
    exported = {symbol.name for symbol in binary.exported_symbols}
    return exported, {symbol.name for symbol in binary.imported_symbols}


@pytest.mark.parametrize("package", ["mlx-cuda-12", "mlx-cuda-13"])
def test_the_cuda_library_exports_every_symbol_of_mlx_that_is_needed(package):
    exported, _ = dynamic_symbols(fetch_libmlx(package))
    _, needed = dynamic_symbols(installed_extension())
    from_mlx = {name for name in needed if "N3mlx4core" in name}
    assert from_mlx, "the extension uses nothing of MLX?"
    assert not from_mlx - exported, sorted(from_mlx - exported)
    # Declared in the headers and kept inside: a library that exported all would prove nothing.
    assert "_ZTVN3mlx4core4fast6CustomE" not in exported
