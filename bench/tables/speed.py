"""Tables of a run of bench/run.py, made from its results."""

from pathlib import Path
from typing import Any

from . import names
from .metrics import (
    EXTRA_BYTES,
    TIMES_MLX,
    TIMES_MLX_COMPILED,
    TIMES_TORCH,
    WHOLE_SETS,
    Case,
    Metric,
    extra_bytes,
    fewest_samples,
    measured,
    of_copy,
    options_of,
    over_row_major,
    ratio,
    update_share,
)
from .text import NONE, bytes_text, number, percent, seconds_text, table

# The content of the JSON file: machine, settings, cases, memory (the cases that are not timed).
Results = dict[str, Any]

LARGE = 1_000_000  # parameters from which an update is memory traffic and little else

SUMMARY_COLUMNS = [
    "case", "dtype", "gradients", "fused", "fused compiled", "× mlx.optimizers", "× compiled", "× torch",
    "of copy", "extra B/param", "samples",
]  # fmt: skip
SHOWN_COLUMNS = SUMMARY_COLUMNS.index("of copy") + 1  # in the documents
LEGEND = """\
× mlx.optimizers: its eager time over fused; × compiled: both compiled; × torch: torch.optim.Adam(fused=True) over
fused. Below 1, fused is slower. Of copy: the time of a plain copy that moves as many bytes, over fused. Extra B/param:
bytes that a fused step allocates at its peak, per parameter. Samples: the fewest of any implementation."""


def updates(results: Results) -> list[Case]:
    return [case for case in results["cases"] if not case["is_training_step"]]


def summary_row(case: Case) -> list[str]:
    """One line for an update or a training step."""
    samples = fewest_samples(case)
    return [
        f"{case['suite']}: {case['case']}",
        case["dtype"],
        case["gradient_layout"],
        seconds_text(measured(case, names.FUSED)),
        seconds_text(measured(case, names.FUSED_COMPILED)),
        number(TIMES_MLX(case)),
        number(TIMES_MLX_COMPILED(case)),
        number(TIMES_TORCH(case)),
        percent(of_copy(names.FUSED)(case)),
        number(extra_bytes(case)),
        NONE if samples is None else str(samples),
    ]


def group(case: Case) -> tuple[str, ...]:
    """The group that a case represents in a shortened table: kind of tensors, dtype and layout."""
    return (case["suite"], case["dtype"], case["gradient_layout"])


def shown_in_summary(results: Results) -> list[Case]:
    """All sets of parameters, large float32 buffers, and the worst case of each group against torch."""
    cases = updates(results)
    worst: dict[tuple[str, ...], tuple[float, str]] = {}
    for case in cases:
        if (speed := TIMES_TORCH(case)) is not None:
            found = (speed, case["title"])
            worst[group(case)] = min(found, worst.get(group(case), found))
    titles = {title for _, title in worst.values()}

    def is_shown(case: Case) -> bool:
        is_large = case["case"] == "4096×4096" and case["dtype"] == "float32"
        return case["suite"] in WHOLE_SETS or is_large or case["title"] in titles

    return [case for case in cases if is_shown(case)]


def summary(results: Results) -> str:
    rows = [summary_row(case)[:SHOWN_COLUMNS] for case in shown_in_summary(results)]
    return table(SUMMARY_COLUMNS[:SHOWN_COLUMNS], rows, left=3)


WORST_COLUMNS = ["metric", "slower in", "median", "worst", "worst case"]


