"""Compiles a shader for the emulator into a shared library, once for each different content.

library.cpp runs it, in tests/: python -m emulator.compile_shader SHADER.metal --cache DIR [-I DIR]
It prints the path of the library, beside which lies a list of its threadgroup variables.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import platform
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from . import hostile
from .msl import MslError
from .translate import SHIM, compiler, for_cpu

HERE = Path(__file__).resolve().parent

# -fsanitize=thread makes the compiler call __tsan_read4(address) and its like before every access; checker.cpp defines
# those functions, libtsan stays out (the way of the Linux kernel's KCSAN).
COMPILE_FLAGS = [
    *["-std=gnu++17", "-O2", "-fno-tree-vectorize", "-fno-tree-slp-vectorize", "-g1", "-fPIC", "-w"],
    *["-ffp-contract=off", "-fno-math-errno", "-fvisibility=hidden", "-fno-strict-aliasing"],
    "-fsanitize=thread",
]
GCC_FLAGS = [
    *["-fno-gnu-unique", "-fexcess-precision=16", "-fsingle-precision-constant"],
    "-fno-hoist-adjacent-loads",
    "--param=tsan-instrument-func-entry-exit=0",
]
CLANG_FLAGS = ["-mllvm", "-tsan-instrument-func-entry-exit=0"]
# Contraction takes clang, which Apple's compiler is too: GCC knows neither its pragma nor where an expression ends.
CONTRACTING = [sys.executable, "-m", "ziglang", "c++"]
CONTRACTING_FLAGS = ["-ffp-contract=fast-honor-pragmas", "-fno-sanitize=undefined"]
if platform.machine() == "x86_64":
    CONTRACTING_FLAGS += ["-mfma", "-mf16c"]


def _threadgroup_variables(library: Path) -> str:
    """Offset, size and name of every thread-local symbol: the library's threadgroup memory."""
    listing = subprocess.run(["nm", "-SC", library], capture_output=True, text=True, check=True).stdout
    headers = subprocess.run(["readelf", "-sW", library], capture_output=True, text=True, check=True).stdout
    thread_local = {int(line.split()[1], 16) for line in headers.splitlines() if " TLS " in line}
    lines = []
    for line in listing.splitlines():
        match = re.match(r"([0-9a-f]+) ([0-9a-f]+) [bBdDuvVwW] (.*)", line)
        if match and int(match[1], 16) in thread_local and re.search(r"_memory$|anchor$", match[3]):
            lines.append(f"{int(match[1], 16)} {int(match[2], 16)} {match[3]}\n")
    return "".join(lines)


def build(source: str, cache: Path | str, include_dirs: Sequence[Path | str] = ()) -> Path:
    """Compiles a shader for the emulator, once for each different content, and returns the shared library."""
    relaxations = hostile.active()
    translated = for_cpu(source, include_dirs, relaxations)
    compile_command = CONTRACTING if "contraction" in relaxations else compiler()
    version = subprocess.run([*compile_command, "--version"], capture_output=True, text=True).stdout
    flags = [*COMPILE_FLAGS, *(CLANG_FLAGS if "clang" in version else GCC_FLAGS)]
    if "contraction" in relaxations:
        flags += CONTRACTING_FLAGS
    if "functions" in relaxations:
        flags.append("-DMSL_HOSTILE_FUNCTIONS")
    key = hashlib.sha256("\0".join([translated, version, *flags]).encode())
    for header in sorted([*SHIM.glob("*.h"), HERE / "abi.h"]):
        key.update(header.read_bytes())
    cache = Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    library = cache / f"{key.hexdigest()[:32]}.so"
    with open(library.with_suffix(".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            with tempfile.TemporaryDirectory(dir=cache) as scratch:
                made = Path(scratch) / "shader.so"
                text = Path(scratch) / "shader.cpp"
                text.write_text(translated)
                output = ["-o", made.with_suffix(".o")]
                command = [*compile_command, "-c", text, *output, *flags, f"-I{SHIM}", f"-I{HERE}"]
                result = subprocess.run(command, capture_output=True, text=True)
                if result.returncode:
                    raise MslError(result.stderr)
                # Linked without -fsanitize, which would ask for libtsan.
                link = [*compiler(), "-shared", made.with_suffix(".o"), "-o", made]
                subprocess.run(link, check=True)
                library.with_suffix(".vars").write_text(_threadgroup_variables(made))
                made.rename(library)
    return library


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shader", help="MSL file, or - for standard input")
    parser.add_argument("--cache", type=Path, required=True, help="folder of the compiled libraries")
    parser.add_argument("-I", dest="include_dirs", action="append", default=[], help="include folder")
    arguments = parser.parse_args()
    source = sys.stdin.read() if arguments.shader == "-" else Path(arguments.shader).read_text()
    try:
        print(build(source, arguments.cache, arguments.include_dirs))
    except MslError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
