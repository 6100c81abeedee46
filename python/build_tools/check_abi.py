"""Stops a build whose nanobind differs from MLX's: python check_abi.py MLX_PACKAGE EXTENSION.

Two nanobind modules see each other's classes only if their ABI tags are equal. With another tag all compiles and links, and
then every call fails, as "incompatible function arguments". Run by CMake once the extension is linked.
"""

import re
import sys
from pathlib import Path

_TAG = re.compile(rb"(?:nanobind|v\d+\w*?)_system_\w+")  # since nanobind 3 and before


def abi_tags(module: Path) -> list[str]:
    """The ABI tags that the compiled module carries: one, if it was made with nanobind."""
    return sorted({tag.decode() for tag in _TAG.findall(module.read_bytes())})


def main() -> None:
    package, extension = map(Path, sys.argv[1:])
    cores = sorted(package.glob("core.*.so"))
    if not cores:
        raise SystemExit(f"no core.*.so in {package}: is this MLX's package?")
    for core in cores:
        if abi_tags(core) != abi_tags(extension):
            raise SystemExit(
                f"{extension.name} was built with another nanobind than MLX and could not see its arrays: ABI "
                f"{abi_tags(extension)} instead of {abi_tags(core)}. Build with the nanobind that pyproject.toml pins."
            )


if __name__ == "__main__":
    main()
