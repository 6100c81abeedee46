"""Faults planted in csrc/, and small programs of a few of its files, to see that the sanitizers see.

python tests/platforms/sanitizers/faults.py address|thread  # the extension, with Python

test_sanitizers.py runs the small programs.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from platforms.sanitizers import build  # noqa: E402
from platforms.sanitizers.build import Fault  # noqa: E402


class Trigger(NamedTuple):
    """A planted fault, a program in Python that meets it, and what the report says then."""

    fault: Fault
    program: str
    report: str


UPDATE = """
import mlx.core as mx, mlx_fused_adam as fused
mx.set_default_device(mx.cpu)
x = mx.ones({size}, mx.{dtype})
mx.eval(fused.adam_update(x, x, x, x, 1e-3))
"""

TRIGGERS = {
    "address": {
        "writes past an array's end": Trigger(
            Fault(
                "csrc/cpu/kernels.cpp",
                "for (; at + kChunk <= n; at += kChunk) {\n    update_one_chunk",
                "for (; at < n; at += kChunk) {\n    update_one_chunk",
            ),
            UPDATE.format(size=33, dtype="float32"),
            "heap-buffer-overflow",
        ),
        "shifts out of an integer": Trigger(
            Fault("csrc/math/encodings.h", "(h & 0x8000u) << 16", "(h & 0x8000u) << 32"),
            "import os; os.environ['MLX_FUSED_ADAM_ISA'] = 'baseline'\n" + UPDATE.format(size=64, dtype="float16"),
            "shift exponent 32 is too large",
        ),
        "leaks": Trigger(
            Fault(
                "csrc/op/adam_update.cpp",
                "mx::array constant(double value) { return mx::array(static_cast<float>(value)); }",
                "mx::array constant(double value) { return *new mx::array(float(value)); }",
            ),
            "leaks.py",
            "fused_adam::",
        ),
    },
    "thread": {
        "writes without the lock": Trigger(
            Fault(
                "csrc/cpu/threads.cpp",
                "std::lock_guard lock(mutex_);\n      current_ = work;",
                "current_ = work;",
            ),
            "streams.py",
            "data race",
        ),
    },
}


def faults(kind: str) -> list[Fault]:
    return [trigger.fault for trigger in TRIGGERS[kind].values()]


class Program(NamedTuple):
    sources: list[str]
    options: list[str]


PROGRAMS = {
    "kernels": Program(
        ["tests/platforms/sanitizers/kernels.cpp", "csrc/cpu/kernels.cpp"],
        [
            "-O0",  # compiles five times as fast
            "-DFUSED_ADAM_ISA=baseline",
            '-DFUSED_ADAM_HALF_HEADER="cpu/half/portable.h"',
            "-DFUSED_ADAM_VECTOR_BYTES=16",
        ],
    ),
    "parallel_for": Program(["tests/kernels/parallel_for.cpp", "csrc/cpu/threads.cpp"], ["-pthread"]),
}


def compile_program(name: str, kind: str, place: Path, planted: Iterable[Fault] = ()) -> Path:
    """Compiles a program within `place`, from a copy of its sources if faults are planted, and returns it."""
    sources = build.ROOT
    if planted := tuple(planted):
        sources = build.copy(("csrc", "tests/kernels", "tests/platforms/sanitizers"), place / "sources")
        build.plant(planted, sources)
    program = PROGRAMS[name]
    command = ["g++", "-std=c++20", "-ffp-contract=off", "-w", *build.FLAGS[kind]]
    command += [f"-I{sources / 'csrc'}", f"-I{Path(mx.__file__).parent / 'include'}"]
    command += [*program.options, *(str(sources / file) for file in program.sources)]
    result = place / name
    subprocess.run([*command, "-o", str(result)], check=True)
    return result


def main(kind: str) -> int:
    """Builds the extension with all faults of a kind; each must be reported by its program, and no other be met."""
    place = build.build(kind, faults=faults(kind))
    unseen = 0
    for name, (_, program, report) in TRIGGERS[kind].items():
        environment = build.environment(kind, place, leaks=program == "leaks.py")
        build.take_reports(place)
        code = [str(build.HERE / program)] if program.endswith(".py") else ["-c", program]
        command = [*build.python(kind), *code]
        done = subprocess.run(command, env=environment, timeout=1200, stderr=subprocess.PIPE, text=True)
        reports = build.take_reports(place)
        is_seen = bool(reports) and report in "\n".join([done.stderr, *reports])
        print(done.stderr, *reports, sep="\n")
        print(f"{kind}: {name}: {'seen' if is_seen else 'NOT SEEN'}")
        unseen += not is_seen
    return unseen


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
