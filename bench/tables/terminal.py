"""Tables that bench/run.py shows in the terminal: one of each case, and a summary."""

from rich.markup import escape
from rich.table import Table

from .metrics import Case, measured, of_copy, ratio, update_share
from .names import FUSED, FUSED_COMPILED
from .speed import MEMORY_COLUMNS, SUMMARY_COLUMNS, memory_rows, summary_row
from .text import bytes_text, number, percent, seconds_text


def _table(title: str, columns: list[str], rows: list[list[str]], left: int = 1) -> Table:
    made = Table(title=escape(title), title_justify="left", title_style="bold")
    for i, column in enumerate(columns):
        made.add_column(column, justify="left" if i < left else "right")
    for row in rows:
        made.add_row(*row, style="bold" if row[0] in (FUSED, FUSED_COMPILED) else "")
    return made


def case_table(case: Case) -> Table:
    """All metrics of one case, a row for each implementation."""
    is_training = case["is_training_step"]
    columns = ["implementation", "median", "middle half", "samples", "time / fused", "peak memory"]
    columns += ["error/allowed"]
    of_update = ["GB/s", "of copy", "stored B/param", "extra B/param"]
    columns += ["update's share"] if is_training else of_update
    rows = []
    for name, values in case["implementations"].items():
        if "rejected" in values:
            rows.append([name, f"[bold red]rejected: {escape(values['rejected'])}"])
            continue
        row = [
            name,
            seconds_text(values["median_s"]),
            f"{seconds_text(values['low_s'])} – {seconds_text(values['high_s'])}",
            str(values["samples"]),
            number(ratio(name, FUSED)(case)),
            bytes_text(values.get("peak_bytes")),
            number(values.get("error_over_tolerance")),
        ]
        if is_training:
            share = update_share(case, name) if "compiled" in name else None
            row.append(percent(share, digits=1))
        else:
            row.append(number(values.get("GB_per_s")))
            row.append(percent(of_copy(name)(case)))
            row.append(number(measured(case, name, "stored_bytes_per_parameter")))
            row.append(number(measured(case, name, "peak_extra_bytes_per_parameter")))
        rows.append(row)
    return _table(case["title"], columns, rows)


def memory_table(case: Case) -> Table:
    """Peak memory of a training step that is not timed."""
    return _table(case["title"], MEMORY_COLUMNS[2:], [row[2:] for row in memory_rows(case)])


def summary_table(cases: list[Case]) -> Table:
    title = "Summary: × says how many times faster fused is"
    return _table(title, SUMMARY_COLUMNS, [summary_row(case) for case in cases], left=3)
