"""Builds the extension, or a program of a few of its files, with GCC's sanitizers, and tells how to run Python with it.

    python tests/platforms/sanitizers/build.py address|thread [none|emulated]     # prints the folder; run.py runs tests
    in it

CMake and ninja decide what is out of date; all is kept in build/sanitizers-…. "address" is AddressSanitizer and
UndefinedBehaviorSanitizer, "thread" is ThreadSanitizer. Python and libmlx stay as they are, so a sanitizer's library
has to be loaded before them (LD_PRELOAD), and what libmlx does by itself is not seen.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
KINDS = ("address", "thread")
# Undefined behaviour ends the process. Without -g1 and with the tracking of variables the kernels compile for minutes;
# a report has its lines all the same. The kernels keep their own -O3, so that what is checked is vectorised as it is
# for users.
COMMON = ["-O1", "-g1", "-fno-var-tracking", "-fno-omit-frame-pointer"]
FLAGS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", *COMMON],
    "thread": ["-fsanitize=thread", *COMMON],
}
LIBRARIES = {"address": "libasan.so", "thread": "libtsan.so"}
COMPILERS = ("cc", "gcc", "c++", "g++")
# The files that a build of the extension reads.
SOURCES = ("CMakeLists.txt", "build_tools", "csrc", "metal", "python")
# Reports are files: nobody reads the output of the processes that tests start.
OPTIONS = {
    "address": {
        "ASAN_OPTIONS": [
            "detect_leaks=0",  # CPython's and libmlx's, by the thousand; leaks.py looks for ours
            "detect_stack_use_after_return=1",
            "handle_segv=2",  # before pytest's faulthandler
            "handle_abort=2",
            "allocator_may_return_null=1",  # an allocation too large is MLX's error, as it is for users
        ],
        # Beside AddressSanitizer, GCC's other library writes to stderr alone; an abort is in the first one's report.
        "UBSAN_OPTIONS": ["print_stacktrace=1", "abort_on_error=1"],
    },
    "thread": {
        "TSAN_OPTIONS": [
            f"suppressions={HERE / 'thread.supp'}",
            "ignore_noninstrumented_modules=1",  # thread.supp says why
            "history_size=4",
        ],
    },
}


# That the emulator's stacks are unknown; that an allocation has failed, as a test means it to.
REMARKS = ("ignoring requested __asan_handle_no_return", "AddressSanitizer failed to allocate")


class Fault(NamedTuple):
    """A text of a source, which must be there, and what a planted fault puts in its place."""

    file: str
    text: str
    replacement: str


def what_is_missing(kind: str = "address") -> str:
    """Why nothing can be run under this sanitizer here; empty if it can."""
    if sys.platform != "linux":
        return "the sanitizers are run on Linux alone"
    if not (compiler := shutil.which("g++")):
        return "needs g++"
    if "g++" not in _output(compiler, "--version").split("\n")[0]:
        return "needs a g++ that is GCC"
    if not _library(LIBRARIES[kind]).is_absolute():
        return f"needs GCC's {LIBRARIES[kind]}"
    return ""


def launcher(kind: str) -> list[str]:
    """The words before a command: libtsan of GCC below 14 knows addresses of the usual 28 random bits alone."""
    bits = Path("/proc/sys/vm/mmap_rnd_bits")
    is_too_random = kind == "thread" and bits.exists() and int(bits.read_text()) > 28
    return ["setarch", "--addr-no-randomize"] if is_too_random else []


def python(kind: str) -> list[str]:
    return [*launcher(kind), sys.executable]


def _output(*command: str | Path, env: dict[str, str] | None = None) -> str:
    arguments = [str(part) for part in command]
    result = subprocess.run(arguments, capture_output=True, text=True, env=env)
    if result.returncode:
        raise RuntimeError(f"{' '.join(arguments)}\n{result.stdout}{result.stderr}")
    return result.stdout


def _library(name: str) -> Path:
    """Where g++ finds a library; the mere name if it has none."""
    return Path(_output("g++", f"-print-file-name={name}").strip())


def folder(kind: str, gpu: str = "none", faults: Iterable[Fault] = ()) -> Path:
    # CMake remembers the Python that it was configured for, so each environment has a build of its own; and each set of
    # faults.
    environment = sys.prefix + "".join(map(str, faults))
    digest = hashlib.sha256(environment.encode()).hexdigest()[:8]
    parts = ["sanitizers", kind, *([gpu] if gpu != "none" else [])]
    return ROOT / "build" / "-".join([*parts, str(sys.implementation.cache_tag), digest])


def plant(faults: Iterable[Fault], sources: Path) -> None:
    """Writes into `sources`, a copy of the tree, what the faults put in place of a text that has to be there."""
    for fault in faults:
        text = (ROOT / fault.file).read_text()
        if text.count(fault.text) != 1:
            raise RuntimeError(
                f"{fault.file} holds {text.count(fault.text)} times {fault.text!r}; plant this fault elsewhere"
            )
        planted = sources / fault.file
        planted.write_text(text.replace(fault.text, fault.replacement))
        shutil.copystat(ROOT / fault.file, planted)


def copy(names: Iterable[str], to: Path) -> Path:
    """A copy of these parts of the tree, whose files keep their times, so that ninja leaves what has been made of
    them.
    """
    shutil.rmtree(to, ignore_errors=True)
    for name in names:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name)
        else:
            to.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, to / name)
    return to


def build(kind: str, gpu: str = "none", faults: Iterable[Fault] = ()) -> Path:
    """Brings the instrumented package up to date and returns the folder of the build."""
    faults = tuple(faults)
    place = folder(kind, gpu, faults)
    place.mkdir(parents=True, exist_ok=True)
    with open(place / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        sources = ROOT
        if faults:
            sources = copy(SOURCES, place / "sources")
            plant(faults, sources)
        cmake = [sys.executable, "-m", "cmake"]
        if not (place / "build.ninja").exists():
            defines = {
                "Python_EXECUTABLE": sys.executable,
                "FUSED_ADAM_GPU": gpu,
                "CMAKE_CXX_COMPILER": "g++",
                "CMAKE_BUILD_TYPE": "Sanitized",  # one that CMake and nanobind have no flags for
                "CMAKE_CXX_FLAGS": " ".join(FLAGS[kind]),
            }
            if gpu == "emulated":
                defines["CMAKE_PROJECT_mlx_fused_adam_INCLUDE"] = str(HERE / "emulated.cmake")
            options = [f"-D{name}={value}" for name, value in defines.items()]
            _output(*cmake, "-S", sources, "-B", place, "-G", "Ninja", *options)
        targets = ["_ext", *(["_emulator"] if gpu == "emulated" else [])]
        _output(*cmake, "--build", place, "--target", *targets)
        _write_compilers(place)
        # The stub is made by importing the module; CMake would do that without the sanitizer's library.
        stub = ["-m", "nanobind.stubgen", "-q", "-i", place, "-m", "_ext", "-o", place / "_ext.pyi"]
        _output(*python(kind), *stub, env=environment(kind, place))
        _link_package(place, sources)
    return place


def _link_package(place: Path, sources: Path) -> None:
    package = place / "environment" / "mlx_fused_adam"
    shutil.rmtree(package, ignore_errors=True)
    package.mkdir(parents=True)
    files = [
        *(sources / "python/mlx_fused_adam").iterdir(),
        *place.glob("_ext.*.so"),
        place / "_ext.pyi",
        place / "_build_info.py",
    ]
    for path in files:
        if path.name != "__pycache__":
            (package / path.name).symlink_to(path)


def _write_compilers(place: Path) -> None:
    """Compilers for mx.compile and the tests that run without the sanitizer's library, which is not made for them."""
    programs = place / "bin"
    programs.mkdir(exist_ok=True)
    for name in COMPILERS:
        if real := shutil.which(name):
            (programs / name).write_text(f'#!/bin/sh\nunset LD_PRELOAD\nexec "{real}" "$@"\n')
            (programs / name).chmod(0o755)


