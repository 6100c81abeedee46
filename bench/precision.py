"""Measures what 16-bit weights and smaller states cost in loss: `pip install '.[bench]' && python bench/precision.py`.

A small character model (accuracy/character_model.py) is trained with float32 (the reference), with mlx.optimizers and
with each option, in two regimes: from scratch, and fine-tuning on other text at a small learning rate, where rounding
to nearest loses updates. Each has three seeds; a difference from float32 counts where it is larger than the spread of
float32's seeds. `--publish` writes bench/results/precision.* and the table in docs/options.md, in about
ten minutes on two cores.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path
from typing import Any

try:
    import matplotlib  # noqa: F401  found missing now rather than after all the runs
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
except ImportError as error:
    sys.exit(f"precision.py: {error}; install what it needs with: pip install '.[bench]'")

import mlx.core as mx

import mlx_fused_adam as fused

ROOT = Path(__file__).resolve().parent.parent
if __name__ in ("__main__", "__mp_main__") and not __package__:
    sys.path[0] = str(ROOT)  # run as a script: import the package `bench`, not its modules

from bench.accuracy.training_runs import (  # noqa: E402
    BEFORE,
    REGIMES,
    SEEDS,
    SETTINGS,
    STEPS_OF_A_MEAN,
    Rejected,
    final_steps,
    train,
    train_before,
    use_one_thread,
)
from bench.tables import documents, plots, precision, text  # noqa: E402

Run = dict[str, Any]
QUICK_STEPS = 6


def run(options: argparse.Namespace, console: Console) -> tuple[list[Run], list[str]]:
    """The results of all runs in the order of REGIMES, SETTINGS and SEEDS, and why some were rejected."""
    found: dict[tuple, Run] = {}
    rejected = []
    wanted = [(setting, regime, seed) for regime in REGIMES for setting in SETTINGS for seed in options.seeds]
    with (
        ProcessPoolExecutor(options.jobs, get_context("spawn"), use_one_thread) as pool,
        Progress(console=console, transient=True) as progress,
    ):
        before = pool.submit(train_before, options.steps or BEFORE.steps, options.device, options.quick)
        jobs = {
            pool.submit(
                train,
                *key,
                options.steps or key[1].steps,
                options.device,
                options.quick,
                before.result() if key[1].is_trained_before else None,
            ): key
            for key in wanted
        }
        for job in progress.track(as_completed(jobs), total=len(jobs), description="runs"):
            setting, regime, seed = jobs[job]
            try:
                found[jobs[job]] = job.result()
            except Rejected as reason:
                rejected.append(str(reason))
            else:
                loss = found[jobs[job]]["final_loss"]
                console.print(f"{regime.name}, {setting.name}, seed {seed}: final loss {loss:.4f}")
    return [found[key] for key in wanted if key in found], rejected


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="precision.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--device", choices=["cpu", "gpu"], default="gpu" if mx.metal.is_available() else "cpu")
    add("--steps", type=int, metavar="N", help="of each run")
    add("--jobs", type=int, metavar="N", help="runs at once (default: one on each core)")
    add("--json", type=Path, metavar="FILE", help="save the results")
    add("--markdown", type=Path, metavar="FILE", help="save the table as Markdown")
    add("--plot", type=Path, metavar="FILE", help="save a plot (.png, .svg)")
    add("--quick", action="store_true", help="a tiny model and few steps: a trial")
    add("--publish", action="store_true", help="write the published files")
    options = parser.parse_args(arguments)
    if options.device == "gpu" and not mx.is_available(mx.gpu):
        parser.error("this MLX has no GPU")
    if options.publish:
        if set(arguments) - {"--publish", "--device", options.device}:
            parser.error("only --device goes with --publish")
        stem = "precision" if options.device == "cpu" else f"{options.device}-precision"
        options.json = documents.RESULTS / f"{stem}.json"
        options.markdown = documents.RESULTS / f"{stem}.md"
        options.plot = documents.RESULTS / f"{stem}.png"
    options.is_whole = options.steps is None and not options.quick
    if options.quick and options.steps is None:
        options.steps = QUICK_STEPS
    options.seeds = SEEDS[:2] if options.quick else SEEDS
    if options.jobs is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        options.jobs = 1 if options.device == "gpu" else cores or 1
    for name in ("steps", "jobs"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1 but got {getattr(options, name)}")
    if options.plot and options.plot.suffix not in plots.SUFFIXES:
        parser.error(f"{options.plot} must end in one of {', '.join(plots.SUFFIXES)}")
    for path in (options.json, options.markdown, options.plot):
        if path and not path.parent.is_dir():
            parser.error(f"there is no folder {path.parent}")
    return options


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    mx.set_default_device(getattr(mx, options.device))
    console = Console()
    if not console.is_terminal:
        console = Console(width=170)
    backend = fused.Adam(1e-3).backend
    found, rejected = run(options, console)
    reasons = [] if options.is_whole else ["not all steps were run as they are by default"]
    reasons += [f"rejected: {reason}" for reason in rejected]
    results = {
        "machine": {
            "device": options.device,
            "backend": backend,
            "versions": {"mlx": mx.__version__, "mlx-fused-adam": fused.__version__},
        },
        "settings": {
            "command": " ".join(["python bench/precision.py", *arguments]),
            "date": datetime.now(timezone.utc).date().isoformat(),
            "steps_of_a_mean": STEPS_OF_A_MEAN,
            "regimes": [
                {
                    "name": regime.name,
                    "steps": options.steps or regime.steps,
                    "final_steps": final_steps(options.steps or regime.steps),
                    "learning_rate": regime.learning_rate,
                }
                for regime in REGIMES
            ],
            "not_publishable": reasons,
        },
        "runs": found,
    }
    columns = precision.columns(results)
    table = Table(*columns, title="Loss and memory of each option", title_justify="left")
    for row in precision.rows(results):
        table.add_row(*row)
    console.print(table)
    for reason in rejected:
        print(f"precision.py: rejected: {reason}", file=sys.stderr)
    if options.publish and reasons:
        print(f"precision.py: not published: {'; '.join(reasons)}", file=sys.stderr)
        return 1
    if options.json:
        text.save_json(options.json, results)
    if options.plot:
        from bench.tables import precision_plot

        precision_plot.save(options.plot, results)
        console.print(f"plot: {options.plot}")
    if options.markdown:
        options.markdown.write_text(precision.markdown(results), encoding="utf-8")
    if options.publish and options.device == "cpu":
        documents.write()
    return 1 if rejected else 0


if __name__ == "__main__":
    sys.exit(main())
