"""The plot of a run of bench/precision.py: loss against step, one panel a regime; below it the difference from float32.

Each line is the mean over seeds, smoothed.
"""

from pathlib import Path
from statistics import mean

import matplotlib

from .names import FUSED, MLX, OPTIONS, as_code
from .precision import REFERENCE, Results, Row, bytes_of, regimes, rows_of, runs_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

MEMORY = 0.8  # of the running mean
STRONG = {("float32", FUSED): "black", ("bfloat16", MLX): "red"}
COLORS = plt.get_cmap("tab20").colors


def save(path: Path, results: Results) -> None:
    """Draw nothing without the reference."""
    names = regimes(results)
    if not any(runs_of(results, REFERENCE, name) for name in names):
        return
    plot, axes = plt.subplots(
        2,
        len(names),
        figsize=(11, 8),
        layout="constrained",
        squeeze=False,
        sharex="col",
    )
    width = results["settings"]["steps_of_a_mean"]
    for (above, below), name in zip(axes.T, names, strict=True):
        base = _mean_losses(results, REFERENCE, name)
        for i, row in enumerate(rows_of(results)):
            losses = _mean_losses(results, row, name)
            if not losses:
                continue
            steps = [width * (i + 1) for i in range(len(losses))]
            style = {"label": _label(results, row), "linewidth": 1.2, "color": STRONG.get(row, COLORS[i])}
            above.plot(steps, losses, **style)
            below.plot(steps, _smooth([100 * (x / y - 1) for x, y in zip(losses, base, strict=True)]), **style)
        above.set(title=name, ylabel="training loss")
        below.set(xlabel="step", ylabel="% above float32, smoothed")
        for axis in (above, below):
            axis.grid(alpha=0.3)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    plot.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=8)
    plot.savefig(path, dpi=110)
    plt.close(plot)


def _mean_losses(results: Results, row: Row, regime: str) -> list[float]:
    """The mean over seeds of each few steps' loss."""
    return [mean(x) for x in zip(*(run["mean_losses"] for run in runs_of(results, row, regime).values()), strict=True)]


def _smooth(values: list[float]) -> list[float]:
    means, total, weight = [], 0.0, 0.0
    for x in values:
        total, weight = MEMORY * total + (1 - MEMORY) * x, MEMORY * weight + (1 - MEMORY)
        means.append(total / weight)
    return means


def _label(results: Results, row: Row) -> str:
    dtype, implementation = row
    options = OPTIONS.get(implementation)
    name = as_code(options) if options else implementation
    return f"{dtype}, {name}: {bytes_of(results, row):.2f} B"
