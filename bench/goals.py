"""The goals that the project set itself, each with what a run measured. `report.py` prints them.

Like is compared with like: eager with eager, compiled with compiled, torch with eager.
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from contenders import (
    FUSED,
    FUSED_COMPILED,
    PROBE_16_BIT,
    SPEED_OF_LIGHT,
    STOCK,
    STOCK_COMPILED,
    TORCH,
)

LARGE = 4_000_000  # elements from which a buffer outgrows the caches
NOTHING = 0.01  # bytes per parameter; a step's scalars are a few bytes in all

Case = dict[str, Any]
Measure = Callable[[Case], float | None]


@dataclass(frozen=True)
class Goal:
    name: str
    sign: str  # ">=" or "<="
    target: float
    measured: float
    worst_case: str

    @property
    def met(self) -> bool:
        return self.measured >= self.target if self.sign == ">=" else self.measured <= self.target

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"met": self.met}


def ratio(slower: str, faster: str) -> Measure:
    """How many times longer the one takes than the other; None where either is missing."""

    def of(case: Case) -> float | None:
        medians = [case["contenders"].get(name, {}).get("median_s") for name in (slower, faster)]
        return medians[0] / medians[1] if all(medians) else None

    return of


def extra_bytes(case: Case) -> float | None:
    both = [
        case["contenders"].get(name, {}).get("peak_extra_bytes_per_parameter")
        for name in (FUSED, FUSED_COMPILED)
    ]
    return max((x for x in both if x is not None), default=None)


def over_row_major(case: Case, cases: list[Case]) -> float | None:
    """The time with a column-major gradient over that of the same case with a row-major one."""
    alike = ("suite", "case", "dtype")
    for other in cases:
        if other["gradient_layout"] == "row-major" and all(other[k] == case[k] for k in alike):
            medians = [c["contenders"].get(FUSED, {}).get("median_s") for c in (case, other)]
            return medians[0] / medians[1] if all(medians) else None
    return None


def goals(cases: Iterable[Case]) -> list[Goal]:
    """Each goal that the cases of a run can answer, with the case that does worst."""
    updates = [case for case in cases if not case["is_training_step"]]
    many = [case for case in updates if case["suite"] == "many"]
    buffers = [case for case in updates if case["suite"] == "buffers"]
    large = [case for case in updates if case["parameters"] >= LARGE]
    found: list[Goal] = []

    def add(
        name: str, among: list[Case], measure: Measure, target: float, at_most: bool = False
    ) -> None:
        values = [(x, case["title"]) for case in among if (x := measure(case)) is not None]
        if values:
            worst, sign = (max(values), "<=") if at_most else (min(values), ">=")
            found.append(Goal(name, sign, target, *worst))

    for layout in ("row-major", "column-major"):
        among = [c for c in buffers if c in large and c["gradient_layout"] == layout]
        fp32 = [case for case in among if case["dtype"] == "float32"]
        half = [case for case in among if case["dtype"] != "float32"]
        of_light = ratio(SPEED_OF_LIGHT, FUSED)
        add(f"of the speed of light, fp32 buffers ≥ 4M, {layout}", fp32, of_light, 0.95)
        add(f"of the speed of light, 16-bit buffers ≥ 4M, {layout}", half, of_light, 0.85)
        of_probe = ratio(PROBE_16_BIT, FUSED)
        add(f"of the 16-bit probe's speed, buffers ≥ 4M, {layout}", half, of_probe, 0.85)

    add("times torch's speed, every update", updates, ratio(TORCH, FUSED), 1.0)
    add("times torch's speed, many", many, ratio(TORCH, FUSED), 1.5)

    dtypes = ("float32", "bfloat16")
    at_16m = [c for c in buffers if c["case"] == "4096×4096" and c["dtype"] in dtypes]
    compiled = ratio(STOCK_COMPILED, FUSED_COMPILED)
    add("times stock's speed, 16M fp32 and bf16", at_16m, ratio(STOCK, FUSED), 10.0)
    add("times stock's speed, 16M fp32 and bf16, compiled", at_16m, compiled, 10.0)
    add("times stock's speed, many", many, ratio(STOCK, FUSED), 8.0)
    add("times stock's speed, many, compiled", many, compiled, 3.0)

    transposed = [
        c for c in at_16m if c["dtype"] == "float32" and c["gradient_layout"] == "column-major"
    ]
    add(
        "column-major over row-major time, 4096×4096 fp32",
        transposed,
        lambda case: over_row_major(case, at_16m),
        1.15,
        at_most=True,
    )
    name = "peak extra bytes per parameter, eager and compiled"
    add(name, large, extra_bytes, NOTHING, at_most=True)
    return found
