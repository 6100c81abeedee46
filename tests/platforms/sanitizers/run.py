"""Runs the suite, or any tests, on an extension built with GCC's sanitizers; fails if a test fails or a process
reports.

    python tests/platforms/sanitizers/run.py address                  # AddressSanitizer and UndefinedBehaviorSanitizer
    python tests/platforms/sanitizers/run.py address tests/kernels/test_layouts.py -n0
    DEVICE=emulated python tests/platforms/sanitizers/run.py address  # the host code of the Metal path, its GPU
    emulated python tests/platforms/sanitizers/run.py thread                   # ThreadSanitizer: tests of threads, then
    streams.py python tests/platforms/sanitizers/run.py leaks                    # LeakSanitizer, by leaks.py
    python tests/platforms/sanitizers/run.py faults                   # faults planted in the extension are reported:
    faults.py

NOT_RUN lists the tests that are not run, and why. Needs GCC and the extra test. Builds are kept in
build/sanitizers-….
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from platforms.sanitizers import build, faults  # noqa: E402

HERE = Path(__file__).resolve().parent
WHAT = ("address", "thread", "leaks", "faults")
# Files and tests, by the start of their names.
EMULATED_ONLY = "about the emulated GPU: run with DEVICE=emulated"
OTHER_BUILD = "about a build for another machine, in which nothing is instrumented"
NOT_RUN = {
    "platforms/test_arm64.py": OTHER_BUILD,
    "benchmarks/test_bench.py": "measures, which takes hours here; the updates that it times are tested elsewhere",
    "platforms/test_cuda_compile.py": OTHER_BUILD,
    "platforms/test_cuda_link.py": OTHER_BUILD,
    "platforms/test_macos_build.py": OTHER_BUILD,
    "platforms/test_sanitizers.py": "builds programs with sanitizers of its own",
    "kernels/test_threads.py::test_nothing_piles_up": "measures memory, of which a sanitizer keeps what is freed",
    "metal/test_shader_strict.py": "compiles shaders and runs nothing",
}
NOT_RUN_ON_CPU = {
    "metal/test_emulator.py": EMULATED_ONLY,
    "metal/test_emulator_calibration.py": EMULATED_ONLY,
    "metal/test_state_formats_metal.py": EMULATED_ONLY,
    "metal/test_hostile_gpu.py": EMULATED_ONLY,
    "metal/test_metal_faults.py": EMULATED_ONLY,
}
TIMEOUT = ["-o", "faulthandler_timeout=3600"]  # the suite's own is for tests at full speed
# Where threads meet; the rest of the suite is one thread's.
OF_THREADS = [
    "kernels/test_threads.py",
    "kernels/test_parallel_for.py",
    "optimizers/test_in_place.py",
    "optimizers/test_optimizers.py",
    "optimizers/test_state_formats.py",
]


def deselected(device: str) -> list[str]:
    """pytest's options for what is not run, which is printed."""
    options = []
    for name, reason in (NOT_RUN | (NOT_RUN_ON_CPU if device == "cpu" else {})).items():
        print(f"not run: {name}: {reason}", flush=True)
        options += ["--deselect", f"tests/{name}"]
    return options


def run(kind: str, device: str, *commands: list[str], leaks: bool = False) -> int:
    """Runs commands of Python on the instrumented package; 0 if all end well and nobody reports."""
    place = build.build(kind, "emulated" if device == "emulated" else "none")
    environment = build.environment(kind, place, leaks) | {"DEVICE": device}
    if device == "emulated":
        environment["FUSED_ADAM_EMULATOR_BUILD"] = str(place)
    build.take_reports(place)
    where = "import mlx_fused_adam._ext as x; print(x.__file__)"
    commands = (["-c", where], *commands)
    failed = 0
    for command in commands:
        done = subprocess.run([*build.python(kind), *command], cwd=build.ROOT, env=environment)
        failed += done.returncode != 0
    reports = build.take_reports(place)
    print(*reports, sep="\n")
    print(f"{failed} of {len(commands)} commands failed; {len(reports)} processes reported")
    return int(bool(failed or reports))


def main(what: str, *arguments: str) -> int:
    kind = "thread" if what == "thread" else "address"
    if missing := build.what_is_missing(kind):
        raise SystemExit(missing)
    device = os.environ.get("DEVICE", "cpu")
    if device not in ("cpu", *(["emulated"] if what == "address" else [])):
        raise SystemExit(f"{what} cannot be run with DEVICE={device}")
    if what == "faults":
        return int(any([faults.main(kind) for kind in build.KINDS]))
    if what == "leaks":
        return run(kind, device, [str(HERE / "leaks.py")], leaks=True)
    pytest = ["-m", "pytest", "-p", "no:cacheprovider", *TIMEOUT, *deselected(device), *arguments]
    if what == "address" or arguments:
        return run(kind, device, pytest)
    tests = [f"tests/{name}" for name in OF_THREADS]
    return run(kind, device, [*pytest, *tests], [str(HERE / "streams.py")])


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in WHAT:
        raise SystemExit(__doc__)
    raise SystemExit(main(*sys.argv[1:]))
