# CMake toolchain: arm64 Linux from any Linux, with Debian's cross-compiler. Used by build.py, which sets ARM64_ROOT.

set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES ARM64_ROOT)
# Only Python's headers are taken from there: the compiler comes with a C library of its own.
set(CMAKE_CXX_FLAGS_INIT "-idirafter \"${ARM64_ROOT}/usr/include\"")
set(CMAKE_STRIP aarch64-linux-gnu-strip)
