"""Metrics of one case, derived from its results (the JSON of bench/run.py). Tables and plots ask here.

Like is compared with like: eager with eager, compiled with compiled; torch and the copy with eager.
"""

from collections.abc import Callable
from typing import Any

from .names import COPY, FORWARD_BACKWARD, FUSED, FUSED_COMPILED, MLX, MLX_COMPILED, OPTIONS, TORCH

Case = dict[str, Any]
Metric = Callable[[Case], float | None]

WHOLE_SETS = ("models", "lora", "many")  # the suites whose cases are sets of parameters
EXTRA_BYTES = "peak_extra_bytes_per_parameter"


def measured(case: Case, implementation: str, key: str = "median_s") -> float | None:
    """None where the implementation is missing, was rejected, or has no such result."""
    return case["implementations"].get(implementation, {}).get(key)


def ratio(numerator: str, denominator: str, key: str = "median_s") -> Metric:
    """One implementation's result over another's; None where either is missing."""

    def of(case: Case) -> float | None:
        above, below = measured(case, numerator, key), measured(case, denominator, key)
        return None if above is None or not below else above / below

    return of


# How many times faster fused is; below 1, slower.
TIMES_MLX = ratio(MLX, FUSED)
TIMES_MLX_COMPILED = ratio(MLX_COMPILED, FUSED_COMPILED)
TIMES_TORCH = ratio(TORCH, FUSED)


def of_copy(implementation: str) -> Metric:
    """The implementation's bytes per second, of its own traffic, over those of a plain copy."""
    return ratio(implementation, COPY, "GB_per_s")


def update_share(case: Case, implementation: str) -> float | None:
    """The part of a compiled training step that is not forward and backward."""
    rest = ratio(FORWARD_BACKWARD, implementation)(case)
    return None if rest is None else 1 - rest


def extra_bytes(case: Case) -> float | None:
    """Bytes that a fused step allocates at its peak, per parameter; the larger of eager and compiled."""
    both = [measured(case, name, EXTRA_BYTES) for name in (FUSED, FUSED_COMPILED)]
    return max((x for x in both if x is not None), default=None)


def options_of(case: Case) -> list[str]:
    """The options of fused that took part."""
    return [name for name in case["implementations"] if name in OPTIONS]


def fewest_samples(case: Case) -> int | None:
    samples = (x["samples"] for x in case["implementations"].values() if "samples" in x)
    return min(samples, default=None)


def over_row_major(cases: list[Case]) -> Metric:
    """The fused time with a column-major gradient over that of the same case with a row-major one."""
    alike = ("suite", "case", "dtype")
    row_major = {
        tuple(case[k] for k in alike): measured(case, FUSED) for case in cases if case["gradient_layout"] == "row-major"
    }

    def of(case: Case) -> float | None:
        mine, other = measured(case, FUSED), row_major.get(tuple(case[k] for k in alike))
        is_transposed = case["gradient_layout"] == "column-major"
        return mine / other if is_transposed and mine and other else None

    return of
