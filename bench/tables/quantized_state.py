"""The tables of bench/quantized_state.py: errors of each way to store m and v in 8 or 4 bits."""

from typing import Any

from .text import percent, table

CHOSEN = {bits: f'`state_dtype="int{bits}"`' for bits in (8, 4)}


def columns_and_rows(found: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    candidates = found["candidates"]
    first = next(iter(candidates.values()))
    sources, regimes = list(first["mean_error"]), list(first.get("over_float32", ()))
    rows = [
        [
            name,
            *(_percent(x["mean_error"][source]) for source in sources),
            _times(x["worst_update"]),
            f"{x['v_after_ones']:.4f}",
            f"{x['update_without_gradient']:.2g}",
            *(percent(x["over_float32"][regime], digits=1, sign="+") for regime in regimes),
        ]
        for name, x in candidates.items()
    ]
    last = ["worst update", "v after 1s", "update without gradient"]
    return ["stored as", *sources, *last, *(f"loss, {name}" for name in regimes)], rows


def markdown(found: dict[str, Any]) -> str:
    return table(*columns_and_rows(found))


def _percent(x: float) -> str:
    if x >= 10:
        return "> 1000 %"
    return f"{100 * x:.0f} %" if x >= 0.1 else f"{100 * x:.1f} %"


def _times(x: float) -> str:
    if x >= 1e6:
        return f"{x:.0e} ×".replace("e+0", "e")
    return f"{x:.1f} ×" if x < 10 else f"{x:.0f} ×"
