"""Metrics and tables of a run of bench/precision.py, made from its results.

A row is a dtype and an implementation. Each of its runs is compared with float32's of the same regime and seed. The
mean of the differences counts where it is larger than float32's own spread over seeds; else the row is called equal.
"""

from statistics import mean, stdev
from typing import Any

from .metrics import ratio
from .names import FUSED, in_markdown
from .speed import Results as SpeedResults
from .speed import updates
from .text import number, percent, table

Results = dict[str, Any]  # the content of the JSON file: machine, settings, runs
Run = dict[str, Any]
Row = tuple[str, str]  # dtype and implementation

REFERENCE: Row = ("float32", FUSED)
MODEL_OF_TIMES = "SmolLM-135M"  # whose updates give the options' times


def rows_of(results: Results) -> list[Row]:
    return list(dict.fromkeys((x["dtype"], x["implementation"]) for x in results["runs"]))


def regimes(results: Results) -> list[str]:
    return list(dict.fromkeys(x["regime"] for x in results["runs"]))


def runs_of(results: Results, row: Row, regime: str) -> dict[int, Run]:
    """The row's runs by seed."""
    return {x["seed"]: x for x in results["runs"] if (x["dtype"], x["implementation"]) == row and x["regime"] == regime}


def stored_bytes(run: Run) -> float:
    """Bytes of parameters and state, per parameter."""
    return run["parameter_bytes_per_parameter"] + run["state_bytes_per_parameter"]


def bytes_of(results: Results, row: Row) -> float:
    return next(stored_bytes(x) for x in results["runs"] if (x["dtype"], x["implementation"]) == row)


def differences(results: Results, row: Row, regime: str, key: str = "final_loss") -> list[float]:
    """By which part each seed's loss is above that of float32 with the same seed."""
    base = runs_of(results, REFERENCE, regime)
    return [x[key] / base[seed][key] - 1 for seed, x in runs_of(results, row, regime).items() if seed in base]


def spread(results: Results, regime: str, key: str = "final_loss") -> float | None:
    """The largest distance of a float32 seed's loss from their mean, as a part of it."""
    losses = [x[key] for x in runs_of(results, REFERENCE, regime).values()]
    return max(abs(x / mean(losses) - 1) for x in losses) if losses else None


def is_equal(results: Results, row: Row, regime: str, key: str = "final_loss") -> bool:
    """Whether seeds make more of a difference than the row does."""
    found, limit = differences(results, row, regime, key), spread(results, regime, key)
    return bool(found) and limit is not None and abs(mean(found)) <= limit


def difference(results: Results, row: Row, regime: str, key: str = "final_loss") -> str:
    """The mean difference from float32, and its standard deviation over seeds."""
    found = differences(results, row, regime, key)
    if not found:
        return percent(None)
    if not any(found):
        return "identical"
    shown = percent(mean(found), digits=2, sign="+")
    if len(found) > 1:
        shown += f" ± {percent(stdev(found), digits=2)}"
    return f"equal ({shown})" if is_equal(results, row, regime, key) else shown


def options(results: Results, speed: SpeedResults) -> str:
    """The cost of each option in memory, loss and time; a last row has the spread of float32's seeds."""

    def time(dtype: str, implementation: str) -> float | None:
        for case in updates(speed):
            if case["case"] == MODEL_OF_TIMES and case["dtype"] == dtype:
                return ratio(implementation, FUSED)(case)
        return None

    names = regimes(results)
    lines = [
        [
            row[0],
            in_markdown(row[1]),
            number(bytes_of(results, row)),
            *(difference(results, row, name) for name in names),
            number(time(*row)),
        ]
        for row in rows_of(results)
    ]
    last = [f"± {percent(spread(results, name), digits=2)}" for name in names]
    lines.append(["float32", "fused, other seeds", "", *last, ""])
    return table(["parameters", "optimizer", "B/param", *names, "update's time, × fused"], lines, left=2)


def columns(results: Results) -> list[str]:
    losses = [f"{name}: {what}" for name in regimes(results) for what in ("final", "against float32", "held-out")]
    return ["parameters", "optimizer", "parameters, B/param", "state, B/param", "together", *losses]


def rows(results: Results) -> list[list[str]]:
    lines = []
    for row in rows_of(results):
        line = [row[0], in_markdown(row[1])]
        first = next(x for x in results["runs"] if (x["dtype"], x["implementation"]) == row)
        stored = (first["parameter_bytes_per_parameter"], first["state_bytes_per_parameter"])
        line += [number(x) for x in (*stored, sum(stored))]
        for name in regimes(results):
            found = runs_of(results, row, name).values()
            line += [
                f"{mean(x['final_loss'] for x in found):.4f}" if found else "",
                difference(results, row, name),
                difference(results, row, name, "held_out_loss"),
            ]
        lines.append(line)
    return lines


def markdown(results: Results) -> str:
    settings, machine = results["settings"], results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    text = [
        "# Loss and memory of each option",
        f"`{settings['command']}`, {settings['date']}; {versions}; "
        f"device {machine['device']}, backend {machine['backend']}.",
    ]
    if settings["not_publishable"]:
        reasons = "; ".join(settings["not_publishable"])
        text.append(f"**Provisional, not to be quoted:** {reasons}.")
    for regime in settings["regimes"]:
        seeds = [percent(spread(results, regime["name"], key), digits=2) for key in ("final_loss", "held_out_loss")]
        text.append(
            f"*{regime['name'].capitalize()}*: {regime['steps']} steps at learning rate {regime['learning_rate']:g}; "
            f"the final loss is the mean of the last {regime['final_steps']}. "
            f"Seeds of float32 are up to {seeds[0]} (final) and {seeds[1]} (held-out) from their mean."
        )
    text += [
        "A small character model learns prose from scratch; fine-tuning starts from one that has, on source code. All "
        "rows have the same batches with the same seed, and a difference is the mean over seeds ± its standard "
        "deviation. *Equal*: it is below the spread of float32's seeds. Held-out: the loss on text that was not "
        "trained on. With bfloat16 parameters, activations and gradients are bfloat16 too; the loss itself is taken "
        "in float32.",
        table(columns(results), rows(results), left=2),
        "![Loss of each option](precision.png)",
    ]
    return "\n\n".join(text) + "\n"
