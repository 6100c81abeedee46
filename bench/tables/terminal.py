"""What a run shows in the terminal: a table per case, a summary, the goals."""

from typing import Any

from rich.markup import escape
from rich.table import Table

from .figures import Case, of_probe, ratio, update_share
from .goals import goals
from .names import OURS, OURS_COMPILED
from .saved import (
    MEMORY_COLUMNS,
    SUMMARY_COLUMNS,
    bytes_text,
    memory_rows,
    number,
    seconds_text,
    summary_row,
)


def _cell(values: dict[str, Any], key: str, form: str) -> str:
    return format(values[key], form) if key in values else "–"


def case_table(case: Case) -> Table:
    """All figures of one case, a row for each contender."""
    is_training = case["is_training_step"]
    table = Table(title=escape(case["title"]), title_justify="left", title_style="bold")
    table.add_column("contender")
    columns = ["median", "middle half", "samples", "time / ours", "peak memory", "error/allowed"]
    of_update = ["GB/s", "of probe", "stored B/param", "extra B/param"]
    columns += ["update's share"] if is_training else of_update
    for column in columns:
        table.add_column(column, justify="right")
    for name, values in case["contenders"].items():
        if "refused" in values:
            table.add_row(name, f"[bold red]refused: {escape(values['refused'])}")
            continue
        row = [
            name,
            seconds_text(values["median_s"]),
            f"{seconds_text(values['low_s'])} – {seconds_text(values['high_s'])}",
            str(values["samples"]),
            number(ratio(name, OURS)(case)),
            bytes_text(values.get("peak_bytes")),
            _cell(values, "error_over_tolerance", ".2f"),
        ]
        if is_training:
            share = update_share(case, name)
            row.append("–" if share is None or "compiled" not in name else f"{share:.1%}")
        else:
            row.append(_cell(values, "GB_per_s", ".1f"))
            row.append(number(of_probe(name)(case)))
            row.append(_cell(values, "stored_bytes_per_parameter", ".2f"))
            row.append(_cell(values, "peak_extra_bytes_per_parameter", ".2f"))
        table.add_row(*row, style="bold" if name in (OURS, OURS_COMPILED) else "")
    return table


def memory_table(case: Case) -> Table:
    """Of a training step whose memory alone was measured."""
    table = Table(title=escape(case["title"]), title_justify="left", title_style="bold")
    for i, column in enumerate(MEMORY_COLUMNS[2:]):
        table.add_column(column, justify="left" if i == 0 else "right")
    for row in memory_rows(case):
        table.add_row(*row[2:])
    return table


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
