"""Compares ways to store m and v in 8 or 4 bits: `pip install '.[bench]' && python bench/quantized_state.py`.

m and v are stored in each candidate after every step, and the update m / (sqrt(v) + eps) of float32 arithmetic is
compared with float64's, on gradients recorded from training and on synthetic ones (accuracy/gradients.py). In 4 bits,
where noise is no longer small, a model is trained with each too (accuracy/stored_training.py). `--publish` writes
bench/results/int8_state.json or, with `--bits 4`, int4_state.json, and a table in docs/state-codes.md, in about ten
minutes each.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

try:
    import numpy as np
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
except ImportError as error:
    sys.exit(f"quantized_state.py: {error}; install what it needs with: pip install '.[bench]'")

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(ROOT)  # run as a script: import the package `bench`, not its modules

from bench.accuracy import gradients as gradient_sources  # noqa: E402
from bench.accuracy.storage import Storage, simulate_m, simulate_v  # noqa: E402
from bench.accuracy.stored_training import REGIMES, held_out_loss  # noqa: E402
from bench.accuracy.training_runs import Weights, train_before  # noqa: E402
from bench.speed.reference import Settings, adam  # noqa: E402
from bench.tables import documents, quantized_state, text  # noqa: E402

EPS = 1e-8
BETAS = (0.9, 0.999)

BF16 = Storage("bfloat16")
M = V = Storage("bent 4th power", "even")
SOFTSIGN, SQUARE = Storage("softsign", scale="maximum"), Storage("square", scale="maximum")
CHOSEN = quantized_state.CHOSEN
IN_8_BITS: dict[str, tuple[Storage, Storage]] = {
    "bfloat16, nearest": (BF16, BF16),
    "bfloat16, v stochastic": (BF16, replace(BF16, rounding="random")),
    CHOSEN[8]: (M, V),
    "… fresh random numbers": (replace(M, rounding="random"), replace(V, rounding="random")),
    "… m to nearest": (replace(M, rounding="nearest"), V),
    "… both to nearest": (replace(M, rounding="nearest"), replace(V, rounding="nearest")),
    "… bfloat16 scales": (replace(M, scale="bf16"), replace(V, scale="bf16")),
    "… not bent": (replace(M, table="4th power"), replace(V, table="shifted 4th power")),
    "… m: square": (replace(M, table="square"), V),
    "… v: not shifted": (M, replace(V, table="4th power")),
    "… v: 8th power": (M, replace(V, table="8th power")),
    "floats e4m3, e5m3": (Storage("float e4m3", "even"), Storage("float e5m3", "even")),
    "FlashOptim's: softsign, square": (SOFTSIGN, replace(SQUARE, keeps_nonzero=False)),
    "… where non-zero v stays so": (SOFTSIGN, SQUARE),
}

M4, V4 = Storage("4 bits", "even", "bf16"), Storage("4 bits", "even")
IN_4_BITS: dict[str, tuple[Storage, Storage]] = {
    CHOSEN[8]: (M, V),
    CHOSEN[4]: (M4, V4),
    "… m alone": (M4, V),
    "… v alone": (M, V4),
    "… fresh random numbers": (replace(M4, rounding="random"), replace(V4, rounding="random")),
    "… both to nearest": (replace(M4, rounding="nearest"), replace(V4, rounding="nearest")),
    "… powers of two as scales": (replace(M4, scale="power of 2"), V4),
    "… bfloat16 scales": (M4, replace(V4, scale="bf16")),
    "… squares, 4th powers": (replace(M4, table="4 bits, square"), replace(V4, table="4 bits, 4th power")),
    "… v: shifted by 1": (M4, replace(V4, table="4 bits, shifted by 1")),
    "… v: square": (M4, replace(V4, table="4 bits, square")),
    "… v: float e3m1": (M4, replace(V4, table="4 bits, float e3m1")),
}
SIZES = {8: (1500, 40, 400, 400, 6000, 0), 4: (400, 10, 150, 150, 2000, 160)}
CANDIDATES = {8: IN_8_BITS, 4: IN_4_BITS}


def exact_updates(gradients: np.ndarray) -> np.ndarray:
    """Adam's updates in float64 throughout."""
    m = v = np.zeros(gradients.shape[1:])
    settings = Settings(1.0, *BETAS, EPS)
    updates = np.empty(gradients.shape)
    for i, g in enumerate(gradients.astype(np.float64)):
        step, m, v = adam(0.0, g, m, v, i + 1, settings)
        updates[i] = -step
    return updates


