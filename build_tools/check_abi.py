"""Stops the build if the extension could not see MLX's arrays: python check_abi.py MLX_PACKAGE EXTENSION.

Two nanobind modules see each other's classes only if their ABI tags are equal. With another tag all compiles and links,
and then every call fails, as "incompatible function arguments". Run by CMake once the extension is linked; one that was
built elsewhere is checked when it is imported (csrc/bindings.cpp).
"""

import re
import sys
from importlib.metadata import version
from pathlib import Path

from mlx_releases import NANOBIND

_TAG = re.compile(rb"(?:nanobind|v\d+\w*?)_system_\w+")  # since nanobind 3 and before


def abi_tags(module: Path) -> list[str]:
    """The ABI tags that the compiled module carries: one, if it was made with nanobind."""
    return sorted({tag.decode() for tag in _TAG.findall(module.read_bytes())})


def main() -> None:
    package, extension = map(Path, sys.argv[1:])
    cores = sorted(package.glob("core.*.so"))
    if not cores:
        raise SystemExit(f"no core.*.so in {package}: is this MLX's package?")
    mlx = version("mlx")
    needed = NANOBIND.get(mlx)
    mend = (
        f"It needs nanobind {needed}: pip install 'nanobind=={needed}'"
        if needed
        else "docs/mlx-releases.md says how to find its nanobind"
    )
    for core in cores:
        wanted, found = abi_tags(core), abi_tags(extension)
        if not wanted or wanted != found:
            raise SystemExit(
                f"{extension.name} was built with another nanobind than mlx {mlx} and could not see its arrays: "
                f"ABI {found} instead of {wanted}. {mend}"
            )


if __name__ == "__main__":
    main()
