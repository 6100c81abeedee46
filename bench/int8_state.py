"""Which 8-bit codes should hold m and v? `pip install '.[bench]' && python bench/state_codes.py`.

Adam's moments are stored in each candidate after every step, and the update m / (sqrt(v) + eps) of float32 arithmetic is
compared with float64's, on synthetic gradients and on ones recorded from training (gradient_sources.py). The codes are those
of codes.py. `--publish` makes bench/results/state_codes.* and the tables in docs/state-codes.md.
"""

import argparse
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

try:
    import numpy as np
    from rich.console import Console
    from rich.progress import track
    from rich.table import Table
except ImportError as error:
    sys.exit(f"state_codes.py: {error}; install what it needs with: pip install '.[bench]'")

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(ROOT)  # run as a script: the package `bench` stands there, not its modules

from bench import gradient_sources, saved  # noqa: E402
from bench.codes import M_LEVELS, V_LEVELS, Storage, simulate_m, simulate_v  # noqa: E402
from bench.reference import Settings, adam  # noqa: E402

EPS = 1e-8
RESULTS = ROOT / "bench" / "results"
DOCS = ROOT / "docs" / "state-codes.md"

EXACT = Storage("float32")
BF16 = Storage("bfloat16")
BF16_RANDOM = Storage("bfloat16", "random")
M = Storage("bent 4th power", "even")
V = Storage("bent 4th power", "even")


class Pair(NamedTuple):
    """How m and v are stored, under a name."""

    name: str
    m: Storage
    v: Storage


CHOSEN = "8 bits: the choice"
CHOSEN_RANDOM = "… both random"
M_NEAREST = "… with m nearest"
FLASHOPTIM = "FlashOptim's: softsign, square"
PAIRS = [
    Pair("bf16, nearest", BF16, BF16),
    Pair("bf16, v random", BF16, BF16_RANDOM),
    Pair("bf16, v even", BF16, Storage("bfloat16", "even")),
    Pair(CHOSEN, M, V),
    Pair(CHOSEN_RANDOM, replace(M, rounding="random"), replace(V, rounding="random")),
    Pair(M_NEAREST, replace(M, rounding="nearest"), V),
    Pair("… both nearest", replace(M, rounding="nearest"), replace(V, rounding="nearest")),
    Pair("… with bf16 scales", replace(M, scale="bf16"), replace(V, scale="bf16")),
    Pair("… not bent", replace(M, levels="4th power"), replace(V, levels="shifted 4th power")),
    Pair("… with m square", replace(M, levels="square"), V),
    Pair("… with v not shifted", M, replace(V, levels="4th power")),
    Pair("… with v 8th power", M, replace(V, levels="8th power")),
    Pair("floats e4m3, e5m3, even", Storage("float e4m3", "even"), Storage("float e5m3", "even")),
    Pair(
        FLASHOPTIM,
        Storage("softsign", scale="maximum"),
        Storage("square", scale="maximum", keeps_nonzero=False),
    ),
    Pair(
        "… where non-zero v stays so",
        Storage("softsign", scale="maximum"),
        Storage("square", scale="maximum"),
    ),
]
V_ALONE = [
    Storage(levels, rounding, scale)
    for levels in V_LEVELS
    for rounding, scale in (
        ("nearest", "power of 2"),
        ("nearest", "bf16"),
        ("random", "power of 2"),
        ("random", "kept power of 2"),
        ("random", "bf16"),
        ("even", "power of 2"),
    )
]
M_ALONE = [
    Storage(levels, rounding, scale)
    for levels in M_LEVELS
    for rounding, scale in (
        ("nearest", "power of 2"),
        ("fade", "power of 2"),
        ("nearest", "bf16"),
        ("random", "power of 2"),
        ("even", "power of 2"),
    )
]
OTHER_BETAS = [(0.9, 0.98), (0.9, 0.95), (0.95, 0.999)]


def exact_updates(gradients: np.ndarray, betas: tuple[float, float]) -> np.ndarray:
    """Adam's updates in float64 throughout."""
    m = np.zeros(gradients.shape[1:])
    v = np.zeros(gradients.shape[1:])
    settings = Settings(1.0, *betas, EPS)
    updates = np.empty(gradients.shape)
    for i, g in enumerate(gradients.astype(np.float64)):
        step, m, v = adam(0.0, g, m, v, i + 1, settings)
        updates[i] = -step
    return updates


