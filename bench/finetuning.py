"""Peak memory of full fine-tuning by mlx-lm's own command, stock and ours with each option:
pip install '.[cpu,bench,integration]' && python bench/finetuning.py --publish

The model has the shapes of SmolLM-135M and random weights, and the text is made up: memory depends on neither. mlx-lm runs
in a process of its own for each row (peak_memory.py); MLX counts the peak of parameters, moments, gradients and activations.
Ours is the same command under `python -m mlx_fused_adam run`. `--publish` writes bench/results/finetuning.json and the
table in README, in about ten minutes on two cores.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

try:
    from rich.console import Console
    from rich.table import Table
except ImportError as error:
    sys.exit(
        f"finetuning.py: {error}; install what it needs with: pip install '.[cpu,bench,integration]'"
    )

import mlx.core as mx

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(ROOT)  # run as a script: the package `bench` stands there, not its modules

import mlx_fused_adam as fused  # noqa: E402
from bench import machine, saved  # noqa: E402
from bench.options import ALL_OF_BFLOAT16, OF_FLOAT32, OPTIONS, as_code  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "finetuning.json"
PEAK_MEMORY = Path(__file__).with_name("peak_memory.py")
SIZE = "smollm-135m"
STOCK, OURS = "stock", "ours"
Row = dict[str, Any]


def command(model: Path, iterations: int, contender: str) -> list[str]:
    """What a user would type, but for the paths."""
    mlx_lm = [
        str(PEAK_MEMORY), "mlx_lm", "lora", "--train", "--fine-tune-type", "full", "--num-layers", "-1", "--optimizer", "adamw",
        "--model", str(model), "--data", str(model), "--batch-size", "1", "--iters", str(iterations),
        "--val-batches", "1", "--steps-per-report", "1", "--adapter-path", str(model / "out"),
    ]  # fmt: skip
    if contender == STOCK:
        return [sys.executable, *mlx_lm]
    options = json.dumps(OPTIONS.get(contender, {}))
    return [sys.executable, "-m", "mlx_fused_adam", "run", "--adam-options", options, *mlx_lm]


def peak_bytes(model: Path, iterations: int, contender: str) -> int:
    """Of the whole run: loading, validation and training.

    Raises:
        RuntimeError: If it fails, or if ours has not updated anything.
    """
    done = subprocess.run(
        command(model, iterations, contender), capture_output=True, text=True, check=False
    )
    peak = re.search(r"^peak memory: (\d+) bytes$", done.stdout, re.MULTILINE)
    if done.returncode or not peak:
        raise RuntimeError(f"{contender}: {done.stdout}{done.stderr}")
    if contender != STOCK and "updates of tensors" not in done.stderr:
        raise RuntimeError(f"{contender}: no kernel has updated anything: {done.stderr}")
    return int(peak[1])


def measure(console: Console, size: str, iterations: int) -> list[Row]:
    from bench.llama_files import write_data, write_model  # which needs mlx-lm

    rows = []
    for dtype, options in (("float32", OF_FLOAT32), ("bfloat16", ALL_OF_BFLOAT16)):
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), size, dtype)
            write_data(Path(folder))
            for contender in (STOCK, OURS, *options):
                peak = peak_bytes(Path(folder), iterations, contender)
                rows.append({"dtype": dtype, "contender": contender, "peak_bytes": peak})
                console.print(f"{dtype}, {contender}: {saved.bytes_text(peak)}")
    return rows


COLUMNS = ["parameters", "optimizer", "peak", "of stock"]


def cells(rows: list[Row]) -> list[list[str]]:
    """The table's rows, each peak beside what it is of stock's with the same parameters."""
    stock = {row["dtype"]: row["peak_bytes"] for row in rows if row["contender"] == STOCK}
    return [
        [
            row["dtype"],
            f"`{as_code(OPTIONS[row['contender']])}`"
            if row["contender"] in OPTIONS
            else row["contender"],
            saved.bytes_text(row["peak_bytes"]),
            saved.percent(row["peak_bytes"] / stock[row["dtype"]]),
        ]
        for row in rows
    ]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="finetuning.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the figures")
    parser.add_argument("--quick", action="store_true", help="a tiny model: a trial")
    parser.add_argument("--publish", action="store_true", help="write README's table")
    options = parser.parse_args(arguments)
    if options.publish:
        if options.quick:
            parser.error("--publish is of the whole model")
        options.json = RESULTS
    return options


def main() -> None:
    options = parse_arguments()
    if importlib.util.find_spec("mlx_lm") is None:
        sys.exit(
            "finetuning.py: no mlx-lm; install it with: pip install '.[cpu,bench,integration]'"
        )
    console = Console()
    rows = measure(console, "tiny" if options.quick else SIZE, iterations=3)
    table = Table(*COLUMNS)
    for row in cells(rows):
        table.add_row(*row)
    console.print(table)
    if options.json:
        settings = {
            "command": "python bench/finetuning.py --publish" if options.publish else "trial",
            "size": "tiny" if options.quick else SIZE,
            "mlx-lm": version("mlx-lm"),
        }
        found = {
            "settings": settings,
            "machine": machine.describe(mx.default_device().type.name, fused.AdamW(0.0).backend),
            "rows": rows,
        }
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.publish:
        from bench import readme

        readme.main([])


if __name__ == "__main__":
    main()
