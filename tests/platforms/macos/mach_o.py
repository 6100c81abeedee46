"""The symbols that a macOS extension module needs from the system, and whether they are there.

`inspect` reads a Mach-O file with lief; `missing_symbols` compares what it needs with what
libmlx.dylib and Python export. Used by test_macos_build.py.
"""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import lief

LIBMLX = "@rpath/libmlx.dylib"
FLAT_LOOKUP = -2  # bound to no library: the loader takes whichever has it


@dataclass(frozen=True)
class Module:
    cpu: str
    minimum_macos: tuple[int, ...]
    rpaths: list[str]
    libraries: list[str]
    signed: bool
    exported: set[str]
    needed: dict[str, set[str]]  # by library; "" for symbols bound to none


def inspect(path: Path) -> Module:
    universal = lief.MachO.parse(str(path))  # owns all that is read below
    if universal is None or universal.size != 1:
        raise ValueError(f"{path} is not a Mach-O file of one architecture")
    binary = universal.at(0)
    needed: dict[str, set[str]] = defaultdict(set)
    for binding in binary.bindings:
        if binding.has_library:
            needed[binding.library.name].add(binding.symbol.name)
        elif binding.library_ordinal == FLAT_LOOKUP:
            needed[""].add(binding.symbol.name)
    return Module(
        cpu=binary.header.cpu_type.name,
        minimum_macos=tuple(binary.build_version.minos),
        rpaths=[rpath.path for rpath in binary.rpaths],
        libraries=[
            library.name for library in binary.libraries if library.command == lief.MachO.LoadCommand.TYPE.LOAD_DYLIB
        ],
        signed=binary.has_code_signature,
        exported={symbol.name for symbol in binary.exported_symbols},
        needed=dict(needed),
    )


def python_symbols() -> set[str]:
    """The symbols that nanobind tells Apple's linker to leave to the interpreter."""
    import nanobind

    listing = Path(nanobind.cmake_dir()) / "darwin-ld-cpython.sym"
    return {line.split()[1] for line in listing.read_text().splitlines() if line.startswith("-U")}


def missing_symbols(module: Module, libmlx: Module) -> set[str]:
    """The symbols that nothing on a Mac would provide: loading the module, or a call into it, would fail."""
    from_mlx = module.needed.get(LIBMLX, set())
    return (from_mlx - libmlx.exported) | (module.needed.get("", set()) - python_symbols())
