"""The picture of a run of precision.py: how far each loss is from float32's while it trains, and bytes against that."""

from pathlib import Path

import matplotlib

from .example import smoothed
from .options import OPTIONS, as_code
from .precision_figures import (
    Results,
    Run,
    noise,
    over_reference,
    reference,
    signed_percent,
    stored_bytes,
)

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

MEMORY = 0.8  # of the running mean over pieces
COLOURS = plt.get_cmap("tab10").colors
SEEDS = "#bbbbbb"
LIMIT = 0.05  # of the axis of differences at most; the first steps and other seeds may leave it


def save(path: Path, results: Results) -> None:
    """Nothing is drawn without the reference."""
    base = reference(results)
    if base is None:
        return
    picture, (left, right) = plt.subplots(1, 2, figsize=(13, 5.2), layout="constrained")
    others = [x for x in results["runs"] if not x["seed"] and x is not base]
    colours = {x["name"]: COLOURS[i % len(COLOURS)] for i, x in enumerate(others)}
    _draw_differences(left, results, colours)
    _draw_bytes(right, results, [base, *others], colours)
    picture.savefig(path, dpi=110)
    plt.close(picture)


def label(run: Run) -> str:
    options = OPTIONS.get(run["contender"])
    return f"{run['dtype']}, " + (as_code(options) if options else run["contender"])


def _draw_differences(axes: plt.Axes, results: Results, colours: dict[str, tuple]) -> None:
    base = reference(results)
    size = results["settings"]["steps_of_a_piece"]
    for run in results["runs"]:
        if run is base:
            continue
        pairs = zip(run["loss_of_pieces"], base["loss_of_pieces"], strict=True)
        differences = smoothed([100 * (mine / its - 1) for mine, its in pairs], MEMORY)
        steps = [size * (i + 1) for i in range(len(differences))]
        axes.plot(steps, differences, color=colours.get(run["name"], SEEDS), linewidth=1.4)
    axes.axhline(0, color="black", linewidth=0.8)
    settled = [
        abs(x / y - 1)
        for run in results["runs"]
        if run["name"] in colours
        for x, y in list(zip(run["loss_of_pieces"], base["loss_of_pieces"], strict=True))[
            len(base["loss_of_pieces"]) // 4 :
        ]
    ]
    limit = 150 * max(0.001, min(LIMIT, max(settled, default=0)))
    axes.set_ylim(-limit, limit)
    axes.set(xlabel="step", ylabel="% above the loss of float32")
    axes.set_title(
        "training loss, smoothed; colours as on the right, grey: other seeds", fontsize=11
    )
    axes.grid(alpha=0.3)


def _draw_bytes(
    axes: plt.Axes, results: Results, runs: list[Run], colours: dict[str, tuple]
) -> None:
    for y, run in enumerate(runs):
        colour = colours.get(run["name"], "black")
        parameters, total = run["parameter_bytes_per_parameter"], stored_bytes(run)
        axes.barh(y, total, 0.7, color=colour, alpha=0.5)
        axes.barh(y, parameters, 0.7, color=colour)
        difference = over_reference(results, run)
        text = "the reference" if y == 0 else f"loss {signed_percent(difference)}"
        axes.text(total, y, f" {total:.2f} B, {text}", va="center", fontsize=8)
    spread = noise(results)
    by_seed = "" if spread is None else f" (other seeds: ±{100 * spread:.2f} %)"
    axes.set_yticks(range(len(runs)), [label(run).replace(", ", "\n", 1) for run in runs])
    axes.tick_params(axis="y", labelsize=7)
    axes.set_ylim(len(runs) - 0.5, -0.5)
    axes.set(xlabel="bytes per parameter; full colour: the parameter itself")
    axes.set_title(f"memory, and final loss against float32{by_seed}", fontsize=11)
    axes.margins(x=0.45)
    axes.spines[["top", "right"]].set_visible(False)
