"""Programs of test_stress.py that may hang, or change the process that they run in.

Run: python stress_programs.py NAME [ARGUMENTS…], as the functions below say.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import mlx_fused_adam as fused

sys.path.insert(0, str(Path(__file__).parents[1]))
from support import training  # noqa: E402
from support.arrays import all_bits, assert_same_bits, random  # noqa: E402

SHAPES = {"a": (300, 200), "b": (64, 70), "c": (7,), "d": ()}


# The dtype of parameters, and an optimizer's arguments.
OPTIONS: dict[str, tuple[mx.Dtype, dict[str, Any]]] = {
    "float32": (mx.float32, {}),
    "bfloat16": (mx.bfloat16, {"stochastic_rounding": True}),
    "int8": (mx.float32, {"state_dtype": "int8"}),
    "master": (mx.bfloat16, {"state_dtype": "int8", "master_weights": True}),
    "guarded": (mx.float32, {"max_grad_norm": 1.0, "skip_nonfinite": True}),
}


def draw(seed: int, dtype: mx.Dtype = mx.float32, shapes: dict = SHAPES) -> dict[str, mx.array]:
    rng = np.random.default_rng(seed)
    return {k: random(rng, s, dtype) for k, s in shapes.items()}


def train(optimizer: Any, parameters: dict, seeds: Any) -> dict[str, mx.array]:
    return training.train(optimizer, parameters, map(draw, seeds))


def memory(compiled: str, name: str, steps: str) -> None:
    """Prints what has grown over so many steps, by how much, and how much may."""
    faulthandler.dump_traceback_later(200 + int(steps) / 100, exit=True)
    mx.set_default_device(mx.cpu)
    dtype, options = OPTIONS[name]
    shapes = {"a": (128, 33), "b": (40, 30), "c": (7,)}
    parameters = draw(0, dtype, shapes)
    optimizer = fused.AdamW(1e-3, bias_correction=True, **options)
    optimizer.init(parameters)
    captured = [parameters, optimizer.state]
    make_step = training.compiled if compiled == "compiled" else training.eager
    step = make_step(optimizer, parameters)
    # Row-major, column-major, and one that is not a number now and then.
    ready = [draw(i, dtype, shapes) for i in range(3)]
    ready[1]["a"] = mx.contiguous(ready[1]["a"].T).T
    ready[2]["c"] = ready[2]["c"] * float("nan" if options.get("skip_nonfinite") else "1")
    mx.eval(ready)

    def run(count: int) -> None:
        for i in range(count):
            step(ready[i % 3])
            (mx.async_eval if i % 4 == 1 else mx.eval)(captured)
        mx.eval(captured)
        mx.synchronize()

    def sizes() -> dict[str, int]:
        resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        return {
            "active": mx.get_active_memory(),
            "cache": mx.get_cache_memory(),
            "resident": resident,
            "threads": len(os.listdir("/proc/self/task")),
            "files": len(os.listdir("/proc/self/fd")),
        }

    run(500)
    before = sizes()
    run(int(steps))
    allowed = {"active": 1 << 12, "cache": 1 << 16, "resident": 1 << 20, "threads": 0, "files": 0}
    for what, size in sizes().items():
        print(what, size - before[what], allowed[what])


def fork(child: str) -> None:
    """A child after the parent has trained, with helper threads. On a stream that it inherits, MLX itself hangs."""
    mx.set_default_device(mx.cpu)
    fused.set_num_threads(4)
    optimizer, other = fused.AdamW(1e-2), fused.AdamW(1e-2)
    parameters = train(optimizer, draw(0), range(1, 4))
    expected = train(other, draw(0), range(1, 7))
    read = {k: np.array(x) for k, x in parameters.items()}  # a child must not ask MLX for its bits
    faulthandler.cancel_dump_traceback_later()  # whose own thread a child has not
    process = os.fork()
    if process == 0:
        signal.alarm(60)
        if child == "drops all":
            del parameters, optimizer, other, expected
        elif child == "reads":
            for k, x in parameters.items():
                np.testing.assert_array_equal(np.array(x), read[k])
        elif child.startswith("trains"):
            with mx.stream(mx.new_stream(mx.cpu)):
                assert_same_bits(train(optimizer, parameters, range(4, 7)), expected)
        sys.exit(7)  # by way of everything that Python does at exit
    faulthandler.dump_traceback_later(200, exit=True)
    _, status = os.waitpid(process, 0)
    assert os.waitstatus_to_exitcode(status) == 7, status
    assert_same_bits(train(optimizer, parameters, range(4, 7)), expected)
    print("parent right")


def load(seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {k: rng.normal(size=s).astype(np.float32) for k, s in SHAPES.items()}


def loaders() -> None:
    """A pool of forked processes, as data loaders start them, again and again between and during steps."""
    import multiprocessing

    mx.set_default_device(mx.cpu)
    fused.set_num_threads(4)
    optimizer, parameters = fused.AdamW(1e-2), draw(0)
    faulthandler.cancel_dump_traceback_later()
    signal.alarm(200)
    for epoch in range(8):
        with multiprocessing.get_context("fork").Pool(2) as pool:
            for batch in pool.imap(load, range(4 * epoch, 4 * epoch + 4)):
                gradients = {k: mx.array(x) for k, x in batch.items()}
                parameters = optimizer.apply_gradients(gradients, parameters)
                mx.async_eval(parameters, optimizer.state)
    other = fused.AdamW(1e-2)
    assert_same_bits(parameters, train(other, draw(0), range(32)))
    assert_same_bits(optimizer.state, other.state)
    print("right")


def fails(device: str, how: str) -> None:
    """An evaluation that throws, again and again; then what was held goes on as if nothing had been."""
    mx.set_default_device({"cpu": mx.cpu, "gpu": mx.gpu}[device])
    options = {"state_dtype": "int8"} if how == "layout of codes" else {}
    reference = fused.AdamW(1e-2, **options)
    start = train(reference, draw(0), [1])
    optimizer = fused.AdamW(1e-2, **options)
    parameters = train(optimizer, draw(0), [1])
    for attempt in range(5):
        held = [dict(parameters), {k: dict(optimizer.state[k]) for k in SHAPES}]
        scalars = {k: optimizer.state[k] for k in ("step", "learning_rate")}
        before = all_bits(held)
        if how == "a task that throws":
            gradients = draw(2)
            singular = mx.linalg.inv(mx.zeros((2, 2)) * attempt, stream=mx.cpu)
            gradients["b"] = gradients["b"] + singular[0, 0]
            new = optimizer.apply_gradients(gradients, parameters)
        else:
            new = dict(parameters)
            step = training.compiled(optimizer, new)
            # Queued, so that nothing can look at its layout; and not row-major.
            state = optimizer.state["b"]
            state["m"] = mx.contiguous(state["m"].T).T
            mx.eval(state["m"])
            step(draw(2))
            del step
        failures = 0
        for _ in range(2):  # after a task has thrown, MLX takes its results for evaluated
            try:
                mx.eval(new, optimizer.state)
            except (RuntimeError, ValueError) as error:
                told = str(error)
                assert "row-major" in told or "factorization failed" in told, told
                failures += 1
        assert failures, "the evaluation has not failed"
        del new
        assert_same_bits(held, before)
        parameters, states = held
        for k, state in states.items():
            optimizer.state[k].clear()
            optimizer.state[k].update(state)
        optimizer.state.update(scalars)
    assert_same_bits(train(optimizer, parameters, [3, 4]), train(reference, start, [3, 4]))
    assert_same_bits(optimizer.state, reference.state)
    print("right")


def too_large(device: str) -> None:
    """More than there is memory for, in buffers of the update's own: its inputs are broadcast, and take nothing."""
    mx.set_default_device({"cpu": mx.cpu, "gpu": mx.gpu}[device])
    huge = mx.broadcast_to(mx.array(1.0), (1 << 20, 1 << 20, 64))
    small = mx.ones(3)
    for _ in range(2):
        try:
            mx.eval(fused.adam_update(huge, huge, huge, huge, 0.1))
        except (RuntimeError, ValueError) as error:
            print(error)
        else:
            raise AssertionError("there is memory for 2**48 bytes, three times")
        mx.eval(fused.adam_update(small, small, small, small, 0.1))
    print("right")