def errors(
    gradients: np.ndarray, exact: np.ndarray, m: Storage, v: Storage, betas: tuple[float, float]
) -> dict[str, float]:
    """How far the updates are off, with m and v stored so.

    mean   mean |error| in the last third of the steps over the element's mean |update|, averaged over elements
    tail   99.9th percentile of |error|, in the same steps, over the root mean square of the element's updates
    worst  the largest |update| over the exact one's, or over that root mean square where it is larger
    """
    rms = np.sqrt(np.square(exact).mean(axis=0))
    alive = rms > 0
    settled = len(gradients) * 2 // 3
    off = np.zeros(alive.sum())
    worst, tail = 0.0, []
    stream = zip(
        simulate_m(m, gradients, betas[0]), simulate_v(v, gradients, betas[1]), strict=True
    )
    for i, (new_m, new_v) in enumerate(stream):
        with np.errstate(divide="ignore", invalid="ignore"):
            update = np.abs(new_m / (np.sqrt(new_v) + np.float32(EPS)))[alive]
        signed = np.copysign(update, new_m[alive])
        true = exact[i][alive]
        worst = max(worst, float((update / np.maximum(np.abs(true), rms[alive])).max()))
        if i >= settled:
            error = np.abs(signed - true)
            off += error
            if (i - settled) % 3 == 0:
                tail.append((error / rms[alive]).astype(np.float32))
    usual = np.abs(exact[:, alive]).mean(axis=0)
    return {
        "mean": float((off / (len(exact) - settled) / usual).mean()),
        "tail": float(np.quantile(np.concatenate(tail), 0.999)),
        "worst": worst,
    }


def limit_of_v(storage: Storage, steps: int) -> float:
    """The mean of v after gradients of 1 only: 1 - 0.999**steps where nothing is lost."""
    for v in simulate_v(storage, gradient_sources.constant(steps, 8), 0.999):
        last = v
    return float(last.mean())


