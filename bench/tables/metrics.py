"""Figures of one case of a run, derived from what compare.py measured: the goals, tables, pictures and README ask here.

Like is compared with like: eager with eager, compiled with compiled, torch and the probe with eager.
"""

from collections.abc import Callable
from typing import Any

from .names import FORWARD_BACKWARD, OURS, OURS_COMPILED, PROBE, STOCK, STOCK_COMPILED, TORCH
from .options import OPTIONS

Case = dict[str, Any]
WHOLE_SETS = ("models", "lora", "many")  # the suites whose cases are sets of parameters
Measure = Callable[[Case], float | None]


def figure(case: Case, contender: str, key: str) -> float | None:
    """None where the contender is missing, was refused, or has no such figure."""
    return case["contenders"].get(contender, {}).get(key)


def seconds(case: Case, contender: str) -> float | None:
    return figure(case, contender, "median_s")


def ratio(numerator: str, denominator: str, key: str = "median_s") -> Measure:
    """The one contender's figure over the other's; None where either is missing."""

    def of(case: Case) -> float | None:
        above, below = figure(case, numerator, key), figure(case, denominator, key)
        return None if above is None or not below else above / below

    return of


# How many times faster ours is; below 1, slower.
TIMES_STOCK = ratio(STOCK, OURS)
TIMES_STOCK_COMPILED = ratio(STOCK_COMPILED, OURS_COMPILED)
TIMES_TORCH = ratio(TORCH, OURS)
OF_PROBE = ratio(PROBE, OURS)

# Ours over stock's.
PEAK_OVER_STOCK = ratio(OURS, STOCK, "peak_bytes")
PEAK_OVER_STOCK_COMPILED = ratio(OURS_COMPILED, STOCK_COMPILED, "peak_bytes")


def of_probe(contender: str) -> Measure:
    """The contender's bytes per second, of its own traffic, over the probe's."""
    return ratio(contender, PROBE, "GB_per_s")


def update_share(case: Case, contender: str) -> float | None:
    """The part of a compiled training step that is not forward and backward."""
    rest = ratio(FORWARD_BACKWARD, contender)(case)
    return None if rest is None else 1 - rest


def extra_bytes(case: Case) -> float | None:
    """What a step of ours allocates at its peak, per parameter; the worse of eager and compiled."""
    both = [figure(case, name, "peak_extra_bytes_per_parameter") for name in (OURS, OURS_COMPILED)]
    return max((x for x in both if x is not None), default=None)


def options_of(case: Case) -> list[str]:
    """Those of ours with options that took part."""
    return [name for name in case["contenders"] if name in OPTIONS]


def extra_bytes_of_options(case: Case) -> float | None:
    """What a step allocates at its peak, in all; the worst of the options, eager and compiled."""
    key = "peak_extra_bytes_per_parameter"
    all_of_them = [figure(case, name, key) for name in options_of(case)]
    most = max((x for x in all_of_them if x is not None), default=None)
    return None if most is None else most * case["parameters"]


def over_float32(contender: str, cases: list[Case]) -> Measure:
    """How many times as fast the contender is as our plain step of as many float32 parameters."""

    def of(case: Case) -> float | None:
        alike = ("suite", "case", "gradient_layout")
        twin = next(
            (x for x in cases if x["dtype"] == "float32" and all(x[k] == case[k] for k in alike)),
            None,
        )
        mine, its = seconds(case, contender), twin and seconds(twin, OURS)
        return its / mine if mine and its else None

    return of


def fewest_samples(case: Case) -> int | None:
    return min((x["samples"] for x in case["contenders"].values() if "samples" in x), default=None)


def same_but_row_major(case: Case, cases: list[Case]) -> Case | None:
    """The row-major twin of a column-major case."""
    alike = ("suite", "case", "dtype")
    return next(
        (
            other
            for other in cases
            if other["gradient_layout"] == "row-major" and all(other[k] == case[k] for k in alike)
        ),
        None,
    )


def over_row_major(case: Case, cases: list[Case]) -> float | None:
    """Our time with a column-major gradient over that of the same case with a row-major one."""
    other = same_but_row_major(case, cases)
    mine, its = seconds(case, OURS), other and seconds(other, OURS)
    return mine / its if mine and its else None