def errors(gradients: np.ndarray, exact: np.ndarray, m: Storage, v: Storage) -> dict[str, float]:
    """The errors of the updates, with m and v stored so.

    mean   mean |error| in the last third of the steps over the element's mean |update|, averaged over elements
    worst  the largest |update| over the exact one's, or over the element's root mean square where that is larger
    """
    rms = np.sqrt(np.square(exact).mean(axis=0))
    alive = rms > 0
    settled = len(gradients) * 2 // 3
    off, worst = np.zeros(alive.sum()), 0.0
    stream = zip(simulate_m(m, gradients, BETAS[0]), simulate_v(v, gradients, BETAS[1]), strict=True)
    for i, (new_m, new_v) in enumerate(stream):
        with np.errstate(divide="ignore", invalid="ignore"):
            update = np.abs(new_m / (np.sqrt(new_v) + np.float32(EPS)))[alive]
        true = exact[i][alive]
        worst = max(worst, float((update / np.maximum(np.abs(true), rms[alive])).max()))
        if i >= settled:
            off += np.abs(np.copysign(update, new_m[alive]) - true)
    usual = np.abs(exact[:, alive]).mean(axis=0)
    return {"mean": float((off / (len(exact) - settled) / usual).mean()), "worst": worst}


def limit_of_v(storage: Storage, steps: int) -> float:
    """The mean of v after gradients of 1 only: 1 - 0.999**steps where nothing is lost."""
    for v in simulate_v(storage, np.ones((steps, 8, 32), np.float32), BETAS[1]):
        last = v
    return float(last.mean())


def update_without_gradient(m: Storage, v: Storage, steps: int, beta1: float = BETAS[0]) -> float:
    """The mean |update|, in the last third of the steps, of weights that had gradients in the first 300 steps only.

    The exact one is 0. The rest of their block has gradients of 1 throughout, which keeps the scales.
    """
    gradients = gradient_sources.lognormal(0, steps, 4)
    gradients[300:, :, ::2] = 0
    gradients[:, :, 1::2] = 1
    total, settled = 0.0, steps * 2 // 3
    stream = zip(simulate_m(m, gradients, beta1), simulate_v(v, gradients, BETAS[1]), strict=True)
    for i, (new_m, new_v) in enumerate(stream):
        if i >= settled:
            total += float(np.abs(new_m / (np.sqrt(new_v) + np.float32(EPS)))[:, ::2].mean())
    return total / (steps - settled)


def losses(m: Storage, v: Storage, steps: int, start: Weights) -> dict[str, float]:
    """The held-out loss after each regime."""
    return {regime.name: held_out_loss(regime, m, v, steps, start) for regime in REGIMES}


def measure(bits: int, settings: dict[str, int], console: Console) -> dict[str, Any]:
    """The content of the JSON file."""
    console.print("recording gradients of training")
    sources = gradient_sources.recorded(settings["recorded_steps"], settings["recorded_blocks"])
    sources |= gradient_sources.synthetic(settings["steps"], settings["blocks"])
    exact = {name: exact_updates(gradients) for name, gradients in sources.items()}
    found = {}
    constant_steps = settings["constant_steps"]
    training_steps = settings["training_steps"]
    if bits == 4:
        console.print("training before fine-tuning")
        start = train_before(2 * training_steps, "cpu")
        plain = losses(Storage("float32"), Storage("float32"), training_steps, start)
    for name, (m, v) in track(CANDIDATES[bits].items(), "candidates", console=console, transient=True):
        of_sources = {k: errors(gradients, exact[k], m, v) for k, gradients in sources.items()}
        found[name] = {
            "mean_error": {k: x["mean"] for k, x in of_sources.items()},
            "worst_update": max(x["worst"] for x in of_sources.values()),
            "v_after_ones": limit_of_v(v, constant_steps),
            "update_without_gradient": update_without_gradient(m, v, 2 * constant_steps),
        }
        if bits == 4:
            found[name]["over_float32"] = {k: x / plain[k] - 1 for k, x in losses(m, v, training_steps, start).items()}
    return {"settings": settings, "candidates": found}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="quantized_state.py", description=__doc__)
    parser.add_argument("--bits", type=int, choices=[8, 4], default=8)
    parser.add_argument("--quick", action="store_true", help="few steps and blocks: a trial")
    parser.add_argument("--json", type=Path, metavar="FILE", help="save the results")
    parser.add_argument("--publish", action="store_true", help="write the published files")
    options = parser.parse_args(arguments)
    if options.quick and options.publish:
        parser.error("--publish needs a whole run, not --quick")
    if options.publish:
        options.json = documents.RESULTS / f"int{options.bits}_state.json"
    names = ("steps", "blocks", "recorded_steps", "recorded_blocks", "constant_steps", "training_steps")
    sizes = (20, 2, 6, 30, 20, 2) if options.quick else SIZES[options.bits]
    console = Console()
    console.width = max(console.width, 180)  # a column for each source
    found = measure(options.bits, dict(zip(names, sizes, strict=True)), console)
    columns, rows = quantized_state.columns_and_rows(found)
    shown = Table(*columns)
    for row in rows:
        shown.add_row(*row, style="bold" if row[0] == CHOSEN[options.bits] else "")
    console.print(shown)
    if options.json:
        text.save_json(options.json, found)
    if options.publish:
        documents.write()


if __name__ == "__main__":
    main()
