"""Tables of bench/finetuning.py: peak memory of mlx-lm's full fine-tuning, and its parts."""

from typing import Any

from .names import MLX, as_code
from .text import bytes_text, percent, table

Results = dict[str, Any]  # the content of the JSON file: settings, machine, rows
Row = dict[str, Any]

PARTS = ("weights", "state", "gradients", "activations")
COLUMNS = ["model", "parameters", "optimizer", "peak memory", "of mlx.optimizers", *PARTS]
# README's rows.
HEADLINE_MODEL = "Llama-3.2-1B"
HEADLINE: list[dict[str, Any] | None] = [None, {}, {"state_dtype": "int8"}, {"state_dtype": "int4"}]


def name(row: Row) -> str:
    """The optimizer in a table: its options as code, or its name."""
    options = row["options"]
    return MLX if options is None else f"`{as_code(options)}`" if options else "fused"


def share(row: Row, results: Results) -> float:
    """The peak, over that of mlx.optimizers with the same model."""
    case = row["model"], row["dtype"]
    base = next(x for x in results["rows"] if (x["model"], x["dtype"]) == case and x["options"] is None)
    return row["peak_bytes"] / base["peak_bytes"]


def rows(results: Results) -> list[list[str]]:
    return [
        [
            row["model"],
            row["dtype"],
            name(row),
            bytes_text(row["peak_bytes"]),
            percent(share(row, results)),
            *(bytes_text(row["parts"][part]) for part in PARTS),
        ]
        for row in results["rows"]
    ]


def headline(results: Results) -> str:
    """README's table."""
    found = []
    for options in HEADLINE:
        row = next(x for x in results["rows"] if x["model"] == HEADLINE_MODEL and x["options"] == options)
        code = "`mlx.optimizers.AdamW`" if options is None else "`fused.AdamW`"
        code += f", `{as_code(options)}`" if options else ""
        found.append([code, bytes_text(row["peak_bytes"]), percent(share(row, results))])
    return table(COLUMNS[2:5], found)


def markdown(results: Results) -> str:
    """The full table, and how it was measured."""
    settings, machine = results["settings"], results["machine"]
    return (
        f"{table(COLUMNS, rows(results), left=3)}\n\n"
        f"`{settings['command']}`: batch 1, {settings['tokens']} tokens; mlx-lm {settings['mlx-lm']}, "
        f"mlx {machine['versions']['mlx']}, device {machine['device']}."
    )
