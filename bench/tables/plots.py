"""Plots of results: bench/run.py's (one file) and bench/finetuning.py's (README's)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

from . import finetuning, names
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
PART_COLOURS = {"weights": "#999999", "state": "#0072b2", "gradients": "#e69f00", "activations": "#009e73"}
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
    """Peak memory of mlx-lm's full fine-tuning, a bar of its parts for each optimizer."""
    settings, machine = results["settings"], results["machine"]
    cases = list(dict.fromkeys((row["model"], row["dtype"]) for row in results["rows"]))
    groups = [[row for row in results["rows"] if (row["model"], row["dtype"]) == case] for case in cases]
    plot, all_axes = plt.subplots(
        len(cases), 1, figsize=(8, 0.9 * len(cases) + 0.42 * len(results["rows"]) + 1), layout="constrained",
        squeeze=False, height_ratios=[len(rows) + 1 for rows in groups],
    )  # fmt: skip
    for axes, (model, dtype), rows in zip(all_axes[:, 0], cases, groups, strict=True):
        for y, row in enumerate(rows):
            start = 0.0
            for part, colour in PART_COLOURS.items():
                length = max(0, row["parts"][part]) / 1e9
                axes.barh(y, length, 0.72, left=start, color=colour, label=None if y else part)
                start += length
            note = f" {bytes_text(row['peak_bytes'])}, {percent(finetuning.share(row, results))}"
            axes.text(start, y, note, va="center")
        axes.set_yticks(range(len(rows)), [_label(row["options"]) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.set_title(f"{model}, {dtype}", fontsize=11, loc="left")
        axes.spines[["top", "right"]].set_visible(False)
        axes.margins(x=0.3)  # room for the note
    all_axes[-1, 0].set_xlabel("GB; percentages: of mlx.optimizers")
    plot.legend(*all_axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(PART_COLOURS))
    plot.suptitle(
        f"Peak memory of full fine-tuning, batch 1, {settings['tokens']} tokens\n"
        f"mlx-lm {settings['mlx-lm']}, mlx {machine['versions']['mlx']}, device {machine['device']}",
        fontsize=12,
    )
    plot.savefig(path, dpi=160)
    plt.close(plot)


def _label(options: dict[str, Any] | None) -> str:
    if options is None:
        return names.MLX
    # Two lines where there are several options.
    return "fused, " + names.as_code(options).replace(", state", ",\nstate") if options else "fused, default options"
