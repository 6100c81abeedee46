"""Measures the time and memory of one Adam step: `pip install '.[bench]' && python bench/run.py`.

The fused update, mlx.optimizers and (where installed) torch take the same step on the same tensors, beside a plain copy
of as many bytes. Each implementation's step is compared with the update in float64 before it is timed; see
mlx_fused_adam/_tools/timing.py for how times are taken. `--publish` makes the files in bench/results and the tables in
docs/benchmarks.md, and needs an idle machine.
"""

import argparse
import sys
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

try:
    import matplotlib  # noqa: F401  found missing now rather than after ten minutes
    import numpy  # noqa: F401
    import rich  # noqa: F401
except ImportError as error:
    sys.exit(f"run.py: {error}; install what the benchmark needs with: pip install '.[bench]'")

import mlx.core as mx
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

import mlx_fused_adam as fused

ROOT = Path(__file__).resolve().parent.parent
if __name__ in ("__main__", "__mp_main__") and not __package__:
    sys.path[0] = str(ROOT)  # run as a script: import the package `bench`, not its modules

from bench.memory import whole_steps  # noqa: E402
from bench.speed import machine  # noqa: E402
from bench.speed.cases import SUITES, Case  # noqa: E402
from bench.speed.compare import memory_needed, run_case  # noqa: E402
from bench.speed.implementations import HAS_TORCH  # noqa: E402
from bench.tables import documents, plots, speed, terminal, text  # noqa: E402

MEMORY_SHARE = 0.8  # of the machine's, that a case may need
SECONDS = 3.0  # for timing a case, unless the command line says otherwise


def run(cases: list[Case], options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Run the cases one after the other; print each one's table when it is done."""
    found: list[dict[str, Any]] = []
    columns = [
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f} cases"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    ]
    # Drawn only between rounds: a thread that redraws would take a core from what is being timed.
    with Progress(*columns, console=console, transient=True, auto_refresh=False) as progress:
        bar = progress.add_task("", total=len(cases))
        for done, case in enumerate(cases):

            def show(doing: str, fraction: float, done: int = done, case: Case = case) -> None:
                description = f"{escape(case.suite)}: {escape(case.name)}, {doing}"
                completed = done + 0.99 * fraction
                progress.update(bar, completed=completed, description=description, refresh=True)

            if memory_needed(case) > MEMORY_SHARE * options.memory:
                needed = memory_needed(case) / 2**30
                console.print(f"left out: {escape(case.title)}: needs {needed:.0f} GiB of memory")
                continue
            found.append(case.described(run_one(case, options, show)))
            make_table = terminal.case_table if case.is_timed else terminal.memory_table
            console.print(make_table(found[-1]))
    return found


def run_one(case: Case, options: argparse.Namespace, show: Callable) -> dict[str, dict[str, Any]]:
    """The results of a case: times, memory, or both."""
    if not case.is_timed:
        return whole_steps.measure(case, options.device, show)
    results = run_case(case, options.device, options.seconds, options.rounds, show)
    if case.task:
        for name, memory in whole_steps.measure(case, options.device, show).items():
            if "rejected" not in results[name]:
                results[name]["peak_bytes"] = memory["peak_bytes"]
    return results


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="run.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--suite",
        nargs="+",
        choices=[*SUITES, "all"],
        default=["all"],
        help="which cases (default: all)",
    )
    add("--device", choices=["cpu", "gpu"], default="gpu" if mx.metal.is_available() else "cpu")
    add("--json", type=Path, metavar="FILE", help="save all results")
    add("--plot", type=Path, metavar="FILE", help="save a plot of the updates (.png, .svg)")
    add("--markdown", type=Path, metavar="FILE", help="save the tables as Markdown")
    add("--case", default="", metavar="TEXT", help="only cases whose title contains TEXT")
    add(
        "--seconds",
        type=float,
        metavar="S",
        help=f"time to spend on timing a case (default: {SECONDS:g})",
    )
    add(
        "--quick",
        action="store_true",
        help="small cases and few rounds: a trial, not a measurement",
    )
    add(
        "--publish",
        action="store_true",
        help="run everything and write the published files; needs an idle machine",
    )
    options = parser.parse_args(arguments)
    if options.device == "gpu" and not mx.is_available(mx.gpu):
        parser.error("this MLX has no GPU")
    if options.publish:
        if set(arguments) - {"--publish", "--device", options.device}:
            parser.error("only --device goes with --publish")
        stem = documents.RESULTS / options.device
        options.json, options.markdown, options.plot = (stem.with_suffix(suffix) for suffix in (".json", ".md", ".png"))
    if options.plot and options.plot.suffix not in plots.SUFFIXES:
        parser.error(f"{options.plot} must end in one of {', '.join(plots.SUFFIXES)}")
    for path in (options.json, options.markdown, options.plot):
        if path and not path.parent.is_dir():
            parser.error(f"there is no folder {path.parent}")
    options.is_whole = not (options.quick or options.case or options.suite != ["all"])
    if options.seconds is None:
        options.seconds = 0.1 if options.quick else SECONDS
    options.rounds = 2 if options.quick else 3
    device_memory = mx.device_info().get("max_recommended_working_set_size") if options.device == "gpu" else None
    options.memory = device_memory or machine.memory_bytes()
    return options


