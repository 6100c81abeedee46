"""What do 16-bit weights and smaller states cost in loss? `pip install '.[bench]' && python bench/precision.py`.

The model of examples/train.py is trained on the same batches with float32 (the reference, and other seeds of its parameters
for the noise), with stock's and this package's 16-bit training, and with each option. Compared are the losses, and the bytes
that parameters and state take. The runs have half the example's steps, with its whole schedule. With 16-bit parameters all of
the model works in 16 bits. `--publish` makes bench/results/precision.* and the table in README.md, in about 20 minutes on two
cores.
"""

import argparse
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from datetime import datetime, timezone
from multiprocessing import get_context
from pathlib import Path

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
    sys.path[0] = str(ROOT)  # run as a script: the package `bench` stands there, not its modules

from bench import saved  # noqa: E402
from bench.example import parse_arguments as parse_example  # noqa: E402
from bench.precision_figures import (  # noqa: E402
    Results,
    Run,
    goal_rows,
    noise,
    options_text,
    over_reference,
    plain_percent,
    signed_percent,
    stored_bytes,
)
from bench.precision_runs import PIECE, SETTINGS, Refused, train, use_one_thread  # noqa: E402

RESULTS = ROOT / "bench" / "results"
QUICK_STEPS = 6


def run(options: argparse.Namespace, console: Console) -> tuple[list[Run], list[str]]:
    """The figures of all runs in the order of SETTINGS, and why some were refused."""
    found: dict[str, Run] = {}
    refused = []
    with (
        ProcessPoolExecutor(options.jobs, get_context("spawn"), use_one_thread) as pool,
        Progress(console=console, transient=True) as progress,
    ):
        jobs = {
            pool.submit(train, setting, options.steps, options.device, options.quick): setting
            for setting in SETTINGS
        }
        for job in progress.track(as_completed(jobs), total=len(jobs), description="runs"):
            name = jobs[job].name
            try:
                found[name] = job.result()
            except Refused as reason:
                refused.append(str(reason))
            else:
                console.print(f"{name}: final loss {found[name]['final_loss']:.4f}")
    return [found[s.name] for s in SETTINGS if s.name in found], refused


COLUMNS = [
    "parameters", "optimizer", "parameters, B/param", "state, B/param", "together", "final loss", "against float32",
    "held-out loss", "against float32",
]  # fmt: skip

GOAL_COLUMNS = ["parameters", "optimizer", "goal: loss above float32", "measured", "met"]


def rows(results: Results) -> list[list[str]]:
    return [
        [
            x["dtype"] + (f", seed {x['seed']}" if x["seed"] else ""),
            options_text(x),
            saved.number(x["parameter_bytes_per_parameter"]),
            saved.number(x["state_bytes_per_parameter"]),
            saved.number(stored_bytes(x)),
            f"{x['final_loss']:.4f}",
            signed_percent(over_reference(results, x)),
            f"{x['held_out_loss']:.4f}",
            signed_percent(over_reference(results, x, "held_out_loss")),
        ]
        for x in results["runs"]
    ]


def markdown(results: Results) -> str:
    settings, machine = results["settings"], results["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    text = [
        "# Loss and memory of each option",
        f"`{settings['command']}`, {settings['date']}; {versions}; device {machine['device']}, backend {machine['backend']}.",
    ]
    if settings["not_publishable"]:
        reasons = "; ".join(settings["not_publishable"])
        text.append(f"**Provisional, not to be quoted:** {reasons}.")
    text += [
        f"The model of examples/train.py, {settings['steps']} steps on the same batches. Final loss: the mean of the last "
        f"{settings['final_steps']} steps. Held-out loss: of text that was not trained on. Float32 runs from other parameters "
        f"at the start differ from the reference by up to {plain_percent(noise(results))} (final) and "
        f"{plain_percent(noise(results, 'held_out_loss'))} (held-out). With bfloat16 parameters activations and gradients "
        "are bfloat16 too; the loss itself is taken in float32. Bytes are those of the arrays.",
        saved.table(COLUMNS, rows(results), left=2),
        saved.table(GOAL_COLUMNS, goal_rows(results), left=2),
        "![Loss against float32, and bytes per parameter](precision.png)",
    ]
    return "\n\n".join(text) + "\n"


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="precision.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    default_steps = parse_example([]).steps // 2  # all of them would take 40 minutes
    add("--device", choices=["cpu", "gpu"], default="gpu" if mx.metal.is_available() else "cpu")
    add("--steps", type=int, metavar="N", help=f"of each run (default: {default_steps})")
    add("--jobs", type=int, metavar="N", help="runs at once (default: one on each core)")
    add("--json", type=Path, metavar="FILE", help="save all figures")
    add("--markdown", type=Path, metavar="FILE", help="save the table as Markdown")
    add("--plot", type=Path, metavar="FILE", help="save a picture (.png, .svg)")
    add("--quick", action="store_true", help="a tiny model and few steps: to see that it runs")
    add("--publish", action="store_true", help="the whole, into bench/results and README.md")
    options = parser.parse_args(arguments)
    if options.device == "gpu" and not mx.is_available(mx.gpu):
        parser.error("this MLX has no GPU")
    if options.publish:
        if set(arguments) - {"--publish", "--device", options.device}:
            parser.error("--publish goes with --device alone")
        stem = "precision" if options.device == "cpu" else f"{options.device}-precision"
        options.json = RESULTS / f"{stem}.json"
        options.markdown = RESULTS / f"{stem}.md"
        options.plot = RESULTS / f"{stem}.png"
    options.is_whole = options.steps is None and not options.quick
    if options.steps is None:
        options.steps = QUICK_STEPS if options.quick else default_steps
    if options.jobs is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        options.jobs = 1 if options.device == "gpu" else cores or 1
    for name in ("steps", "jobs"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} must be at least 1 but got {getattr(options, name)}")
    if options.plot and options.plot.suffix not in (".png", ".svg", ".pdf"):
        parser.error(f"{options.plot} must end in one of .png, .svg, .pdf")
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
    found, refused = run(options, console)
    reasons = [] if options.is_whole else ["not all steps were run as they are by default"]
    reasons += [f"refused: {reason}" for reason in refused]
    results = {
        "machine": {
            "device": options.device,
            "backend": backend,
            "versions": {"mlx": mx.__version__, "mlx-fused-adam": fused.__version__},
        },
        "settings": {
            "command": " ".join(["python bench/precision.py", *arguments]),
            "date": datetime.now(timezone.utc).date().isoformat(),
            "steps": options.steps,
            "steps_of_a_piece": PIECE,
            "final_steps": max(1, options.steps // 9),
            "not_publishable": reasons,
        },
        "runs": found,
    }
    table = Table(*COLUMNS, title="Loss and memory of each option", title_justify="left")
    for row in rows(results):
        table.add_row(*row)
    console.print(table)
    for reason in refused:
        print(f"precision.py: refused: {reason}", file=sys.stderr)
    if options.publish and reasons:
        print(f"precision.py: refused to publish: {'; '.join(reasons)}", file=sys.stderr)
        return 1
    if options.json:
        saved.save_json(options.json, results)
    if options.plot:
        from bench.precision_picture import save

        save(options.plot, results)
    if options.markdown:
        options.markdown.write_text(markdown(results), encoding="utf-8")
    if options.publish and options.device == "cpu":
        from bench import readme

        readme.main([])
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
