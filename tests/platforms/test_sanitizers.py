"""GCC's sanitizers on small programs of the extension's files: nothing is found, and each fault that is planted is.

The whole suite on an instrumented extension is run by hand, since it takes long: sanitizers/run.py.
"""

from __future__ import annotations

import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from platforms.sanitizers import build, faults

pytestmark = pytest.mark.skipif(
    bool(build.what_is_missing("address") or build.what_is_missing("thread")),
    reason=build.what_is_missing("address") or build.what_is_missing("thread"),
)

PROGRAMS = [("kernels", "address"), ("parallel_for", "address"), ("parallel_for", "thread")]
# The arguments with which a program meets a fault.
PLANTED = [
    ("kernels", "address", "writes past an array's end", []),
    ("kernels", "address", "shifts out of an integer", ["whole chunks"]),
    ("parallel_for", "thread", "writes without the lock", []),
]


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, bool], Path]:
    """Each as it is and, where there are some for it, with all faults of its kind; compiled two at a time."""

    def compile_one(name: str, kind: str, has_faults: bool, place: Path) -> Path:
        return faults.compile_program(name, kind, place, faults.faults(kind) * has_faults)

    keys = [(*program, False) for program in PROGRAMS]
    keys += dict.fromkeys((name, kind, True) for name, kind, *_ in PLANTED)
    # pytest's folders are not made by two threads at once.
    places = [tmp_path_factory.mktemp(name) for name, *_ in sorted(keys)]
    with ThreadPoolExecutor(2) as pool:
        compiled = [pool.submit(compile_one, *key, place) for key, place in zip(sorted(keys), places, strict=True)]
    return {key: one.result() for key, one in zip(sorted(keys), compiled, strict=True)}


def run(kind: str, program: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [*build.launcher(kind), str(program), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize(("name", "kind"), PROGRAMS)
def test_nothing_is_found(programs, name, kind):
    done = run(kind, programs[name, kind, False])
    assert (done.returncode, done.stdout, done.stderr) == (0, "right\n", "")


@pytest.mark.parametrize(("name", "kind", "fault", "arguments"), PLANTED)
def test_a_planted_fault_is_seen(programs, name, kind, fault, arguments):
    done = run(kind, programs[name, kind, True], *arguments)
    assert faults.TRIGGERS[kind][fault].report in done.stderr


@pytest.mark.parametrize("kind", build.KINDS)
def test_the_text_that_each_fault_replaces_is_there(tmp_path, kind):
    sources = build.copy(["csrc"], tmp_path / "sources")
    build.plant(faults.faults(kind), sources)
    with pytest.raises(RuntimeError, match="plant this fault elsewhere"):
        build.plant([build.Fault("csrc/cpu/threads.cpp", "no such text", "")], sources)
