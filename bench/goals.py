"""The goals that the project set itself, each with what a run measured. `report.py` prints them."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from .figures import (
    OF_PROBE,
    TIMES_STOCK,
    TIMES_STOCK_COMPILED,
    TIMES_TORCH,
    Case,
    Measure,
    extra_bytes,
    extra_bytes_of_options,
    of_probe,
    over_float32,
    over_row_major,
    ratio,
)
from .names import OURS, PROBE_16_BIT
from .options import GUARDED, INT8_STATE, MASTER

LARGE = 4_000_000  # elements from which a buffer outgrows the caches
NOTHING = 0.01  # bytes per parameter; a step's scalars are a few bytes in all
FEW_BYTES = 512  # in all


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
        add(f"of the probe's speed, fp32 buffers ≥ 4M, {layout}", fp32, OF_PROBE, 0.95)
        add(f"of the probe's speed, 16-bit buffers ≥ 4M, {layout}", half, OF_PROBE, 0.85)
        of_16_bit_probe = ratio(PROBE_16_BIT, OURS)
        add(f"of the 16-bit probe's speed, buffers ≥ 4M, {layout}", half, of_16_bit_probe, 0.85)

    among = [c for c in buffers if c in large and c["gradient_layout"] == "row-major"]
    fp32 = [case for case in among if case["dtype"] == "float32"]
    bf16 = [case for case in among if case["dtype"] == "bfloat16"]
    of_master, int8_speed = of_probe(MASTER), ratio(OURS, INT8_STATE)
    add("of the probe's speed, master weights, buffers ≥ 4M, row-major", bf16, of_master, 0.85)
    add("int8 state, times the fp32 step's speed, fp32 ≥ 4M, row-major", fp32, int8_speed, 1.0)
    against_fp32 = over_float32(INT8_STATE, among)
    add("int8 state, times the fp32 step's speed, bf16 ≥ 4M, row-major", bf16, against_fp32, 1.0)

    add("times torch's speed, every update", updates, TIMES_TORCH, 1.0)
    add("times torch's speed, many", many, TIMES_TORCH, 1.5)

    dtypes = ("float32", "bfloat16")
    at_16m = [c for c in buffers if c["case"] == "4096×4096" and c["dtype"] in dtypes]
    add("times stock's speed, 16M fp32 and bf16", at_16m, TIMES_STOCK, 10.0)
    add("times stock's speed, 16M fp32 and bf16, compiled", at_16m, TIMES_STOCK_COMPILED, 10.0)
    add("times stock's speed, many", many, TIMES_STOCK, 8.0)
    add("times stock's speed, many, compiled", many, TIMES_STOCK_COMPILED, 3.0)

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
    for sides, dtype, most in (("5120×5120", "float32", 1.25), ("4096×4096", "bfloat16", 1.35)):
        squares = [c for c in updates if c["case"] == sides and c["dtype"] == dtype]
        among = [c for c in squares if c["gradient_layout"] == "column-major"]
        name = f"column-major over row-major time, {sides} {dtype}"
        add(name, among, lambda case, squares=squares: over_row_major(case, squares), most, True)

    models = [case for case in updates if case["suite"] == "models"]
    for dtype, least in (("float32", 0.9), ("bfloat16", 1.2)):
        among = [case for case in models if case["dtype"] == dtype]
        add(f"times torch's speed, {dtype} models", among, TIMES_TORCH, least)
    for sides, layout, least in (
        (("1000×1000", "4096×4096"), "row-major", 1.2),
        (("4096×4096",), "column-major", 0.9),
    ):
        half = [c for c in buffers if c["dtype"] == "float16" and c["gradient_layout"] == layout]
        among = [case for case in half if case["case"] in sides]
        add(
            f"times torch's speed, fp16, {' and '.join(sides)}, {layout}", among, TIMES_TORCH, least
        )
    lora = [case for case in updates if case["suite"] == "lora"]
    add("times torch's speed, lora", lora, TIMES_TORCH, 1.0)
    layouts = [case for case in updates if case["suite"] == "layouts"]
    add("times stock's speed, every layout", layouts, TIMES_STOCK, 1.0)
    add("times stock's speed, every layout, compiled", layouts, TIMES_STOCK_COMPILED, 1.0)
    for layout, most in (("row-major", 1.25), ("column-major", 1.35)):
        name = f"clipping and guard, over the plain step's time, 16M fp32, {layout}"
        among = [c for c in at_16m if c["dtype"] == "float32" and c["gradient_layout"] == layout]
        add(name, among, ratio(GUARDED, OURS), most, at_most=True)
    name = "peak extra bytes per parameter, eager and compiled"
    add(name, large, extra_bytes, NOTHING, at_most=True)
    name = "peak extra bytes in all, every option, eager and compiled"
    add(name, updates, extra_bytes_of_options, FEW_BYTES, at_most=True)
    return found
