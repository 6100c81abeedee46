"""Plots of results: bench/run.py's (one file) and bench/finetuning.py's (README's)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

from . import names
from .metrics import Case, measured
from .speed import Results, machine_text, updates
from .text import bytes_text, percent, seconds_text

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = {
    names.FUSED: "#0072b2",
    names.FUSED_COMPILED: "#56b4e9",
    names.TORCH: "#e69f00",
    names.MLX: "#999999",
    names.MLX_COMPILED: "#555555",
    names.COPY: "#000000",
}
OPTION_COLOUR = "#009e73"
SUFFIXES = (".png", ".svg", ".pdf")


def save_run(path: Path, results: Results) -> None:
    """Draw what the run has: models' updates, time over size, and bandwidth over size."""
    cases = updates(results)
    rows = []
    for suite, draw in (("models", _models), ("growth", _growth), ("buffers", _bandwidth)):
        if chosen := [case for case in cases if case["suite"] == suite]:
            rows.append((draw, chosen))
    rows = rows or ([(_models, cases)] if cases else [])
    if not rows:  # training steps alone
        rows = [(_models, results["cases"] or results["memory"])]
    heights = [0.9 + len(chosen) if draw is _models else 4.2 for draw, chosen in rows]
    plot = plt.figure(figsize=(11, 0.7 + sum(heights)), layout="constrained")
    parts = plot.subfigures(len(rows), 1, squeeze=False, height_ratios=heights)[:, 0]
    for part, (draw, chosen) in zip(parts, rows, strict=True):
        draw(part, chosen)
    title = f"One Adam update\n{machine_text(results['machine'])}"
    plot.suptitle(title, fontsize=9)
    _save(plot, path)


def _save(plot: Any, path: Path) -> None:
    plot.savefig(path, dpi=110)
    plt.close(plot)


def _models(part: Any, cases: list[Case]) -> None:
    """Time and peak memory, a group of bars for each case."""
    axes = part.subplots(1, 2)
    _bars(axes[0], cases, "median_s", 1e3, seconds_text)
    axes[0].set(xscale="log", xlabel="ms, logarithmic", title="time")
    _bars(axes[1], cases, "peak_bytes", 1e-9, bytes_text)
    axes[1].set(xlabel="GB", title="peak memory", yticks=[])
    for one in axes:
        one.margins(x=0.18)
    part.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)


def _bars(axes: Any, cases: list[Case], key: str, unit: float, text_of: Callable[[float | None], str]) -> None:
    shown = [name for name in COLOURS if name != names.COPY]
    height = 0.8 / len(shown)
    for k, name in enumerate(shown):
        label = name
        for i, case in enumerate(cases):
            y = i - 0.4 + (k + 0.5) * height
            value = measured(case, name, key)
            if value is None:
                text = " not counted" if name == names.TORCH else " –"
                axes.text(0, y, text, va="center", fontsize=8, color=COLOURS[name])
                continue
            axes.barh(y, value * unit, height, color=COLOURS[name], label=label)
            axes.text(value * unit, y, f" {text_of(value)}", va="center", fontsize=8)
            label = None
    axes.set_yticks(range(len(cases)), [f"{case['case']}\n{case['dtype']}" for case in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)
    axes.spines[["top", "right"]].set_visible(False)


GROWTH_LINES = {
    names.with_threads(1): ("#56b4e9", "-"),
    names.with_threads(2): ("#0072b2", "-"),
    names.with_threads(8): ("#009e73", "--"),
    names.MLX: (COLOURS[names.MLX], "-"),
    names.MLX_COMPILED: (COLOURS[names.MLX_COMPILED], "--"),
    names.TORCH: (COLOURS[names.TORCH], "-"),
}


def _growth(part: Any, cases: list[Case]) -> None:
    """Time over the elements of one tensor, and over the number of tensors, by threads."""
    panels = {
        "elements of one float32 tensor": ("parameters", lambda case: case["tensors"] == 1),
        "float32 tensors of 1000 elements": (
            "tensors",
            lambda case: case["parameters"] == 1000 * case["tensors"],
        ),
    }
    all_axes = part.subplots(1, 2)
    for axes, (label, (key, is_shown)) in zip(all_axes, panels.items(), strict=True):
        for name, (colour, line) in GROWTH_LINES.items():
            chosen = [case for case in cases if is_shown(case)]
            points = [(c[key], 1e3 * t) for c in chosen if (t := measured(c, name))]
            _line(axes, points, label=name, color=colour, linestyle=line, marker=".")
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="ms")
    all_axes[0].legend(fontsize=8)


