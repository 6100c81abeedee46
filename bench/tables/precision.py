"""Figures of a run of precision.py, derived from what precision_runs.py recorded: table, picture and README ask here."""

from typing import Any

from .options import (
    INT8_STATE,
    INT8_STOCHASTIC,
    MASTER,
    MASTER_FP32,
    MASTER_INT8,
    OPTIONS,
    STOCHASTIC,
    as_code,
)
from .precision_runs import OTHER_SEEDS, REFERENCE

Results = dict[str, Any]  # the content of the JSON file: machine, settings, runs
Run = dict[str, Any]


def stored_bytes(run: Run) -> float:
    """Of parameters and state, per parameter."""
    return run["parameter_bytes_per_parameter"] + run["state_bytes_per_parameter"]


def reference(results: Results) -> Run | None:
    return next((x for x in results["runs"] if x["name"] == REFERENCE.name), None)


def over_reference(results: Results, run: Run, key: str = "final_loss") -> float | None:
    """By which part a loss is above the reference's."""
    base = reference(results)
    return run[key] / base[key] - 1 if base else None


def noise(results: Results, key: str = "final_loss") -> float | None:
    """How far float32 runs of other seeds are from the reference, at most, as a part of its loss."""
    names = {setting.name for setting in OTHER_SEEDS}
    others = [over_reference(results, x, key) for x in results["runs"] if x["name"] in names]
    return max((abs(x) for x in others if x is not None), default=None)


def signed_percent(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:+.2f} %".replace("-", "−")


def options_text(run: Run) -> str:
    """What the optimizer was given."""
    options = OPTIONS.get(run["contender"])
    return f"`{as_code(options)}`" if options else run["contender"]


def plain_percent(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:.2f} %"


MOST = 0.005  # above the reference's loss
GOALS = [
    ("float32", INT8_STATE, MOST),
    ("bfloat16", STOCHASTIC, MOST),
    ("bfloat16", INT8_STOCHASTIC, MOST),
    ("bfloat16", MASTER, None),
    ("bfloat16", MASTER_FP32, None),
    ("bfloat16", MASTER_INT8, MOST),
]


def goal_rows(results: Results) -> list[list[str]]:
    """The goals for final losses, the limit in place of None being the noise of seeds, and whether they are met."""
    runs = {(run["dtype"], run["contender"]): run for run in results["runs"] if not run["seed"]}
    rows = []
    for dtype, contender, most in GOALS:
        limit = noise(results) if most is None else most
        run = runs.get((dtype, contender))
        above = run and over_reference(results, run)
        if limit is None or above is None:
            continue
        met = "yes" if above <= limit else "no"
        target = f"≤ {plain_percent(limit)}" + (", the noise of seeds" if most is None else "")
        rows.append([dtype, options_text(run), target, signed_percent(above), met])
    return rows
