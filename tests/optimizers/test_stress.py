"""A long run beside its steps: threads, memory over many steps, fork, interrupts, failing evaluations, exit.

Each program that may hang or change its process has a process of its own, with a limit on its time.
Long run: FUSED_ADAM_STRESS_STEPS=100000 pytest -n0 tests/optimizers/test_stress.py -k memory
"""

from __future__ import annotations

import gc
import os
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import mlx_fused_adam as fused
from optimizers.stress_programs import OPTIONS, draw
from support.arrays import all_bits, assert_same_bits
from support.mlx_release import errors_in_tasks_are_raised
from support.processes import output_of_python, run_python

PROGRAMS = Path(__file__).with_name("stress_programs.py")
STEPS = int(os.environ.get("FUSED_ADAM_STRESS_STEPS", "2000"))
LIMIT = 240  # seconds, for what takes a few


def run(program: str, *arguments: str, limit: float = LIMIT) -> str:
    """The output of stress_programs.py for this name, in a process of its own."""
    return output_of_python(PROGRAMS, program, *arguments, timeout=limit)


# ---- Threads ----


@pytest.mark.parametrize("stream", ["new", "thread-local", "default"])
def test_threads_with_a_stream_each_get_what_one_thread_gets(device, is_emulated, stream):
    """All options at once, with tensors that are large enough to ask for the shared helpers."""
    side, steps = (20, 2) if is_emulated else (260, 4)
    shapes = {"matrix": (side, 2 * side), "bias": (side,), "codes": (128, 33), "scalar": ()}
    kind = mx.default_device().type
    shared = mx.new_thread_local_stream(kind) if stream == "thread-local" else None

    def train(seed: int, name: str) -> dict:
        dtype, options = OPTIONS[name]
        parameters = draw(seed, dtype, shapes)
        optimizer = fused.AdamW(1e-2, bias_correction=True, seed=seed, **options)
        for step in range(steps):
            gradients = draw(1000 * seed + step, dtype, shapes)
            turned = draw(1000 * seed + step, dtype, {"t": shapes["matrix"][::-1]})["t"].T
            parameters = optimizer.apply_gradients(gradients | {"matrix": turned}, parameters)
            if step % 2:
                mx.eval(parameters, optimizer.state)
            else:
                mx.async_eval(parameters, optimizer.state)
        return all_bits([parameters, optimizer.state])

    jobs = [(seed, name) for seed, name in enumerate([*OPTIONS] * (1 if is_emulated else 2))]
    expected = [train(*job) for job in jobs]
    found: dict[int, Any] = {}
    start = threading.Barrier(len(jobs))

    def work(i: int) -> None:
        try:
            mx.set_default_device(mx.Device(kind))
            start.wait()
            own = mx.new_stream(kind) if stream == "new" else shared
            if own is None:
                found[i] = train(*jobs[i])
            else:
                with mx.stream(own):
                    found[i] = train(*jobs[i])
        except BaseException as error:
            found[i] = error

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(jobs))]
    before = fused.num_threads()
    try:
        for thread in threads:
            thread.start()
        for count in (1, 4, 2, 3) * 10:  # meanwhile
            fused.set_num_threads(count)
        for thread in threads:
            thread.join(LIMIT)
    finally:
        fused.set_num_threads(before)
    for i, (seed, name) in enumerate(jobs):
        if isinstance(found.get(i), BaseException):
            raise found[i]
        assert i in found, f"thread {i} hangs"
        assert_same_bits(found[i], expected[i], f"{name}, thread {seed}: ")


# ---- Memory ----


@pytest.mark.cpu_only
@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("compiled", ["eager", "compiled"])
def test_memory_is_flat_over_many_steps(compiled, name):
    """MLX's active memory, and the process's own: resident, threads, open files."""
    told_all = run("memory", compiled, name, str(STEPS), limit=LIMIT + STEPS / 100)
    for told in told_all.splitlines():
        what, grown, allowed = told.split()
        assert int(grown) <= int(allowed), f"{what} has grown by {grown} in {STEPS} steps"