def why_not_publishable(options: argparse.Namespace, load: float, others: float | None = None) -> list[str]:
    """Why the results of such a run should not be quoted; empty if they may be."""
    reasons = []
    if load > machine.BUSY:
        reasons.append(f"the load average was {load:.1f} at the start, above {machine.BUSY}")
    if others is not None and others > machine.BUSY:
        reasons.append(f"other programs kept {others:.1f} cores busy, more than {machine.BUSY}")
    if not options.is_whole:
        reasons.append("not all cases were run as they are by default")
    if options.seconds != SECONDS:
        reasons.append(f"{options.seconds:g} s were spent on a case instead of {SECONDS:g}")
    if not HAS_TORCH:
        reasons.append("torch is not installed")
    return reasons


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse_arguments(arguments)
    mx.set_default_device(getattr(mx, options.device))
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    # Also lets the package check itself before anything is measured.
    backend = fused.Adam(1e-3).backend
    here = machine.describe(options.device, backend)
    console.print(f"[bold]{escape(speed.machine_text(here))}")
    reasons = why_not_publishable(options, here["load"])
    if options.publish and reasons:
        print(f"run.py: not published: {'; '.join(reasons)}", file=sys.stderr)
        return 2
    if here["load"] > machine.BUSY:
        console.print(f"[yellow]the load average is {here['load']:.1f}: beside other programs, times mislead")
    if options.quick:
        console.print("[yellow]--quick: a trial of the benchmark; its times mean little")

    watch = machine.OthersWatch()
    names = list(SUITES) if "all" in options.suite else options.suite
    cases = [case for name in names for case in SUITES[name](options.quick) if options.case in case.title]
    found = run(cases, options, console)
    if not found:
        print("run.py: no case was run", file=sys.stderr)
        return 2
    timed = [case for case in found if case["suite"] != "memory"]
    rejected = [
        (case["title"], name) for case in found for name, x in case["implementations"].items() if "rejected" in x
    ]
    others = watch.busy_cores()
    reasons = why_not_publishable(options, here["load"], others)
    reasons += [f"{name} was rejected in {title}" for title, name in rejected]
    results = {
        "machine": here,
        "settings": {
            "command": " ".join(["python bench/run.py", *arguments]),
            "date": datetime.now(timezone.utc).date().isoformat(),
            "seconds": options.seconds,
            "quick": options.quick,
            "cores_busy_with_others": None if others is None else round(others, 2),
            "not_publishable": reasons,
        },
        "cases": timed,
        "memory": [case for case in found if case not in timed],
    }

    if timed:
        console.print(terminal.summary_table(timed))
        console.print(speed.LEGEND)
    for title, name in rejected:
        print(f"run.py: rejected {name} in {title}", file=sys.stderr)
    if options.publish and reasons:
        print(f"run.py: not published: {'; '.join(reasons)}", file=sys.stderr)
        return 1
    if options.json:
        text.save_json(options.json, results)
    if options.plot:
        plots.save_run(options.plot, results)
        console.print(f"plot: {options.plot}")
    if options.markdown:
        speed.save_markdown(options.markdown, results)
    if options.publish and options.device == "cpu":
        documents.write()
    return 1 if rejected else 0


if __name__ == "__main__":
    sys.exit(main())
