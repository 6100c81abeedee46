"""Metrics and tables of a run of bench/precision.py, made from its results."""

from typing import Any

from .metrics import ratio
from .names import FUSED, in_markdown
from .speed import Results as SpeedResults
from .speed import updates
from .text import number, percent, table

Results = dict[str, Any]  # the content of the JSON file: machine, settings, runs
Run = dict[str, Any]

MODEL_OF_TIMES = "SmolLM-135M"  # whose updates give the options' times


def stored_bytes(run: Run) -> float:
    """Bytes of parameters and state, per parameter."""
    return run["parameter_bytes_per_parameter"] + run["state_bytes_per_parameter"]


def is_float32(run: Run) -> bool:
    """True for plain float32 runs: the reference, and those from other initial parameters."""
    return run["dtype"] == "float32" and run["implementation"] == FUSED


def reference(results: Results) -> Run | None:
    return next((x for x in results["runs"] if is_float32(x) and not x["seed"]), None)


def over_reference(results: Results, run: Run, key: str = "final_loss") -> float | None:
    """The part by which a loss is above the reference's."""
    base = reference(results)
    return run[key] / base[key] - 1 if base else None


def noise(results: Results, key: str = "final_loss") -> float | None:
    """The largest difference of float32 runs of other seeds from the reference, as a part of its loss."""
    others = [over_reference(results, x, key) for x in results["runs"] if is_float32(x) and x["seed"]]
    return max((abs(x) for x in others if x is not None), default=None)


def difference(results: Results, run: Run, key: str = "final_loss") -> str:
    return percent(over_reference(results, run, key), digits=2, sign="+")


OPTION_COLUMNS = [
    "parameters", "optimizer", "B/param", "loss against float32", "update's time, × fused",
]  # fmt: skip


def options(results: Results, speed: SpeedResults) -> str:
    """The cost of each option in memory, loss and time; a last row has the noise of seeds."""

    def time(run: Run) -> float | None:
        for case in updates(speed):
            if case["case"] == MODEL_OF_TIMES and case["dtype"] == run["dtype"]:
                return ratio(run["implementation"], FUSED)(case)
        return None

    rows = [
        [
            run["dtype"],
            in_markdown(run["implementation"]),
            number(stored_bytes(run)),
            difference(results, run),
            number(time(run)),
        ]
        for run in results["runs"]
        if not run["seed"]
    ]
    spread = f"± {percent(noise(results), digits=2)}"
    rows.append(["float32", "fused, other seeds", rows[0][2] if rows else "", spread, ""])
    return table(OPTION_COLUMNS, rows, left=2)


COLUMNS = [
    "parameters", "optimizer", "parameters, B/param", "state, B/param", "together", "final loss", "against float32",
    "held-out loss", "against float32",
]  # fmt: skip


def rows(results: Results) -> list[list[str]]:
    return [
        [
            x["dtype"] + (f", seed {x['seed']}" if x["seed"] else ""),
            in_markdown(x["implementation"]),
            number(x["parameter_bytes_per_parameter"]),
            number(x["state_bytes_per_parameter"]),
            number(stored_bytes(x)),
            f"{x['final_loss']:.4f}",
            difference(results, x),
            f"{x['held_out_loss']:.4f}",
            difference(results, x, "held_out_loss"),
        ]
        for x in results["runs"]
    ]


def markdown(results: Results) -> str:
    settings, machine = results["settings"], results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    seeds = [percent(noise(results, key), digits=2) for key in ("final_loss", "held_out_loss")]
    text = [
        "# Loss and memory of each option",
        f"`{settings['command']}`, {settings['date']}; {versions}; "
        f"device {machine['device']}, backend {machine['backend']}.",
    ]
    if settings["not_publishable"]:
        reasons = "; ".join(settings["not_publishable"])
        text.append(f"**Provisional, not to be quoted:** {reasons}.")
    text += [
        f"A small character model, {settings['steps']} steps on the same batches. Final loss: the mean of the last "
        f"{settings['final_steps']} steps. Held-out loss: of text that was not trained on. "
        "Float32 runs from other initial "
        f"parameters differ from the reference by up to {seeds[0]} (final) and {seeds[1]} (held-out). With bfloat16 "
        "parameters, activations and gradients are bfloat16 too; the loss itself is taken in float32.",
        table(COLUMNS, rows(results), left=2),
        "![Loss against float32](precision.png)",
    ]
    return "\n\n".join(text) + "\n"
