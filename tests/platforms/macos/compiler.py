"""A C++ compiler for arm64 macOS 14: `python -m ziglang c++` behind clang's command line.

Run by CMake, by way of toolchain-arm64-macos.cmake: compiler.py <clang options>
"""

import os
import sys

TARGET = "aarch64-macos.14.0"
# libc++ is the system's, as on a Mac, and of the oldest macOS meant: nothing that came later.
COMPILE = [
    "-U_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS",
    "-D_LIBCPP_HAS_VENDOR_AVAILABILITY_ANNOTATIONS=1",
]
LINK = ["-nostdlib++"]


def translate(argument: str) -> list[str]:
    """The replacement of a clang argument that ziglang's linker does not know."""
    if argument == "-bundle":
        return ["-shared"]
    if argument.startswith("-Wl,@"):
        # nanobind's list of Python symbols; mach_o.missing_symbols holds the result against it.
        return ["-Wl,-undefined,dynamic_lookup"]
    if argument.startswith("-flto"):
        return []
    if argument.startswith("-F/") and not os.path.isdir(argument[2:]):
        return []  # a folder of the machine that built MLX
    return [argument]


def main() -> None:
    arguments = [a for argument in sys.argv[1:] for a in translate(argument)]
    stage = COMPILE if "-c" in arguments else LINK
    command = [sys.executable, "-m", "ziglang", "c++", "-target", TARGET, *stage, *arguments]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