def environment(kind: str, place: Path, leaks: bool = False) -> dict[str, str]:
    """The environment variables in which Python imports the package of a build, and leaves reports in place/reports."""
    reports = place / "reports"
    reports.mkdir(exist_ok=True)
    variables = dict(os.environ)
    for name, options in OPTIONS[kind].items():
        variables[name] = ":".join([*options, f"log_path={reports / 'report'}", "log_exe_name=1"])
    if leaks:
        # libmlx keeps no frame pointers: without the slow way a stack would end in it.
        variables["ASAN_OPTIONS"] += ":detect_leaks=1:fast_unwind_on_malloc=0"
    # libstdc++ too: Python does not bring it, and a sanitizer looks for __cxa_throw when it starts.
    libraries = [_library(LIBRARIES[kind]), _library("libstdc++.so.6").resolve()]
    variables["LD_PRELOAD"] = ":".join(map(str, libraries))
    variables["PYTHONMALLOC"] = "malloc"  # each object by itself, its bounds known
    variables["PYTHONPATH"] = os.pathsep.join(
        [str(place / "environment"), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    variables["PATH"] = os.pathsep.join([str(place / "bin"), os.environ["PATH"]])
    return variables


def take_reports(place: Path) -> list[str]:
    """The reports that processes have left, which are deleted; not what is a mere remark."""
    found = []
    for path in sorted((place / "reports").glob("*")):
        text = path.read_text(errors="replace")
        if "ERROR: " in text or not any(remark in text for remark in REMARKS):
            found.append(f"{path.name}\n{text}")
        path.unlink()
    return found


if __name__ == "__main__":
    if missing := what_is_missing(sys.argv[1]):
        raise SystemExit(missing)
    print(build(*sys.argv[1:]))