def _bandwidth(part: Any, cases: list[Case]) -> None:
    """GB/s over size of one tensor, by dtype and layout; black dashes are a plain copy."""
    panels = list(dict.fromkeys((case["dtype"], case["gradient_layout"]) for case in cases))
    all_axes = part.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axes, (dtype, layout) in zip(all_axes, panels, strict=True):
        chosen = [c for c in cases if (c["dtype"], c["gradient_layout"]) == (dtype, layout)]
        for name, colour in COLOURS.items():
            points = [(c["parameters"], x) for c in chosen if (x := measured(c, name, "GB_per_s"))]
            style = "--" if name == names.COPY else "-"
            _line(axes, points, label=name, color=colour, linestyle=style, marker=".")
        axes.set(xscale="log", yscale="log", xlabel="elements")
        axes.set_title(f"{dtype},\n{layout} gradient", fontsize=9)
    all_axes[0].set_ylabel("GB/s")
    all_axes[0].legend(fontsize=7)


def _line(axes: Any, points: list[tuple[float, float]], **style: Any) -> None:
    if points:
        axes.plot(*zip(*points, strict=True), **style)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def save_finetuning(path: Path, results: dict[str, Any]) -> None:
    """Peak memory of mlx-lm's full fine-tuning, a bar for each optimizer whose bytes differ."""
    settings, machine = results["settings"], results["machine"]
    dtypes = list(dict.fromkeys(row["dtype"] for row in results["rows"]))
    plot, all_axes = plt.subplots(
        len(dtypes), 1, figsize=(8, 5.4), layout="constrained", sharex=True, squeeze=False,
        height_ratios=[len(_distinct(results, dtype)) for dtype in dtypes],
    )  # fmt: skip
    for axes, dtype in zip(all_axes[:, 0], dtypes, strict=True):
        rows = _distinct(results, dtype)
        base = next(row["peak_bytes"] for row in rows if row["implementation"] == names.MLX)
        for y, row in enumerate(rows):
            name, peak = row["implementation"], row["peak_bytes"]
            axes.barh(y, peak / 1e9, 0.72, color=COLOURS.get(name, OPTION_COLOUR))
            axes.text(peak / 1e9, y, f" {bytes_text(peak)}, {percent(peak / base)}", va="center")
        labels = [_label(row["implementation"]) for row in rows]
        axes.set_yticks(range(len(rows)), labels)
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(f"{dtype} parameters", fontsize=11, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.22)
    all_axes[-1, 0].set_xlabel("GB; percentages: of mlx.optimizers")
    plot.suptitle(
        f"Peak memory of full fine-tuning, {settings['model']}\n"
        f"mlx-lm {settings['mlx-lm']}, mlx {machine['versions']['mlx']}, device {machine['device']}",
        fontsize=12,
    )
    plot.savefig(path, dpi=200)
    plt.close(plot)


def _distinct(results: dict[str, Any], dtype: str) -> list[dict[str, Any]]:
    """The rows of a dtype, without stochastic rounding, which takes no memory."""
    return [
        row
        for row in results["rows"]
        if row["dtype"] == dtype and not names.OPTIONS.get(row["implementation"], {}).get("stochastic_rounding")
    ]


def _label(name: str) -> str:
    if name not in names.OPTIONS:
        return {names.FUSED: "fused, default options"}.get(name, name)
    code = names.as_code(names.OPTIONS[name]).replace("master_weights=True, ", "master_weights=True,\n")
    return f"fused, {code}"