def worst_cases(results: Results) -> str:
    """A line for each metric: the cases in which fused is slower, the median, and the worst case."""
    cases = updates(results)
    large = [case for case in cases if case["parameters"] >= LARGE]
    buffers = [case for case in large if case["suite"] == "buffers"]

    def times(x: float) -> str:
        return f"{number(x)} ×"

    lines: list[tuple[str, list[Case], Metric, Any, Any]] = [
        ("speed, over mlx.optimizers", cases, TIMES_MLX, min, times),
        ("speed, over compiled mlx.optimizers", cases, TIMES_MLX_COMPILED, min, times),
        ("speed, over torch", cases, TIMES_TORCH, min, times),
        ("of copy bandwidth, from a million parameters on", large, of_copy(names.FUSED), min, percent),
        ("column-major gradients: time, over row-major", buffers, over_row_major(buffers), max, times),
        ("clipping + skipping: time, over without", large, ratio(names.CLIPPING, names.FUSED), max, times),
        ("`state_dtype=\"int8\"`: time, over without", large, ratio(names.INT8_STATE, names.FUSED), max, times),
    ]  # fmt: skip
    rows = []
    for name, among, metric, worst_of, text in lines:
        found = sorted((x, i) for i, case in enumerate(among) if (x := metric(case)) is not None)
        if found:
            worst, i = worst_of(found)
            case, middle = among[i], found[len(found) // 2][0]
            where = f"{case['case']}, {case['dtype']}, {case['gradient_layout']}"
            slower = sum(x < 1 if worst_of is min else x > 1 for x, _ in found)
            slower_in = f"{slower} of {len(found)} cases"
            rows.append([name, slower_in, text(middle), text(worst), where])
    return table(WORST_COLUMNS, rows)


TRAINING_COLUMNS = [
    "whole step", "", "peak: fused", "mlx.optimizers", "saved", "time: fused", "mlx.optimizers", "× mlx.optimizers",
    "update's share: fused", "mlx.optimizers",
]  # fmt: skip


def training_rows(case: Case) -> list[list[str]]:
    """Two lines for a training step, eager and compiled; without times where memory alone was measured."""
    rows = []
    is_timed = case["suite"] != "memory"
    name = case["case"] if is_timed else f"{case['case']}, {case['dtype']}"
    for how, pair in (
        ("eager", (names.FUSED, names.MLX)),
        ("compiled", (names.FUSED_COMPILED, names.MLX_COMPILED)),
    ):
        peak = ratio(*pair, "peak_bytes")(case)
        shares = [update_share(case, x) if how == "compiled" else None for x in pair]
        rows.append(
            [
                name,
                how,
                *(bytes_text(measured(case, x, "peak_bytes")) for x in pair),
                percent(None if peak is None else 1 - peak),
                *(seconds_text(measured(case, x)) for x in pair),
                number(ratio(*reversed(pair))(case)),
                *map(percent, shares),
            ]
        )
    return rows


def training(results: Results) -> str:
    """Without the update's share, which is within the noise where forward and backward take long."""
    shown = TRAINING_COLUMNS.index("× mlx.optimizers") + 1
    steps = [case for case in results["cases"] if case["is_training_step"]]
    rows = [row[:shown] for case in [*steps, *results["memory"]] for row in training_rows(case)]
    return table(TRAINING_COLUMNS[:shown], rows, left=2)


OPTION_COLUMNS = [
    "case", "dtype", "gradients", "option", "stored B/param", "time", "× plain", "GB/s", "of copy", "extra B/param",
]  # fmt: skip
OPTION_LEGEND = """\
Stored B/param: parameters and state. × plain: the fused time without options over the option's. GB/s: of the option's
own traffic; of copy: that over the copy's."""


def option_rows(case: Case) -> list[list[str]]:
    """Fused without options, then a line for each option that took part; none where none did."""
    options = options_of(case)
    return [
        [
            f"{case['suite']}: {case['case']}",
            case["dtype"],
            case["gradient_layout"],
            "none" if name == names.FUSED else names.in_markdown(name),
            number(measured(case, name, "stored_bytes_per_parameter")),
            seconds_text(measured(case, name)),
            number(ratio(names.FUSED, name)(case)),
            number(measured(case, name, "GB_per_s")),
            percent(of_copy(name)(case)),
            number(measured(case, name, EXTRA_BYTES)),
        ]
        for name in ([names.FUSED, *options] if options else [])
    ]


CLIPPING_COLUMNS = [
    "update of", "parameters", "fused", "with both", "×", "mlx.optimizers", "with clip_grad_norm", "×",
    "compiled", "with clip_grad_norm", "×",
]  # fmt: skip


def clipping(results: Results) -> str:
    """The cost of clipping and skipping in an update of whole models, beside that of MLX's own clipping."""
    pairs = (
        (names.FUSED, names.CLIPPING),
        (names.MLX, names.MLX_CLIPPED),
        (names.MLX_COMPILED, names.MLX_CLIPPED_COMPILED),
    )
    rows = []
    for case in updates(results):
        if case["suite"] == "models" and measured(case, names.CLIPPING):
            row = [case["case"], case["dtype"]]
            for plain, clipped in pairs:
                row += [seconds_text(measured(case, name)) for name in (plain, clipped)]
                row.append(number(ratio(clipped, plain)(case)))
            rows.append(row)
    return table(CLIPPING_COLUMNS, rows, left=2)


MEMORY_COLUMNS = [
    "whole step", "dtype", "optimizer", "peak", "parameters + state", "B/param", "of mlx.optimizers",
]  # fmt: skip


def memory_rows(case: Case) -> list[list[str]]:
    """A line for each implementation, its peak beside mlx.optimizers' (what is compiled, beside compiled)."""
    return [
        [
            case["case"],
            case["dtype"],
            name,
            bytes_text(measured(case, name, "peak_bytes")),
            bytes_text(measured(case, name, "stored_bytes")),
            number(measured(case, name, "stored_bytes_per_parameter")),
            percent(ratio(name, theirs, "peak_bytes")(case)),
        ]
        for name in case["implementations"]
        for theirs in [names.MLX_COMPILED if name in (names.FUSED_COMPILED, names.MLX_COMPILED) else names.MLX]
    ]


def machine_text(machine: dict[str, Any]) -> str:
    software = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    return (
        f"{machine['cpu']}, {machine['cores']} cores, {machine['memory_GiB']} GiB, "
        f"{machine['system']}; {software}; device {machine['device']}, "
        f"backend {machine['backend']}, {machine['threads']} threads"
    )


def origin(results: Results) -> str:
    """The command, date and machine of a run; with a warning where it is not to be quoted."""
    machine, settings = results["machine"], results["settings"]
    text = (
        f"`{settings['command']}`, {settings['date']}, load average {machine['load']} at its start. "
        f"{machine_text(machine)}."
    )
    if settings["not_publishable"]:
        text += f" **Provisional, not to be quoted:** {'; '.join(settings['not_publishable'])}."
    return text


def save_markdown(path: Path, results: Results) -> None:
    cases = updates(results)
    steps = [case for case in results["cases"] if case["is_training_step"]]
    memory = [row for case in results["memory"] for row in memory_rows(case)]
    parts = [
        origin(results),
        table(SUMMARY_COLUMNS, map(summary_row, cases), left=3),
        LEGEND,
        table(OPTION_COLUMNS, [row for case in cases for row in option_rows(case)], left=4),
        OPTION_LEGEND,
        table(TRAINING_COLUMNS, [row for case in steps for row in training_rows(case)], left=2),
        table(MEMORY_COLUMNS, memory, left=3),
    ]
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
