"""What a run leaves in files: all figures as JSON, and tables of them as Markdown."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .figures import (
    OF_PROBE,
    TIMES_STOCK,
    TIMES_STOCK_COMPILED,
    TIMES_TORCH,
    Case,
    extra_bytes,
    fewest_samples,
    figure,
    of_probe,
    options_of,
    ratio,
    seconds,
    update_share,
)
from .goals import goals
from .names import OURS, OURS_COMPILED, STOCK, STOCK_COMPILED
from .options import OPTIONS, as_code

# The content of the JSON file: machine, settings, cases, memory (the cases that are not timed), goals.
Results = dict[str, Any]

SUMMARY_COLUMNS = [
    "case", "dtype", "gradients", "ours", "ours compiled", "× stock", "× stock compiled", "× torch",
    "of probe", "extra B/param", "samples",
]  # fmt: skip
LEGEND = """\
× stock: eager stock's time over ours; × stock compiled: compiled stock's time over compiled ours; × torch: the time of
torch's fused Adam over ours. Below 1, ours is slower. Of probe: the time of a loop that moves the same bytes, one addition
for each store, over ours; it is a probe and no bound. Extra B/param: bytes that a step of ours allocates at its peak, per
parameter. Samples: the fewest of any contender."""


def seconds_text(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    if seconds < 1e-3:
        return f"{seconds * 1e6:.1f} µs"
    if seconds < 1:
        return f"{seconds * 1e3:.2f} ms" if seconds < 0.01 else f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s"


def bytes_text(count: float | None) -> str:
    if count is None:
        return "–"
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    if count >= 1e3:
        return f"{count / 1e6:.0f} MB" if count >= 1e8 else f"{count / 1e6:.3g} MB"
    return f"{count:.0f} bytes"


def number(x: float | None) -> str:
    """Three digits or so."""
    if x is None:
        return "–"
    return f"{x:.2f}" if x < 10 else f"{x:.1f}" if x < 100 else f"{x:.0f}"


def percent(x: float | None) -> str:
    return "–" if x is None else f"{100 * x:.0f} %".replace("-", "−")


def table(columns: list[str], rows: Iterable[list[str]], left: int = 1) -> str:
    """A Markdown table; the columns after the first `left` ones hold numbers."""
    lines = [columns, ["---" if i < left else "--:" for i in range(len(columns))], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def summary_row(case: Case) -> list[str]:
    """One line for an update or a training step."""
    samples = fewest_samples(case)
    return [
        f"{case['suite']}: {case['case']}",
        case["dtype"],
        case["gradient_layout"],
        seconds_text(seconds(case, OURS)),
        seconds_text(seconds(case, OURS_COMPILED)),
        number(TIMES_STOCK(case)),
        number(TIMES_STOCK_COMPILED(case)),
        number(TIMES_TORCH(case)),
        number(OF_PROBE(case)),
        number(extra_bytes(case)),
        "–" if samples is None else str(samples),
    ]


TRAINING_COLUMNS = [
    "whole step", "", "peak: ours", "stock", "saved", "time: ours", "stock", "× stock", "update's share: ours", "stock",
]  # fmt: skip


def training_rows(case: Case) -> list[list[str]]:
    """Two lines for a training step: eager and compiled, each against stock alike."""
    rows = []
    for how, ours, stock in (("eager", OURS, STOCK), ("compiled", OURS_COMPILED, STOCK_COMPILED)):
        peaks = [figure(case, name, "peak_bytes") for name in (ours, stock)]
        times = [seconds(case, name) for name in (ours, stock)]
        shares = [update_share(case, name) if how == "compiled" else None for name in (ours, stock)]
        rows.append(
            [
                case["case"],
                how,
                *map(bytes_text, peaks),
                percent(1 - peaks[0] / peaks[1] if all(peaks) else None),
                *map(seconds_text, times),
                number(times[1] / times[0] if all(times) else None),
                *map(percent, shares),
            ]
        )
    return rows


def training_table(cases: list[Case]) -> str:
    rows = [row for case in cases if case["is_training_step"] for row in training_rows(case)]
    return table(TRAINING_COLUMNS, rows, left=2)


OPTION_COLUMNS = [
    "case", "dtype", "gradients", "option", "stored B/param", "time", "× plain", "GB/s", "of probe", "extra B/param",
]  # fmt: skip
OPTION_LEGEND = """\
Stored B/param: parameters and state. × plain: the time of ours without options over the option's. GB/s: of the option's own
traffic; of probe: that over the probe's."""


