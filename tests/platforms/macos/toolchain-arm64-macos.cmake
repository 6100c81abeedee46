# CMake toolchain: arm64 macOS from any host, with the clang and linker of the PyPI package ziglang.
# Used by build.py, which sets MACOS_PYTHON (an interpreter with ziglang) and MACOS_STUBS (see system_stubs.py).

set(CMAKE_SYSTEM_NAME Darwin)
set(CMAKE_SYSTEM_VERSION 23) # of the kernel of macOS 14
set(CMAKE_SYSTEM_PROCESSOR arm64)
set(CMAKE_TRY_COMPILE_PLATFORM_VARIABLES MACOS_PYTHON MACOS_STUBS)
set(CMAKE_TRY_COMPILE_TARGET_TYPE STATIC_LIBRARY)

set(CMAKE_CXX_COMPILER "${MACOS_PYTHON}" "${CMAKE_CURRENT_LIST_DIR}/compiler.py")
set(CMAKE_CXX_FLAGS_INIT "-isystem \"${CMAKE_CURRENT_LIST_DIR}/sdk\"")
set(CMAKE_MODULE_LINKER_FLAGS_INIT
    "-F\"${MACOS_STUBS}/Frameworks\" \"${MACOS_STUBS}/lib/libc++.tbd\" \"${MACOS_STUBS}/lib/libobjc.tbd\"")

# An archiver that writes Mach-O archives. The host's ranlib and strip know nothing of them.
set(CMAKE_AR "${MACOS_PYTHON}")
set(CMAKE_CXX_ARCHIVE_CREATE "<CMAKE_AR> -m ziglang ar rcs <TARGET> <OBJECTS>")
set(CMAKE_CXX_ARCHIVE_FINISH "")
set(CMAKE_STRIP "")

# Apple's tools that would edit a library on install are not at hand: link it as it is to be installed.
set(CMAKE_BUILD_WITH_INSTALL_RPATH ON)
set(CMAKE_INSTALL_NAME_TOOL "${CMAKE_COMMAND}")
set(CMAKE_OSX_SYSROOT "" CACHE PATH "")
set(CMAKE_OSX_ARCHITECTURES "" CACHE STRING "")
