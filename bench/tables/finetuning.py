"""Tables of bench/finetuning.py: peak memory of mlx-lm's full fine-tuning."""

from typing import Any

from .names import FUSED, INT8_STATE, MLX, in_markdown
from .text import bytes_text, percent, table

Results = dict[str, Any]  # the content of the JSON file: settings, machine, rows

COLUMNS = ["parameters", "optimizer", "peak memory", "of mlx.optimizers"]
HEADLINE = {
    MLX: "`mlx.optimizers.AdamW`",
    FUSED: "`fused.AdamW`",
    INT8_STATE: '`fused.AdamW`, `state_dtype="int8"`',
}


def rows(results: Results) -> list[list[str]]:
    """Each peak beside mlx.optimizers' with parameters of the same dtype."""
    found = results["rows"]
    base = {row["dtype"]: row["peak_bytes"] for row in found if row["implementation"] == MLX}
    return [
        [
            row["dtype"],
            in_markdown(row["implementation"]),
            bytes_text(row["peak_bytes"]),
            percent(row["peak_bytes"] / base[row["dtype"]]),
        ]
        for row in found
    ]


def headline(results: Results) -> str:
    """README's table: bfloat16 parameters, three optimizers."""
    shown = {
        row["implementation"]: [HEADLINE[row["implementation"]], *cells[2:]]
        for row, cells in zip(results["rows"], rows(results), strict=True)
        if row["dtype"] == "bfloat16" and row["implementation"] in HEADLINE
    }
    return table(COLUMNS[1:], [shown[name] for name in HEADLINE])


def markdown(results: Results) -> str:
    """The full table, and how it was measured."""
    settings, machine = results["settings"], results["machine"]
    return (
        f"{table(COLUMNS, rows(results), left=2)}\n\n"
        f"`{settings['command']}`: shapes of {settings['model']}, batch 1; mlx-lm {settings['mlx-lm']}, "
        f"mlx {machine['versions']['mlx']}, device {machine['device']}."
    )
