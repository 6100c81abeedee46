"""Runs one case: builds its tensors, checks the contenders, times those that are right."""

import gc
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import mlx.core as mx
import mlx.optimizers as stock
from contenders import (
    FUSED,
    FUSED_COMPILED,
    SPEED_OF_LIGHT,
    STOCK,
    STOCK_COMPILED,
    TORCH,
    make_contenders,
)
from measure import Timing, measure
from problem import Incorrect, Problem, check_step
from suites import Case
from training import TrainingStep

import mlx_fused_adam as fused

FORWARD_BACKWARD = "forward + backward"

# Copies of a case's parameters that are alive at once: four of MLX's, four of torch's, four of the
# probe's, and what stock makes before it lets go of the old.
COPIES_AT_ONCE = 16


def memory_needed(case: Case) -> int:
    return COPIES_AT_ONCE * case.size * (4 if case.dtype == "float32" else 2)


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
    on_progress("making tensors", 0)
    problem = case.problem()
    if case.task:
        makers = _training_steps(case, problem)
    else:
        makers = make_contenders(problem, device, bias_correction)

    results: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], object]] = {}
    for name, make in makers.items():
        on_progress(f"checking {name}", 0)
        # torch keeps no such count, and a whole training step's peak is its activations.
        counts_memory = name != TORCH and not case.task
        results[name], contender = _checked(make, problem.size, counts_memory)
        if contender:
            steps[name] = contender.step
        else:
            problem.restore()
    if case.task:
        steps[FORWARD_BACKWARD] = TrainingStep(case.task, None, True, problem).step

    if steps:
        timings = measure(steps, seconds, fewest_rounds, lambda done: on_progress("timing", done))
        for name, timing in timings.items():
            results.setdefault(name, {}).update(_figures(timing, None if case.task else problem))
        if not case.task:
            _add_ratios(results, SPEED_OF_LIGHT, "of_speed_of_light")
        _add_ratios(results, FUSED, "time_over_fused", inverse=True)
        _add_ratios(results, FUSED_COMPILED, "time_over_fused_compiled", inverse=True)
        if case.task:
            _add_shares(results)
    del steps, makers, problem
    gc.collect()
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
    kinds = {
        FUSED: (fused.Adam, False),
        FUSED_COMPILED: (fused.Adam, True),
        STOCK: (stock.Adam, False),
        STOCK_COMPILED: (stock.Adam, True),
    }
    return {
        name: lambda kind=kind, compiled=compiled: TrainingStep(case.task, kind, compiled, problem)
        for name, (kind, compiled) in kinds.items()
    }


def _checked(make: Callable[[], Any], size: int, counts_memory: bool) -> tuple[dict[str, Any], Any]:
    """The contender if its first step is right, else None; and what is known of it so far."""
    extra_bytes = None

    def with_memory(step: Callable[[], object]) -> None:
        nonlocal extra_bytes
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        step()
        extra_bytes = mx.get_peak_memory() - before

    try:
        contender = make()
        error = check_step(contender, with_memory)
    except (Incorrect, RuntimeError, ValueError) as reason:
        return {"refused": f"{type(reason).__name__}: {reason}"}, None
    result: dict[str, Any] = {"error_over_tolerance": error}
    if counts_memory:
        result["peak_extra_bytes_per_parameter"] = extra_bytes / size
    return result, contender


def _figures(timing: Timing, problem: Problem | None) -> dict[str, Any]:
    figures = {f"{name}_s" if name != "samples" else name: x for name, x in asdict(timing).items()}
    if problem:
        figures["GB_per_s"] = problem.traffic_bytes / timing.median / 1e9
    return figures


def _add_ratios(results: dict, reference: str, key: str, inverse: bool = False) -> None:
    base = results.get(reference, {}).get("median_s")
    if base is None:
        return
    for result in results.values():
        if "median_s" in result:
            ratio = base / result["median_s"]
            result[key] = 1 / ratio if inverse else ratio


def _add_shares(results: dict) -> None:
    """The part of a training step that is not forward and backward."""
    base = results[FORWARD_BACKWARD]["median_s"]
    for name in (FUSED_COMPILED, STOCK_COMPILED):
        if "median_s" in results.get(name, {}):
            results[name]["update_share"] = 1 - base / results[name]["median_s"]