def option_rows(case: Case) -> list[list[str]]:
    """Ours without options, then a line for each option that took part; none where none did."""
    names = options_of(case)
    rows = []
    for name in [OURS, *names] if names else []:
        extra = figure(case, name, "peak_extra_bytes_per_parameter")
        rows.append(
            [
                f"{case['suite']}: {case['case']}",
                case["dtype"],
                case["gradient_layout"],
                f"`{as_code(OPTIONS[name])}`" if name in OPTIONS else "none",
                number(figure(case, name, "stored_bytes_per_parameter")),
                seconds_text(seconds(case, name)),
                number(ratio(OURS, name)(case)),
                number(figure(case, name, "GB_per_s")),
                number(of_probe(name)(case)),
                number(extra),
            ]
        )
    return rows


MEMORY_COLUMNS = [
    "whole step", "dtype", "optimizer", "peak", "of it parameters + state", "B/param", "of stock's peak",
]  # fmt: skip


def memory_rows(case: Case) -> list[list[str]]:
    """A line for each contender; of stock's peak: eager stock's, for what is compiled compiled stock's."""
    rows = []
    for name in case["contenders"]:
        theirs = STOCK_COMPILED if name in (OURS_COMPILED, STOCK_COMPILED) else STOCK
        rows.append(
            [
                case["case"],
                case["dtype"],
                name,
                bytes_text(figure(case, name, "peak_bytes")),
                bytes_text(figure(case, name, "stored_bytes")),
                number(figure(case, name, "stored_bytes_per_parameter")),
                percent(ratio(name, theirs, "peak_bytes")(case)),
            ]
        )
    return rows


def goals_table(cases: list[Case]) -> str:
    signs = {">=": "≥", "<=": "≤"}
    rows = [
        [
            goal.name,
            f"{signs[goal.sign]} {goal.target:g}",
            f"{goal.measured:.3g}",
            "yes" if goal.met else "no",
        ]
        for goal in goals(cases)
    ]
    return table(["goal, by its worst case", "target", "measured", "met"], rows)


def machine_text(machine: dict[str, Any]) -> str:
    software = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_GiB']} GiB, "
        f"{machine['system']}; {software}; device {machine['device']}, "
        f"backend {machine['backend']}, {machine['threads']} threads"
    )


def origin(results: Results) -> str:
    """Which command gave the figures, when, where; and a warning where they are not to be quoted."""
    machine, settings = results["machine"], results["settings"]
    text = (
        f"`{settings['command']}`, {settings['date']}, load average {machine['load']} at its start. "
        f"{machine_text(machine)}."
    )
    if settings["not_publishable"]:
        text += f"\n\n**Provisional, not to be quoted:** {'; '.join(settings['not_publishable'])}."
    return text


def save_json(path: Path, results: Results) -> None:
    path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def load_json(path: Path) -> Results:
    return json.loads(path.read_text(encoding="utf-8"))


def save_markdown(path: Path, results: Results) -> None:
    cases = results["cases"]
    updates = [case for case in cases if not case["is_training_step"]]
    parts = [
        origin(results),
        table(SUMMARY_COLUMNS, map(summary_row, updates), left=3),
        LEGEND,
        table(OPTION_COLUMNS, [row for case in updates for row in option_rows(case)], left=4),
        OPTION_LEGEND,
        training_table(cases),
        table(MEMORY_COLUMNS, [row for case in results["memory"] for row in memory_rows(case)], 3),
        goals_table(cases),
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
