"""Compares the contenders on one case: checks each one's step, times those that are right, counts their memory."""

import gc
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import mlx.core as mx

from mlx_fused_adam._tools.timing import Timing, measure

from .cases import DTYPES, Case
from .contenders import MLX_CONTENDERS, make_contenders
from .memory import memory_of_step
from .names import FORWARD_BACKWARD, TORCH
from .problem import Incorrect, Problem, check_step
from .training import TrainingStep

# Copies of a case's parameters that are alive at once. Update: four of MLX's, four of torch's, four
# of the probe's, two of ours in another dtype, and what stock makes before it lets go of the old.
# Training step: three of each of MLX's contenders, one of forward and backward, four of the
# problem's, and a step's own. Memory alone: one contender's at a time, stock's compiled step at the worst.
COPIES_AT_ONCE = 18
COPIES_AT_ONCE_IN_TRAINING = 22
COPIES_AT_ONCE_UNTIMED = 8
BYTES_OF_AN_OPTION = 8  # per parameter: at most, in the mean of those that take part

# Large models: two steps are enough to see a peak, which does not change from step to step.
WARM_UP_STEPS_UNTIMED = STEPS_UNTIMED = 1


def memory_needed(case: Case) -> int:
    """Bytes."""
    copies = COPIES_AT_ONCE_IN_TRAINING if case.task else COPIES_AT_ONCE
    if not case.is_timed:
        return COPIES_AT_ONCE_UNTIMED * case.size * DTYPES[case.dtype].size
    each = copies * DTYPES[case.dtype].size + BYTES_OF_AN_OPTION * len(case.options)
    return each * case.size


def run_case(
    case: Case,
    device: str,
    bias_correction: bool,
    seconds: float,
    fewest_rounds: int,
    on_progress: Callable[[str, float], None] = lambda doing, fraction: None,
) -> dict[str, Any]:
    """The figures of all contenders, as the JSON file holds them."""
    mx.clear_cache()
    if not case.is_timed:
        return _described(case, _memory_figures(case, device, on_progress))
    on_progress("making tensors", 0)
    problem = case.problem()
    if case.task:
        makers = _training_steps(case, problem)
    else:
        threads = case.threads if device == "cpu" else ()
        makers = make_contenders(problem, device, bias_correction, case.options, threads)

    results: dict[str, dict[str, Any]] = {}
    traffic: dict[str, int] = {}
    steps: dict[str, Callable[[], object]] = {}
    for name, make in makers.items():
        on_progress(f"checking {name}", 0)
        results[name], extra_bytes, contender = _checked(make)
        if contender is None:
            problem.restore()
            continue
        steps[name] = contender.step
        if case.task:
            contender.forget_gradients()
            results[name]["peak_bytes"] = memory_of_step(case.task, name, device).peak
            continue
        # Reads of gradient, parameter and state, and writes of the latter two.
        traffic[name] = problem.gradient_bytes + 2 * contender.stored_bytes
        results[name]["stored_bytes_per_parameter"] = contender.stored_bytes / problem.size
        if name != TORCH:  # which keeps no such count
            resident = problem.gradient_bytes + contender.stored_bytes
            results[name]["peak_extra_bytes_per_parameter"] = extra_bytes / problem.size
            results[name]["peak_bytes"] = resident + extra_bytes
    if case.task:
        steps[FORWARD_BACKWARD] = TrainingStep(case.task, None, True, problem).step

    if steps:
        timings = measure(steps, seconds, fewest_rounds, lambda done: on_progress("timing", done))
        for name, timing in timings.items():
            results.setdefault(name, {}).update(_figures(timing, traffic.get(name)))
    del steps, makers, problem
    gc.collect()
    return _described(case, results)


def _memory_figures(
    case: Case, device: str, on_progress: Callable[[str, float], None]
) -> dict[str, dict[str, Any]]:
    """Peak memory and stored bytes of each contender's whole step."""
    names = [*MLX_CONTENDERS, *case.options]
    results = {}
    for done, name in enumerate(names):
        on_progress(f"training with {name}", done / len(names))
        found = memory_of_step(case.task, name, device, WARM_UP_STEPS_UNTIMED, STEPS_UNTIMED)
        results[name] = {
            "peak_bytes": found.peak,
            "stored_bytes": found.stored,
            "stored_bytes_per_parameter": found.stored / case.size,
        }
    return results


def _described(case: Case, results: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """As the JSON file has a case."""
    return {
        "suite": case.suite,
        "case": case.name,
        "dtype": case.dtype,
        "gradient_layout": case.layout,
        "tensors": len(case.tensors),
        "parameters": case.size,
        "title": case.title,
        "is_training_step": case.task is not None,
        "contenders": results,
    }


def _training_steps(case: Case, problem: Problem) -> dict[str, Callable[[], Any]]:
    return {
        name: lambda kind=kind, compiled=compiled: TrainingStep(case.task, kind, compiled, problem)
        for name, (kind, compiled) in MLX_CONTENDERS.items()
    }


def _checked(make: Callable[[], Any]) -> tuple[dict[str, Any], int, Any]:
    """What is known of the contender, its step's extra bytes, and itself; None for one whose step is wrong.

    One that has a compiled twin, which is not timed, answers for it too: the worse of both counts.
    """
    extra_bytes = 0

    def count_memory(step: Callable[[], object]) -> None:
        nonlocal extra_bytes
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        step()
        extra_bytes = max(extra_bytes, mx.get_peak_memory() - before)

    try:
        contender = make()
        error = check_step(contender, count_memory)
        if make_compiled := getattr(contender, "make_compiled", None):
            error = max(error, check_step(make_compiled(), count_memory))
    except (Incorrect, RuntimeError, ValueError) as reason:
        return {"refused": f"{type(reason).__name__}: {reason}"}, 0, None
    return {"error_over_tolerance": error}, extra_bytes, contender


def _figures(timing: Timing, traffic_bytes: int | None) -> dict[str, Any]:
    figures = {f"{name}_s" if name != "samples" else name: x for name, x in asdict(timing).items()}
    if traffic_bytes:
        figures["GB_per_s"] = traffic_bytes / timing.median / 1e9
    return figures
