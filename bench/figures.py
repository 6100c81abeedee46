"""Figures of one case of a run, derived from what compare.py measured: the goals, tables, pictures and README ask here.

Like is compared with like: eager with eager, compiled with compiled, torch and the probe with eager.
"""

from collections.abc import Callable
from typing import Any

from .names import FORWARD_BACKWARD, OURS, OURS_COMPILED, PROBE, STOCK, STOCK_COMPILED, TORCH

Case = dict[str, Any]
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


def update_share(case: Case, contender: str) -> float | None:
    """The part of a compiled training step that is not forward and backward."""
    rest = ratio(FORWARD_BACKWARD, contender)(case)
    return None if rest is None else 1 - rest


def extra_bytes(case: Case) -> float | None:
    """What a step of ours allocates at its peak, per parameter; the worse of eager and compiled."""
    both = [figure(case, name, "peak_extra_bytes_per_parameter") for name in (OURS, OURS_COMPILED)]
    return max((x for x in both if x is not None), default=None)


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
