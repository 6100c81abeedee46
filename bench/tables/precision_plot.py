"""The plot of a run of bench/precision.py: how far each loss is from float32's while it trains."""

from pathlib import Path

import matplotlib

from .names import OPTIONS, as_code
from .precision import Results, Run, difference, reference, stored_bytes

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

MEMORY = 0.8  # of the running mean
SEEDS = "#bbbbbb"
LIMIT = 7.5  # % of the axis at most; the first steps and other seeds may leave it


def save(path: Path, results: Results) -> None:
    """Draw nothing without the reference."""
    base = reference(results)
    if base is None:
        return
    plot, axes = plt.subplots(figsize=(9, 6.5), layout="constrained")
    limit = 0.1
    for run in results["runs"]:
        if run is base:
            continue
        values = _differences(run, base)
        steps = [results["settings"]["steps_of_a_mean"] * (i + 1) for i in range(len(values))]
        style = {"color": SEEDS} if run["seed"] else {"label": _label(results, run)}
        axes.plot(steps, values, linewidth=1.4, **style)
        if not run["seed"]:
            limit = max(limit, *(1.5 * abs(x) for x in values[len(values) // 4 :]))
    axes.axhline(0, color="black", linewidth=0.8)
    limit = min(LIMIT, limit)
    axes.set(xlabel="step", ylabel="% above the loss of float32", ylim=(-limit, limit))
    axes.set_title("Training loss against float32, smoothed; grey: float32 from other seeds")
    axes.grid(alpha=0.3)
    plot.legend(loc="outside lower center", ncols=2, fontsize=8)
    plot.savefig(path, dpi=110)
    plt.close(plot)


def _differences(run: Run, base: Run) -> list[float]:
    """The running mean of the loss's difference from the reference's, in %."""
    means, mean, weight = [], 0.0, 0.0
    for mine, its in zip(run["mean_losses"], base["mean_losses"], strict=True):
        mean = MEMORY * mean + (1 - MEMORY) * 100 * (mine / its - 1)
        weight = MEMORY * weight + (1 - MEMORY)
        means.append(mean / weight)
    return means


def _label(results: Results, run: Run) -> str:
    options = OPTIONS.get(run["implementation"])
    name = as_code(options) if options else run["implementation"]
    return f"{run['dtype']}, {name}: {stored_bytes(run):.2f} B, loss {difference(results, run)}"