def dead_updates(pair: Pair, beta1: float, steps: int) -> float:
    """The mean |update|, in the last third of the steps, of weights that had gradients in the first 300 steps only.

    Exactly it is 0. The rest of their block goes on with gradients of 1, so that the scales stay.
    """
    gradients = gradient_sources.lognormal(0, steps, 4)
    gradients[300:, :, ::2] = 0
    gradients[:, :, 1::2] = 1
    stream = zip(
        simulate_m(pair.m, gradients, beta1), simulate_v(pair.v, gradients, 0.999), strict=True
    )
    total = 0.0
    for i, (m, v) in enumerate(stream):
        if i >= steps * 2 // 3:
            total += float(np.abs(m / (np.sqrt(v) + np.float32(EPS)))[:, ::2].mean())
    return total / (steps - steps * 2 // 3)


def measure(options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """All figures: candidates by name, then sources by name."""
    console.print("recording gradients of training")
    sources = gradient_sources.recorded(options.recorded_steps, options.recorded_blocks)
    sources |= gradient_sources.synthetic(options.steps, options.blocks)
    candidates = {"pairs": PAIRS}
    candidates["v alone"] = [Pair(s.name, EXACT, s) for s in V_ALONE]
    candidates["m alone"] = [Pair(s.name, s, EXACT) for s in M_ALONE]
    found: dict[str, Any] = {part: {p.name: {} for p in ps} for part, ps in candidates.items()}
    found["other betas"] = {}
    for name, gradients in track(sources.items(), "sources", console=console, transient=True):
        betas = (0.9, 0.999)
        exact = exact_updates(gradients, betas)
        for part, pairs in candidates.items():
            for pair in pairs:
                figures = errors(gradients, exact, pair.m, pair.v, betas)
                found[part][pair.name][name] = figures
        for betas in OTHER_BETAS:
            exact = exact_updates(gradients, betas)
            for pair in PAIRS:
                if pair.name in ("bf16, v random", CHOSEN, CHOSEN_RANDOM):
                    row = found["other betas"].setdefault(f"{pair.name}, β = {betas}", {})
                    row[name] = errors(gradients, exact, pair.m, pair.v, betas)
    found["v after steps of 1"] = {
        pair.name: limit_of_v(pair.v, options.constant_steps) for pair in PAIRS
    }
    found["updates without gradients"] = {
        pair.name: [dead_updates(pair, beta1, 2 * options.constant_steps) for beta1 in (0.9, 0.95)]
        for pair in PAIRS
    }
    found["settings"] = {k: v for k, v in vars(options).items() if isinstance(v, int)}
    return found


def percent(x: float) -> str:
    if x >= 10:
        return "> 1000 %" if x > 10 else "1000 %"
    return f"{100 * x:.0f} %" if x >= 0.1 else f"{100 * x:.1f} %"


def times(x: float) -> str:
    return f"{x:.1f}" if x < 10 else f"{x:.2g}" if x < 100 else f"{x:,.0f}".replace(",", " ")


def rows_of(part: dict[str, Any], figure: str) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of a table: candidates down, sources across."""
    form = times if figure == "worst" else percent
    columns = ["stored as", *next(iter(part.values()))]
    return columns, [[k, *(form(f[figure]) for f in row.values())] for k, row in part.items()]


def tables(found: dict[str, Any]) -> list[tuple[str, list[str], list[list[str]]]]:
    """Title, columns and rows of every table."""
    limits = [
        [k, f"{v:.4f}", *(f"{x:.2g}" for x in found["updates without gradients"][k])]
        for k, v in found["v after steps of 1"].items()
    ]
    steps = found["settings"]["constant_steps"]
    return [
        ("Mean error of the update", *rows_of(found["pairs"], "mean")),
        (
            "Worst update: how many times too large, of all elements and steps",
            *rows_of(found["pairs"], "worst"),
        ),
        (
            "99.9th percentile of the error, in parts of an element's usual update",
            *rows_of(found["pairs"], "tail"),
        ),
        (
            f"v after {steps} gradients of 1, without loss {1 - 0.999**steps:.4f}; and the mean update of weights whose "
            f"gradients stopped {2 * steps - 300} steps ago while those of their neighbours did not, without loss 0",
            ["stored as", "v", "update, β₁ = 0.9", "β₁ = 0.95"],
            limits,
        ),
        ("v alone: mean error of the update", *rows_of(found["v alone"], "mean")),
        ("v alone: worst update", *rows_of(found["v alone"], "worst")),
        ("m alone: mean error of the update", *rows_of(found["m alone"], "mean")),
        ("m alone: worst update", *rows_of(found["m alone"], "worst")),
        ("Other betas: mean error of the update", *rows_of(found["other betas"], "mean")),
    ]


def markdown(found: dict[str, Any]) -> str:
    parts = [
        f"### {title}\n\n{saved.table(columns, rows)}" for title, columns, rows in tables(found)
    ]
    return "\n\n".join(parts) + "\n"


def documented(text: str, found: dict[str, Any]) -> str:
    """The page with its tables, which stand between two comments, made anew."""
    shown = tables(found)[:2] + tables(found)[3:4]
    parts = [f"**{title}**\n\n{saved.table(columns, rows)}" for title, columns, rows in shown]
    inner = "\n\n".join(parts)
    new, count = re.subn(
        r"(<!-- tables -->\n).*?(\n<!-- end of tables -->)",
        lambda found: found[1] + inner + found[2],
        text,
        flags=re.DOTALL,
    )
    if count != 1:
        raise ValueError("the page must have one place for the tables")
    return new


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--steps", type=int, default=1500, help="of synthetic gradients")
    add("--blocks", type=int, default=40, help="of 32 elements, of synthetic gradients")
    add("--recorded-steps", type=int, default=400, help="of training")
    add("--recorded-blocks", type=int, default=400, help="of all of a model's tensors")
    add("--constant-steps", type=int, default=6000, help="of gradients of 1")
    add("--quick", action="store_true", help="few steps and blocks: to see that it runs")
    add("--json", type=Path, help="file for all figures")
    add("--markdown", type=Path, help="file for all tables")
    add("--publish", action="store_true", help="make the files that the project shows")
    options = parser.parse_args(arguments)
    if options.quick and options.publish:
        parser.error("--publish is of a whole run, not of a --quick one")
    if options.quick:
        options.steps, options.blocks, options.constant_steps = 20, 2, 20
        options.recorded_steps, options.recorded_blocks = 6, 30
    for name in ("steps", "blocks", "recorded_steps", "recorded_blocks", "constant_steps"):
        if getattr(options, name) < 5 and "block" not in name or getattr(options, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is too small")
    if options.publish:
        options.json = RESULTS / "state_codes.json"
        options.markdown = RESULTS / "state_codes.md"
    return options


def main(arguments: list[str] | None = None) -> None:
    options = parse_arguments(arguments)
    console = Console()
    console.width = max(console.width, 220)  # a column for each source
    found = measure(options, console)
    for title, columns, rows in tables(found):
        table = Table(*columns, title=title, title_justify="left", title_style="bold")
        for row in rows:
            table.add_row(*row, style="bold" if row[0] == CHOSEN else "")
        console.print(table)
    if options.json:
        saved.save_json(options.json, found)
    if options.markdown:
        options.markdown.write_text(markdown(found), encoding="utf-8")
    if options.publish:
        page = DOCS.read_text(encoding="utf-8")
        DOCS.write_text(documented(page, found), encoding="utf-8")


if __name__ == "__main__":
    main()
