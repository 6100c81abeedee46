"""Pictures of a run: real models' updates, how time grows and whole steps' memory for the README; all updates' traffic."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

from .figures import WHOLE_SETS, Case, figure, seconds
from .names import OURS, OURS_COMPILED, PROBE, STOCK, STOCK_COMPILED, TORCH, with_threads
from .saved import Results, bytes_text, machine_text, seconds_text

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

COLOURS = {
    OURS: "#0072b2",
    OURS_COMPILED: "#56b4e9",
    TORCH: "#e69f00",
    STOCK: "#999999",
    STOCK_COMPILED: "#555555",
    PROBE: "#000000",
}
OPTION_COLOUR = "#009e73"
IN_SMALL_PICTURE = (OURS, STOCK, STOCK_COMPILED, TORCH)


def real_models(cases: list[Case]) -> list[Case]:
    """One case for each published model: the first of its dtypes."""
    first: dict[str, Case] = {}
    for case in cases:
        if case["suite"] == "models":
            first.setdefault(case["case"], case)
    return list(first.values())


def peak_bytes(case: Case, contender: str) -> float | None:
    return figure(case, contender, "peak_bytes")


def save_models(path: Path, results: Results) -> None:
    """Time and peak memory of one update of each real model. Nothing is drawn if the run has none."""
    cases = real_models(results["cases"])
    if not cases:
        return
    picture, axes = plt.subplots(1, 2, figsize=(9, 0.9 + 1.0 * len(cases)), layout="constrained")
    _draw_groups(axes[0], cases, seconds, 1e3, seconds_text)
    axes[0].set(xscale="log", xlabel="ms, logarithmic", title="time of one update")
    _draw_groups(axes[1], cases, peak_bytes, 1e-9, bytes_text)
    axes[1].set(xlabel="GB", title="peak memory of one update")
    axes[1].set_yticks([])
    for one in axes:
        one.margins(x=0.18)
        one.spines[["top", "right"]].set_visible(False)
    picture.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    picture.savefig(path, dpi=110)
    plt.close(picture)


def _draw_groups(
    axes: Any,
    cases: list[Case],
    value_of: Callable[[Case, str], float | None],
    unit: float,
    text_of: Callable[[float | None], str],
) -> None:
    height = 0.8 / len(IN_SMALL_PICTURE)
    for k, name in enumerate(IN_SMALL_PICTURE):
        label = name
        for i, case in enumerate(cases):
            value = value_of(case, name)
            y = i - 0.4 + (k + 0.5) * height
            if value is None:
                text = "not counted" if name == TORCH else "–"
                axes.text(0, y, f" {text}", va="center", fontsize=8, color=COLOURS[name])
                continue
            axes.barh(y, value * unit, height, color=COLOURS[name], label=label)
            axes.text(value * unit, y, f" {text_of(value)}", va="center", fontsize=8)
            label = None
    axes.set_yticks(range(len(cases)), [f"{case['case']}\n{case['dtype']}" for case in cases])
    axes.set_ylim(len(cases) - 0.5, -0.5)


def save_memory(path: Path, results: Results) -> None:
    """Peak memory of whole training steps, a bar for each contender. Nothing is drawn if the run has none."""
    cases = results["memory"]
    if not cases:
        return
    rows = max(len(case["contenders"]) for case in cases)
    size = (5.5 * len(cases), 1.2 + 0.32 * rows)
    picture, all_axes = plt.subplots(
        1, len(cases), figsize=size, layout="constrained", squeeze=False
    )
    for axes, case in zip(all_axes[0], cases, strict=True):
        # Stock first, then ours, then the options.
        order = [STOCK_COMPILED, STOCK, OURS_COMPILED, OURS]
        names = [*order, *(name for name in case["contenders"] if name not in order)]
        for y, name in enumerate(names):
            peak, stored = (figure(case, name, k) for k in ("peak_bytes", "stored_bytes"))
            if peak is None or stored is None:
                continue
            colour = COLOURS.get(name, OPTION_COLOUR)
            axes.barh(y, peak / 1e9, 0.75, color=colour, alpha=0.45)
            axes.barh(y, stored / 1e9, 0.75, color=colour)
            axes.text(peak / 1e9, y, f" {bytes_text(peak)}", va="center", fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=9)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_title(f"{case['case']}, {case['dtype']}", fontsize=10)
        axes.set_xlabel("GB; full colour: parameters + state", fontsize=9)
        axes.margins(x=0.15)
        axes.spines[["top", "right"]].set_visible(False)
    picture.suptitle("peak memory of a whole training step", fontsize=11)
    picture.savefig(path, dpi=110)
    plt.close(picture)


GROWTH_LINES = {
    with_threads(1): ("#56b4e9", "-"),
    with_threads(2): ("#0072b2", "-"),
    with_threads(8): ("#009e73", "--"),
    STOCK: (COLOURS[STOCK], "-"),
    STOCK_COMPILED: (COLOURS[STOCK_COMPILED], "--"),
    TORCH: (COLOURS[TORCH], "-"),
}


def save_growth(path: Path, results: Results) -> None:
    """Time of an update over elements and over tensors, by threads. Nothing is drawn if the run has no such cases."""
    cases = [case for case in results["cases"] if case["suite"] == "growth"]
    if not cases:
        return
    one = [case for case in cases if case["tensors"] == 1]
    many = [case for case in cases if case["parameters"] == 1000 * case["tensors"]]
    panels = {
        "elements of one tensor": ("parameters", one),
        "tensors of 1000 elements": ("tensors", many),
    }
    picture, all_axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, (label, (key, chosen)) in zip(all_axes, panels.items(), strict=True):
        for name, (colour, line) in GROWTH_LINES.items():
            points = [(case[key], 1e3 * t) for case in chosen if (t := seconds(case, name))]
            if points:
                axes.plot(*zip(*points, strict=True), line, color=colour, label=name, marker=".")
        axes.set(xscale="log", yscale="log", xlabel=label, ylabel="ms")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].legend(fontsize=8)
    picture.suptitle(f"time of one update, float32, {results['machine']['cores']} cores", size=11)
    picture.savefig(path, dpi=110)
    plt.close(picture)


def save_traffic(path: Path, results: Results) -> None:
    """GB/s over size for single buffers, and of each set of parameters; black dashes are the probe."""
    updates = [case for case in results["cases"] if not case["is_training_step"]]
    buffers = [case for case in updates if case["suite"] == "buffers"]
    panels = list(dict.fromkeys((c["dtype"], c["gradient_layout"]) for c in buffers))
    others = [case for case in updates if case["suite"] in WHOLE_SETS]
    rows = (1 if panels else 0) + (1 if others else 0)
    if not rows:
        return
    picture = plt.figure(figsize=(max(15, 3.2 * len(panels)), 5 * rows), layout="constrained")
    parts = list(picture.subfigures(rows, 1, squeeze=False)[:, 0])
    if panels:
        all_axes = parts.pop(0).subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (dtype, layout) in zip(all_axes, panels, strict=True):
            chosen = [c for c in buffers if (c["dtype"], c["gradient_layout"]) == (dtype, layout)]
            _draw_lines(axes, chosen)
            axes.set_title(f"one tensor, {dtype},\n{layout} gradient", fontsize=10)
        all_axes[0].set_ylabel("GB/s")
        all_axes[0].legend(fontsize=8)
    if others:
        part = parts.pop(0)
        axes = part.subplots()
        _draw_bars(axes, others)
        axes.set(ylabel="GB/s", title="whole parameter sets")
        part.legend(loc="outside lower center", ncols=len(COLOURS), fontsize=8)
    picture.suptitle(
        "One Adam update: memory traffic per second (higher is better)\n"
        + machine_text(results["machine"]),
        fontsize=9,
    )
    picture.savefig(path, dpi=110)
    plt.close(picture)


def _draw_lines(axes: Any, cases: list[Case]) -> None:
    for name, colour in COLOURS.items():
        points = [
            (case["parameters"], speed)
            for case in cases
            if (speed := figure(case, name, "GB_per_s"))
        ]
        if points:
            is_probe = name == PROBE
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                label=name,
                marker="" if is_probe else "o",
                linestyle="--" if is_probe else "-",
                linewidth=2.5 if name in (OURS, OURS_COMPILED) else 1.5,
                markersize=4,
            )
    axes.set(xscale="log", yscale="log", xlabel="elements")
    axes.grid(alpha=0.3)


def _draw_bars(axes: Any, cases: list[Case]) -> None:
    names = [name for name in COLOURS if name != PROBE]
    width = 0.8 / len(names)
    for i, case in enumerate(cases):
        for k, name in enumerate(names):
            speed = figure(case, name, "GB_per_s")
            if speed:
                x = i - 0.4 + (k + 0.5) * width
                axes.bar(x, speed, width, color=COLOURS[name], label=name if i == 0 else None)
                axes.text(x, speed, f"{speed:.3g}", ha="center", va="bottom", fontsize=7)
        probe = figure(case, PROBE, "GB_per_s")
        if probe:
            label = PROBE if i == 0 else None
            axes.hlines(probe, i - 0.45, i + 0.45, color="black", linestyle="--", label=label)
    axes.set_xticks(range(len(cases)), [f"{c['case']}\n{c['dtype']}" for c in cases], fontsize=9)
    axes.grid(axis="y", alpha=0.3)
