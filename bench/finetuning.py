"""Peak memory of full fine-tuning by mlx-lm's own command, with mlx.optimizers and each option of the fused AdamW, and
its parts: README's table and plot. pip install '.[cpu,bench,integration]' && python bench/finetuning.py --publish

The models have the shapes of Llama-3.2-1B (which needs 16 GB of free memory) and SmolLM-135M, and random weights; the
text is made up: memory depends on neither. mlx-lm runs in a process of its own for each row (memory/peak_of_module.py);
fused is the same command under `python -m mlx_fused_adam run`. Weights and state are the bytes of their arrays,
activations are measured by memory/activations.py, and gradients, with whatever the update allocates, are the rest.
`--publish` writes bench/results/finetuning.json, bench/results/memory.png and the tables in README.md and
docs/mlx-lm.md.
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
import mlx.optimizers
from mlx.utils import tree_flatten

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(ROOT)  # run as a script: import the package `bench`, not its modules

import mlx_fused_adam as fused  # noqa: E402
from bench.speed import machine  # noqa: E402
from bench.tables import documents, finetuning, plots, text  # noqa: E402
from mlx_fused_adam._tools.plan import CHOICES  # noqa: E402

MEMORY = ROOT / "bench" / "memory"
# Sizes of llama_files.py, and the dtypes of their parameters.
RUNS = [("llama-3.2-1b", "bfloat16"), ("smollm-135m", "bfloat16"), ("smollm-135m", "float32")]
TRIAL = [("tiny", "bfloat16")]
NAMES = {"llama-3.2-1b": "Llama-3.2-1B", "smollm-135m": "SmolLM-135M", "tiny": "a tiny model"}
ITERATIONS = 2
TOKENS = 32  # of a sequence, which mlx-lm pads to that
FUSED_UPDATES = r"\d tensor updates|\d updates of tensors"  # in the last line of `run`
Options = dict[str, Any] | None  # of the fused AdamW; None: mlx.optimizers
Row = dict[str, Any]


def command(model: Path, options: Options, iterations: int = ITERATIONS) -> list[str]:
    """The command that a user would type, except for the paths."""
    mlx_lm = [
        str(MEMORY / "peak_of_module.py"), "mlx_lm", "lora", "--train", "--fine-tune-type", "full", "--num-layers",
        "-1", "--optimizer", "adamw", "--model", str(model), "--data", str(model), "--batch-size", "1",
        "--iters", str(iterations), "--val-batches", "1", "--steps-per-report", "1",
        "--adapter-path", str(model / "out"),
    ]  # fmt: skip
    if options is None:
        return [sys.executable, *mlx_lm]
    return [sys.executable, "-m", "mlx_fused_adam", "run", "--adam-options", json.dumps(options), *mlx_lm]


def peak_bytes(model: Path, options: Options, iterations: int = ITERATIONS) -> int:
    """The peak of the whole run: loading, validation and training.

    Raises:
        RuntimeError: If it fails, or if fused has not updated anything.
    """
    peak, output = _peak(command(model, options, iterations))
    if options is not None and not re.search(FUSED_UPDATES, output):
        raise RuntimeError(f"no kernel has updated anything: {output}")
    return peak


def _peak(command: list[str]) -> tuple[int, str]:
    """What the program prints as its peak, and its errors."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    peak = re.search(r"^peak memory: (\d+) bytes$", done.stdout, re.MULTILINE)
    if done.returncode or not peak:
        raise RuntimeError(f"{done.stdout}{done.stderr}")
    return int(peak[1]), done.stderr


def stored_bytes(size: str, dtype: str, options: Options) -> dict[str, int]:
    """Of weights, and of the state of those that mlx-lm trains: all but the embedding and the last norm."""
    from bench.llama_files import model_of  # which needs mlx-lm

    model, _ = model_of(size, dtype)  # lazy, as the state is
    weights = sum(x.nbytes for _, x in tree_flatten(model.parameters()))
    model.freeze()
    for layer in model.layers:
        layer.unfreeze()
    optimizer = mlx.optimizers.AdamW(0.0) if options is None else fused.AdamW(0.0, **options)
    optimizer.init(model.trainable_parameters())
    return {"weights": weights, "state": sum(x.nbytes for _, x in tree_flatten(optimizer.state))}


def measure(console: Console, runs: list[tuple[str, str]]) -> list[Row]:
    from bench.llama_files import write_data, write_model

    rows = []
    for size, dtype in runs:
        with tempfile.TemporaryDirectory() as folder:
            write_model(Path(folder), size, dtype)
            write_data(Path(folder), words=3)  # at most TOKENS
            mx.clear_cache()
            activations, _ = _peak([sys.executable, str(MEMORY / "activations.py"), folder, str(TOKENS)])
            for options in (None, *(choice.options for choice in CHOICES if choice.dtype == dtype)):
                peak = peak_bytes(Path(folder), options)
                parts = {**stored_bytes(size, dtype, options), "activations": activations}
                parts["gradients"] = peak - sum(parts.values())
                rows.append(
                    {"model": NAMES[size], "dtype": dtype, "options": options, "peak_bytes": peak, "parts": parts}
                )
                console.print(f"{NAMES[size]}, {dtype}, {finetuning.name(rows[-1])}: {text.bytes_text(peak)}")
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
    console = Console()
    results = {
        "settings": {
            "command": f"python bench/finetuning.py{' --publish' if options.publish else ''}",
            "mlx-lm": version("mlx-lm"),
            "tokens": TOKENS,
        },
        "machine": machine.describe(mx.default_device().type.name, fused.AdamW(0.0).backend),
        "rows": measure(console, TRIAL if options.quick else RUNS),
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