def interrupts(device: str) -> None:
    """Each loop stops where Ctrl-C meets it, and the next goes on from there."""
    mx.set_default_device({"cpu": mx.cpu, "gpu": mx.gpu}[device])
    shapes = {str(i): (50, 40) for i in range(20)}
    ones = {k: mx.ones(s) for k, s in shapes.items()}
    expected, reference = {}, fused.Adam(1e-3)
    parameters = {"w": mx.zeros(1)}
    for step in range(1, 4000):
        parameters = reference.apply_gradients({"w": mx.ones(1)}, parameters)
        expected[step] = reference.state["w"]["m"]
    mx.eval(expected)
    expected = {step: x.item() for step, x in expected.items()}

    signal.signal(signal.SIGALRM, signal.default_int_handler)  # as Ctrl-C
    optimizer = fused.Adam(1e-3)
    optimizer.init(ones)
    parameters = {k: mx.zeros(s) for k, s in shapes.items()}
    rng = np.random.default_rng(0)
    arrived = 0
    for _ in range(150):
        with contextlib.suppress(KeyboardInterrupt):
            try:
                signal.setitimer(signal.ITIMER_REAL, rng.uniform(2e-4, 4e-3))
                while optimizer.step.item() < 3900:
                    parameters = optimizer.apply_gradients(ones, parameters)
                    mx.eval(parameters, optimizer.state)
            except KeyboardInterrupt:
                arrived += 1
                raise
        signal.setitimer(signal.ITIMER_REAL, 0)
        mx.eval(parameters, optimizer.state)
        step = optimizer.step.item()
        for k in shapes:
            found = np.unique(np.array(optimizer.state[k]["m"]))
            assert step == 0 or list(found) == [np.float32(expected[step])], (k, step, found)
    assert arrived > 100, arrived
    print("right")


def ends(device: str, how: str) -> None:
    """Helper threads of updates are there when the process ends. (With updates in flight, MLX itself may abort.)"""
    mx.set_default_device({"cpu": mx.cpu, "gpu": mx.gpu}[device])
    fused.set_num_threads(4)
    parameters = {"w": mx.ones((2000, 2000))}
    gradients = {"w": mx.ones((2000, 2000)).T}
    training.train(fused.AdamW(1e-2, state_dtype="int8"), parameters, [gradients] * 10)
    mx.synchronize()
    print("updated", flush=True)
    if how == "sys.exit":
        sys.exit(3)
    if how == "exception":
        raise RuntimeError("the end")


PROGRAMS = {f.__name__: f for f in (memory, fork, loaders, fails, too_large, interrupts, ends)}

if __name__ == "__main__":
    # A program that hangs says where, and ends.
    faulthandler.dump_traceback_later(200, exit=True)
    name, *arguments = sys.argv[1:]
    PROGRAMS[name](*arguments)
