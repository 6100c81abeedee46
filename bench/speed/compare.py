"""Compares the implementations on one case: checks each one's step, times those that are correct, counts their
memory.
"""

import gc
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import mlx.core as mx

from mlx_fused_adam._tools.timing import Timing, measure

from ..tables import names
from .cases import DTYPES, Case
from .copy_bandwidth import PIECE_BYTES, CopyBandwidth
from .implementations import PLAIN, make_implementations
from .problem import Incorrect, Problem, check_step
from .training import TrainingStep

# Copies of a case's parameters that are alive at once. Update: four of MLX's, four of torch's, two of fused in another
# dtype, and what mlx.optimizers makes before it releases the old ones. Training step: three of each of MLX's
# implementations, one of forward and backward, four of the problem's, and a step's own. Memory alone: one
# implementation's at a time, compiled mlx.optimizers' at the worst.
COPIES_AT_ONCE = 14
COPIES_AT_ONCE_IN_TRAINING = 22
COPIES_AT_ONCE_UNTIMED = 8
BYTES_OF_AN_OPTION = 8  # per parameter: at most, in the mean of those that take part


def memory_needed(case: Case) -> int:
    """Bytes."""
    copies = COPIES_AT_ONCE_IN_TRAINING if case.task else COPIES_AT_ONCE
    if not case.is_timed:
        return COPIES_AT_ONCE_UNTIMED * case.size * DTYPES[case.dtype].size
    each = copies * DTYPES[case.dtype].size + BYTES_OF_AN_OPTION * len(case.options)
    return each * case.size + PIECE_BYTES


def run_case(
    case: Case,
    device: str,
    seconds: float,
    fewest_rounds: int,
    on_progress: Callable[[str, float], None] = lambda doing, fraction: None,
) -> dict[str, dict[str, Any]]:
    """The results of all implementations."""
    mx.clear_cache()
    on_progress("making tensors", 0)
    problem = case.problem()
    if case.task:
        makers = _training_steps(case, problem)
    else:
        threads = case.threads if device == "cpu" else ()
        makers = make_implementations(problem, device, case.options, threads)

    results: dict[str, dict[str, Any]] = {}
    traffic: dict[str, int] = {}
    steps: dict[str, Callable[[], object]] = {}
    for name, make in makers.items():
        on_progress(f"checking {name}", 0)
        results[name], extra_bytes, implementation = _checked(make)
        if implementation is None:
            problem.restore()
            continue
        steps[name] = implementation.step
        if case.task:
            implementation.forget_gradients()
            continue
        # Reads of gradient, parameter and state, and writes of the latter two.
        traffic[name] = problem.gradient_bytes + 2 * implementation.stored_bytes
        results[name]["stored_bytes_per_parameter"] = implementation.stored_bytes / problem.size
        if name != names.TORCH:  # which keeps no such count
            resident = problem.gradient_bytes + implementation.stored_bytes
            results[name]["peak_extra_bytes_per_parameter"] = extra_bytes / problem.size
            results[name]["peak_bytes"] = resident + extra_bytes
    if case.task:
        steps[names.FORWARD_BACKWARD] = TrainingStep(case.task, None, True, problem).step
    elif steps:
        traffic[names.COPY] = traffic.get(names.FUSED, max(traffic.values()))
        steps[names.COPY] = CopyBandwidth(traffic[names.COPY], device).step

    if steps:
        timings = measure(steps, seconds, fewest_rounds, lambda done: on_progress("timing", done))
        for name, timing in timings.items():
            results.setdefault(name, {}).update(_metrics(timing, traffic.get(name)))
    del steps, makers, problem
    gc.collect()
    return results


def _training_steps(case: Case, problem: Problem) -> dict[str, Callable[[], Any]]:
    return {
        name: lambda kind=kind, compiled=compiled: TrainingStep(case.task, kind, compiled, problem)
        for name, (kind, compiled) in PLAIN.items()
    }


def _checked(make: Callable[[], Any]) -> tuple[dict[str, Any], int, Any]:
    """The results so far, the step's extra bytes, and the implementation, or None if its step is wrong.

    One with a compiled twin, which is not timed, is checked with it: the worse of both counts.
    """
    extra_bytes = 0

    def count_memory(step: Callable[[], object]) -> None:
        nonlocal extra_bytes
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        step()
        extra_bytes = max(extra_bytes, mx.get_peak_memory() - before)

    try:
        implementation = make()
        error = check_step(implementation, count_memory)
        if make_compiled := getattr(implementation, "make_compiled", None):
            error = max(error, check_step(make_compiled(), count_memory))
    except (Incorrect, RuntimeError, ValueError) as reason:
        return {"rejected": f"{type(reason).__name__}: {reason}"}, 0, None
    return {"error_over_tolerance": error}, extra_bytes, implementation


def _metrics(timing: Timing, traffic_bytes: int | None) -> dict[str, Any]:
    found = {f"{name}_s" if name != "samples" else name: x for name, x in asdict(timing).items()}
    if traffic_bytes:
        found["GB_per_s"] = traffic_bytes / timing.median / 1e9
    return found
