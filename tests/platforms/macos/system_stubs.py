"""Linker stubs (.tbd) of macOS system libraries, made from what MLX's macOS binaries import.

Apple's SDK is not needed: a symbol that MLX for macOS 14 binds to libc++ or Metal is certain to be
there. What the extension uses beyond that stays unbound, and the test names it. Used by build.py.
"""

from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import lief

LIBCXX = "/usr/lib/libc++.1.dylib"
# Not used by MLX's binaries, but in libc++ since macOS 11 or earlier (the changelog of its ABI).
OLDER_LIBCXX = {
    "__ZdaPvm",
    "__ZdaPvmSt11align_val_t",
    "__ZdlPvm",
    "__ZdlPvmSt11align_val_t",
    "__ZNSt11logic_errorC1EPKc",
    "__ZNSt11logic_errorC1ERKNSt3__112basic_stringIcNS0_11char_traitsIcEENS0_9allocatorIcEEEE",
    "__ZNSt11logic_errorD1Ev",
    "__ZNSt11logic_errorD2Ev",
    "__ZTISt11logic_error",
    "__ZTINSt3__112system_errorE",
    # Used by MLX's since 0.32.3
    "__ZnwmSt11align_val_t",
    "__ZNSt3__16chrono12steady_clock3nowEv",
    # atomic<T>::wait and its kin
    "__ZNSt3__120__libcpp_atomic_waitEPVKvx",
    "__ZNSt3__123__cxx_atomic_notify_allEPVKv",
    "__ZNSt3__123__cxx_atomic_notify_oneEPVKv",
    "__ZNSt3__123__libcpp_atomic_monitorEPVKv",
    # to_string
    *(f"__ZNSt3__19to_stringE{number}" for number in "ijlmxyfde"),
}
# operator new and delete, type information of std exceptions: a program may have its own instead.
REPLACEABLE = ("__Zn", "__Zd", "__ZTISt")


def imported_symbols(binaries: Iterable[Path]) -> dict[str, set[str]]:
    """Symbols that the binaries cannot do without, by the system library they come from."""
    symbols: dict[str, set[str]] = defaultdict(set)
    symbols[LIBCXX] |= OLDER_LIBCXX
    for path in binaries:
        universal = lief.MachO.parse(str(path))  # owns what follows
        binary = universal.at(0)
        for library in binary.libraries:
            if library.name.startswith("/"):
                symbols[library.name] |= set()
        for binding in binary.bindings:
            name = binding.symbol.name
            if binding.has_library and binding.library.name in symbols and not binding.weak_import:
                symbols[binding.library.name].add(name)
            elif name.startswith(REPLACEABLE):
                symbols[LIBCXX].add(name)
    return symbols


def write_stub(path: Path, library: str, symbols: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = ", ".join(f"'{symbol}'" for symbol in sorted(symbols))
    path.write_text(
        "--- !tapi-tbd\n"
        "tbd-version: 4\n"
        "targets: [ arm64-macos ]\n"
        f"install-name: '{library}'\n"
        "exports:\n"
        "  - targets: [ arm64-macos ]\n"
        f"    symbols: [ {listed} ]\n"
        "...\n"
    )


def write_stubs(binaries: Iterable[Path], folder: Path) -> None:
    """Fills folder/lib and folder/Frameworks for the linker options -L and -F."""
    for library, symbols in imported_symbols(binaries).items():
        name = Path(library).name
        if ".framework/" in library:
            write_stub(folder / f"Frameworks/{name}.framework/{name}.tbd", library, symbols)
        elif not name.startswith("libSystem"):  # ziglang brings its own
            write_stub(folder / f"lib/{name.split('.')[0]}.tbd", library, symbols)
