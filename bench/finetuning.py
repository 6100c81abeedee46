"""Peak memory of full fine-tuning by mlx-lm's own command, with mlx.optimizers and the fused AdamW: README's table and
plot. pip install '.[cpu,bench,integration]' && python bench/finetuning.py --publish

The model has the shapes of SmolLM-135M and random weights, and the text is made up: memory depends on neither. mlx-lm
runs in a process of its own for each row (memory/peak_of_module.py); MLX counts the peak of parameters, moments,
gradients and activations. Fused is the same command under `python -m mlx_fused_adam run`. `--publish` writes
bench/results/finetuning.json, bench/results/memory.png and the tables in README.md and docs/mlx-lm.md, in about ten
minutes on two cores.
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
    sys.exit(f"finetuning.py: {error}; install what it needs with: pip install '.[cpu,bench,integration]'")

import mlx.core as mx

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(ROOT)  # run as a script: import the package `bench`, not its modules

import mlx_fused_adam as fused  # noqa: E402
from bench.speed import machine  # noqa: E402
from bench.tables import documents, finetuning, plots, text  # noqa: E402
from bench.tables.names import ALL_OF_BFLOAT16, FUSED, MLX, OF_FLOAT32, OPTIONS  # noqa: E402

PEAK_OF_MODULE = ROOT / "bench" / "memory" / "peak_of_module.py"
MODELS = {"smollm-135m": "SmolLM-135M", "tiny": "a tiny model"}  # sizes of llama_files.py
FUSED_UPDATES = r"\d tensor updates|\d updates of tensors"  # in the last line of `run`
Row = dict[str, Any]


def command(model: Path, iterations: int, implementation: str) -> list[str]:
    """The command that a user would type, except for the paths."""
    mlx_lm = [
        str(PEAK_OF_MODULE), "mlx_lm", "lora", "--train", "--fine-tune-type", "full", "--num-layers", "-1",
        "--optimizer", "adamw", "--model", str(model), "--data", str(model), "--batch-size", "1",
        "--iters", str(iterations), "--val-batches", "1", "--steps-per-report", "1",
        "--adapter-path", str(model / "out"),
    ]  # fmt: skip
    if implementation == MLX:
        return [sys.executable, *mlx_lm]
    options = json.dumps(OPTIONS.get(implementation, {}))
    return [sys.executable, "-m", "mlx_fused_adam", "run", "--adam-options", options, *mlx_lm]


def peak_bytes(model: Path, iterations: int, implementation: str) -> int:
    """The peak of the whole run: loading, validation and training.

    Raises:
        RuntimeError: If it fails, or if fused has not updated anything.
    """
    done = subprocess.run(command(model, iterations, implementation), capture_output=True, text=True, check=False)
    peak = re.search(r"^peak memory: (\d+) bytes$", done.stdout, re.MULTILINE)
    if done.returncode or not peak:
        raise RuntimeError(f"{implementation}: {done.stdout}{done.stderr}")
    if implementation != MLX and not re.search(FUSED_UPDATES, done.stderr):
        raise RuntimeError(f"{implementation}: no kernel has updated anything: {done.stderr}")
    return int(peak[1])


def measure(console: Console, size: str, iterations: int) -> list[Row]:
    from bench.llama_files import write_data, write_model  # which needs mlx-lm

    rows = []
    for dtype, options in (("float32", OF_FLOAT32), ("bfloat16", ALL_OF_BFLOAT16)):
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), size, dtype)
            write_data(Path(folder))
            for name in (MLX, FUSED, *options):
                peak = peak_bytes(Path(folder), iterations, name)
                rows.append({"dtype": dtype, "implementation": name, "peak_bytes": peak})
                console.print(f"{dtype}, {name}: {text.bytes_text(peak)}")
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="finetuning.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="save a plot (.png, .svg)")
    parser.add_argument("--quick", action="store_true", help="a tiny model: a trial")
    parser.add_argument("--publish", action="store_true", help="write README's table and plot")
    options = parser.parse_args(arguments)
    if options.publish:
        if options.quick:
            parser.error("--publish needs the whole model, not --quick")
        options.json = documents.RESULTS / "finetuning.json"
        options.plot = documents.RESULTS / "memory.png"
    if importlib.util.find_spec("mlx_lm") is None:
        sys.exit("finetuning.py: no mlx-lm; install it with: pip install '.[cpu,bench,integration]'")
    size = "tiny" if options.quick else "smollm-135m"
    console = Console()
    results = {
        "settings": {
            "command": f"python bench/finetuning.py{' --publish' if options.publish else ''}",
            "model": MODELS[size],
            "mlx-lm": version("mlx-lm"),
        },
        "machine": machine.describe(mx.default_device().type.name, fused.AdamW(0.0).backend),
        "rows": measure(console, size, iterations=3),
    }
    table = Table(*finetuning.COLUMNS)
    for row in finetuning.rows(results):
        table.add_row(*row)
    console.print(table)
    if options.quick:
        console.print("A trial: with so tiny a model, the package's self-check takes most memory.")
    if options.json:
        text.save_json(options.json, results)
    if options.plot:
        plots.save_finetuning(options.plot, results)
        console.print(f"plot: {options.plot}")
    if options.publish:
        documents.write()


if __name__ == "__main__":
    main()
