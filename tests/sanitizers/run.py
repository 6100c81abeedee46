"""Runs the suite, or any tests, on an extension built with GCC's sanitizers; fails if a test fails or a process reports.

    python tests/sanitizers/run.py address                    # AddressSanitizer and UndefinedBehaviorSanitizer, all tests
    python tests/sanitizers/run.py address tests/test_layouts.py -n0
    DEVICE=emulated python tests/sanitizers/run.py address    # the host code of the Metal path, its GPU emulated
    python tests/sanitizers/run.py thread                     # ThreadSanitizer: tests of threads, then streams.py
    python tests/sanitizers/run.py leaks                      # LeakSanitizer: leaks.py
    python tests/sanitizers/run.py faults                     # faults planted in the extension are reported

What is not run, and why, stands in NOT_RUN. Needs GCC and the packages of the test extra. All is kept in build/sanitizers-….
"""

from __future__ import annotations

import os
import subprocess
import sys


import build

TESTS = build.ROOT / "tests"
# Files and tests, by the start of their names in the suite.
EMULATED_ONLY = "about the emulated GPU: run with DEVICE=emulated"
OTHER_BUILD = "about a build for another machine, in which nothing is instrumented"
NOT_RUN = {
    "test_arm64.py": OTHER_BUILD,
    "test_cuda_compile.py": OTHER_BUILD,
    "test_cuda_link.py": OTHER_BUILD,
    "test_macos_build.py": OTHER_BUILD,
    "test_sanitizers.py": "builds programs with sanitizers of its own",
    "test_shader_strict.py": "compiles shaders and runs nothing",
}
NOT_RUN_ON_CPU = {
    "test_emulator.py": EMULATED_ONLY,
    "test_emulator_calibration.py": EMULATED_ONLY,
    "test_formats_metal.py": EMULATED_ONLY,
    "test_hostile_gpu.py": EMULATED_ONLY,
    "test_metal_faults.py": EMULATED_ONLY,
}
# Where threads meet; the rest of the suite is one thread's.
OF_THREADS = ["threads", "parallel_for", "in_place", "optimizers", "storage"]


def main(what: str, *arguments: str) -> int:
    kind = "thread" if what == "thread" else "address"
    if missing := build.what_is_missing(kind):
        raise SystemExit(missing)
    device = os.environ.setdefault("DEVICE", "cpu")
    if device not in ("cpu", "emulated") or (kind == "thread" and device != "cpu"):
        raise SystemExit(f"DEVICE={device} cannot be run under the sanitizer for {kind}")
    place = build.build(kind, "emulated" if device == "emulated" else "none")
    environment = build.environment(kind, place)
    build.take_reports(place)
    tests = list(arguments)
    if kind == "thread" and not arguments:
        tests = [str(TESTS / f"test_{name}.py") for name in OF_THREADS]
    not_run = NOT_RUN | (NOT_RUN_ON_CPU if device == "cpu" else {})
    for name, reason in not_run.items():
        print(f"not run: {name}: {reason}")
        tests += ["--deselect", f"tests/{name}"]
    pytest = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests]
    status = subprocess.run(pytest, cwd=build.ROOT, env=environment).returncode
    reports = build.take_reports(place)
    for report in reports:
        print(report)
    print(f"{len(reports)} reports")
    return status or bool(reports)


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("address", "thread", "leaks", "faults"):
        raise SystemExit(__doc__)
    raise SystemExit(main(*sys.argv[1:]))