def test_dropped_optimizers_leave_nothing(device):
    """With steps that are lazy, queued or done; and in a cycle, which only the collector finds."""

    class Run:
        def __init__(self, i: int) -> None:
            self.me = self
            self.parameters = {"w": mx.ones((64, 70)), "b": mx.ones(5)}
            self.optimizer = fused.AdamW(1e-2, state_dtype=(None, "int8")[i % 2])
            for _ in range(3):
                gradients = {k: x * 0.5 for k, x in self.parameters.items()}
                self.parameters = self.optimizer.apply_gradients(gradients, self.parameters)
            if i % 3:
                (mx.async_eval, mx.eval)[i % 3 - 1](self.parameters, self.optimizer.state)

    def some(count: int) -> list[weakref.ref]:
        return [weakref.ref(Run(i)) for i in range(count)]

    some(12)
    gc.collect()
    mx.synchronize()
    before = mx.get_active_memory()
    dropped = some(60)
    gc.collect()
    mx.synchronize()
    assert all(reference() is None for reference in dropped)
    assert mx.get_active_memory() <= before + (1 << 12)


# ---- Fork ----


@pytest.mark.cpu_only
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("child", ["leaves", "drops all", "reads", "trains on a stream of its own"])
def test_a_forked_child_of_a_run_comes_to_an_end(child):
    assert "parent right" in run("fork", child)


@pytest.mark.cpu_only
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_data_loaders_may_fork_while_steps_are_in_flight():
    assert "right" in run("loaders")


# ---- What goes wrong inside an evaluation ----


@pytest.mark.parametrize(
    "how",
    [pytest.param("a task that throws", marks=errors_in_tasks_are_raised), "layout of codes"],
)
def test_a_failing_evaluation_neither_hangs_nor_spoils_what_is_held(process_device, how):
    assert "right" in run("fails", process_device, how)


@pytest.mark.cpu_only
def test_buffers_that_there_is_no_memory_for_are_an_error(process_device):
    assert "right" in run("too_large", process_device)


def test_an_interrupt_between_any_two_lines_is_no_step(device):
    """KeyboardInterrupt, raised at each line of the package in turn: the state is that of before, all of it."""
    package = str(Path(fused.__file__).parent)
    shapes = {"a": (5, 7), "b": (3,), "c": (2, 2)}

    def interrupted(at: int, options: dict[str, Any]) -> bool:
        """Whether there is such a line."""
        lines = 0

        def trace(frame: Any, event: str, argument: Any) -> Any:
            nonlocal lines
            if not frame.f_code.co_filename.startswith(package):
                return None
            if event == "line":
                lines += 1
                if lines == at:
                    raise KeyboardInterrupt
            return trace

        parameters, gradients = draw(0, shapes=shapes), draw(1, shapes=shapes)
        optimizer = fused.AdamW(1e-2, **options)
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
        before = dict(tree_flatten(optimizer.state))
        sys.settrace(trace)
        try:
            optimizer.apply_gradients(gradients, parameters)
        except KeyboardInterrupt:
            sys.settrace(None)
            after = dict(tree_flatten(optimizer.state))
            assert after.keys() == before.keys()
            changed = [path for path, x in after.items() if x is not before[path]]
            assert not changed, f"an interrupt at line {at} of a step left {changed} changed"
            return True
        finally:
            sys.settrace(None)
        return False

    for options in ({}, {"max_grad_norm": 1.0, "skip_nonfinite": True}):
        at = 1
        while interrupted(at, options):
            at += 1
        assert at > 50


@pytest.mark.cpu_only
def test_interrupts_by_the_clock(process_device):
    """Ctrl-C at random instants of a loop, mx.eval included: it arrives, nothing hangs, each step is whole or was
    not.
    """
    assert "right" in run("interrupts", process_device)


# ---- The end of the process ----


@pytest.mark.cpu_only  # the emulator's own tables are gone at exit while its kernels run
@pytest.mark.parametrize("how", ["return", "sys.exit", "exception"])
def test_a_process_that_has_updated_ends_as_it_was_told(process_device, how):
    done = run_python(PROGRAMS, "ends", process_device, how, timeout=LIMIT)
    expected = {"sys.exit": 3, "exception": 1}.get(how, 0)
    assert done.returncode == expected, f"{done.returncode}\n{done.stdout}{done.stderr}"
    assert "updated" in done.stdout
