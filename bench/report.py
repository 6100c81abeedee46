"""What a run shows: a table per case, a summary, the goals, JSON, Markdown and a plot."""

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from contenders import FUSED, FUSED_COMPILED, SPEED_OF_LIGHT, STOCK, STOCK_COMPILED, TORCH, versions
from goals import goals, ratio
from rich.markup import escape
from rich.table import Table

Case = dict[str, Any]


def machine(device: str, backend: str) -> dict[str, Any]:
    from mlx_fused_adam import _ext

    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_GiB": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "device": device,
        "backend": backend,
        "threads": _ext.num_threads(),
        "instruction_set": _ext.cpu_isa(),
        "load": os.getloadavg()[0],
        **versions(),
    }


def _cpu_model() -> str:
    try:
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(
                command, capture_output=True, text=True, check=True
            ).stdout.strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return platform.processor() or platform.machine()


def in_words(machine: dict[str, Any]) -> str:
    software = ", ".join(f"{name} {machine[name]}" for name in versions())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_GiB']} GiB, "
        f"{machine['system']}; "
        f"{software}; device {machine['device']}, backend {machine['backend']}, "
        f"{machine['threads']} threads"
    )


def seconds_text(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    return f"{seconds * 1e3:.2f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _cell(values: dict[str, Any], key: str, form: str) -> str:
    return format(values[key], form) if key in values else "–"


def case_table(case: Case) -> Table:
    """All figures of one case, a row for each contender."""
    shares = case["is_training_step"]
    table = Table(title=escape(case["title"]), title_justify="left", title_style="bold")
    table.add_column("contender")
    for column in (
        "median",
        "middle half",
        "GB/s",
        "of light",
        "time / fused",
        "extra B/param",
        "error/allowed",
    ):
        table.add_column(column, justify="right")
    if shares:
        table.add_column("update's share", justify="right")
    for name, values in case["contenders"].items():
        if "refused" in values:
            table.add_row(name, f"[bold red]refused: {escape(values['refused'])}")
            continue
        row = [
            name,
            seconds_text(values["median_s"]),
            f"{seconds_text(values['low_s'])} – {seconds_text(values['high_s'])}",
            _cell(values, "GB_per_s", ".1f"),
            _cell(values, "of_speed_of_light", ".2f"),
            _cell(values, "time_over_fused", ".2f"),
            _cell(values, "peak_extra_bytes_per_parameter", ".2f"),
            _cell(values, "error_over_tolerance", ".2f"),
        ]
        style = "bold" if name in (FUSED, FUSED_COMPILED) else ""
        table.add_row(
            *row, *([_cell(values, "update_share", ".1%")] if shares else []), style=style
        )
    return table


SUMMARY_COLUMNS = [
    "case",
    "dtype",
    "gradients",
    "fused",
    "GB/s",
    "of light",
    "× torch",
    "× stock",
    "× stock compiled",
    "extra B/param",
]


def summary_row(case: Case) -> list[str]:
    """One line for a case; ratios say how many times faster ours is, like for like."""
    ours = case["contenders"].get(FUSED, {})
    ratios = [ratio(TORCH, FUSED), ratio(STOCK, FUSED), ratio(STOCK_COMPILED, FUSED_COMPILED)]
    found = [of(case) for of in ratios]
    return [
        f"{case['suite']}: {case['case']}" if case["suite"] != case["case"] else case["case"],
        case["dtype"],
        case["gradient_layout"],
        seconds_text(ours["median_s"]) if "median_s" in ours else "refused",
        _cell(ours, "GB_per_s", ".1f"),
        _cell(ours, "of_speed_of_light", ".2f"),
        *("–" if x is None else f"{x:.2f}" for x in found),
        _cell(ours, "peak_extra_bytes_per_parameter", ".2f"),
    ]


def summary_table(cases: list[Case]) -> Table:
    table = Table(
        title="Summary: × says how many times faster ours is",
        title_justify="left",
        title_style="bold",
    )
    for i, column in enumerate(SUMMARY_COLUMNS):
        table.add_column(column, justify="left" if i < 3 else "right")
    for case in cases:
        table.add_row(*summary_row(case))
    return table


def goals_table(cases: list[Case]) -> Table:
    table = Table(
        title="Goals, by the worst case of each", title_justify="left", title_style="bold"
    )
    for column in ("goal", "target", "measured", "", "worst case"):
        table.add_column(column, justify="right" if column in ("target", "measured") else "left")
    for goal in goals(cases):
        verdict = "[green]met" if goal.met else "[red]missed"
        table.add_row(
            goal.name,
            f"{goal.sign} {goal.target:g}",
            f"{goal.measured:.3g}",
            verdict,
            escape(goal.worst_case),
        )
    return table


def save_json(
    path: Path, machine: dict[str, Any], settings: dict[str, Any], cases: list[Case]
) -> None:
    content = {
        "machine": machine,
        "settings": settings,
        "cases": cases,
        "goals": [goal.as_dict() for goal in goals(cases)],
    }
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def save_markdown(path: Path, machine: dict[str, Any], cases: list[Case]) -> None:
    """The summary and the goals as tables for a README."""

    def line(cells: list[str]) -> str:
        return "| " + " | ".join(cells) + " |"

    lines = [
        in_words(machine) + ".",
        "",
        line(SUMMARY_COLUMNS),
        line(["---"] * len(SUMMARY_COLUMNS)),
    ]
    lines += [line(summary_row(case)) for case in cases]
    lines += ["", line(["goal", "target", "measured", "met"]), line(["---"] * 4)]
    for goal in goals(cases):
        sign = goal.sign.replace(">=", "≥").replace("<=", "≤")
        lines.append(
            line(
                [
                    goal.name,
                    f"{sign} {goal.target:g}",
                    f"{goal.measured:.3g}",
                    "yes" if goal.met else "no",
                ]
            )
        )
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


COLOURS = {
    FUSED: "#0072b2",
    FUSED_COMPILED: "#56b4e9",
    TORCH: "#e69f00",
    STOCK: "#999999",
    STOCK_COMPILED: "#555555",
    SPEED_OF_LIGHT: "#000000",
}
OURS = (FUSED, FUSED_COMPILED)


def save_plot(path: Path, machine: dict[str, Any], cases: list[Case]) -> None:
    """GB/s over size for single buffers, and of each model; black dashes are the speed of light."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    updates = [case for case in cases if not case["is_training_step"]]
    buffers = [case for case in updates if case["suite"] == "buffers"]
    panels = list(
        dict.fromkeys(
            (c["dtype"], c["gradient_layout"]) for c in buffers if c["dtype"] != "float16"
        )
    )
    others = [case for case in updates if case["suite"] != "buffers"]
    rows = (1 if panels else 0) + (1 if others else 0)
    if not rows:
        return
    figure = plt.figure(figsize=(15, 5 * rows), layout="constrained")
    parts = list(figure.subfigures(rows, 1, squeeze=False)[:, 0])
    if panels:
        all_axes = parts.pop(0).subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axes, (dtype, layout) in zip(all_axes, panels, strict=True):
            chosen = [c for c in buffers if (c["dtype"], c["gradient_layout"]) == (dtype, layout)]
            _draw_lines(axes, chosen)
            axes.set_title(f"one tensor, {dtype}, {layout} gradient", fontsize=10)
        all_axes[0].set_ylabel("GB/s")
        all_axes[0].legend(fontsize=8)
    if others:
        part = parts.pop(0)
        axes = part.subplots()
        _draw_bars(axes, others)
        axes.set(ylabel="GB/s", title="whole parameter sets")
        part.legend(loc="outside lower center", ncols=len(COLOURS), fontsize=8)
    figure.suptitle(
        f"One Adam step: memory traffic per second (higher is better)\n{in_words(machine)}",
        fontsize=9,
    )
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _draw_lines(axes: Any, cases: list[Case]) -> None:
    for name, colour in COLOURS.items():
        points = [
            (case["parameters"], case["contenders"][name]["GB_per_s"])
            for case in cases
            if "GB_per_s" in case["contenders"].get(name, {})
        ]
        if points:
            light = name == SPEED_OF_LIGHT
            axes.plot(
                *zip(*points, strict=True),
                color=colour,
                label=name,
                marker="" if light else "o",
                linestyle="--" if light else "-",
                linewidth=2.5 if name in OURS else 1.5,
                markersize=4,
            )
    axes.set(xscale="log", yscale="log", xlabel="elements")
    axes.grid(alpha=0.3)


def _draw_bars(axes: Any, cases: list[Case]) -> None:
    names = [name for name in COLOURS if name != SPEED_OF_LIGHT]
    width = 0.8 / len(names)
    for i, case in enumerate(cases):
        for k, name in enumerate(names):
            speed = case["contenders"].get(name, {}).get("GB_per_s")
            if speed:
                x = i - 0.4 + (k + 0.5) * width
                axes.bar(x, speed, width, color=COLOURS[name], label=name if i == 0 else None)
                axes.text(x, speed, f"{speed:.3g}", ha="center", va="bottom", fontsize=7)
        light = case["contenders"].get(SPEED_OF_LIGHT, {}).get("GB_per_s")
        if light:
            axes.hlines(
                light,
                i - 0.45,
                i + 0.45,
                color="black",
                linestyle="--",
                label=SPEED_OF_LIGHT if i == 0 else None,
            )
    axes.set_xticks(range(len(cases)), [f"{c['case']}\n{c['dtype']}" for c in cases], fontsize=9)
    axes.grid(axis="y", alpha=0.3)
