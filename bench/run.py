"""How fast is one Adam step, and what memory does it take? `pip install '.[bench]' && python bench/run.py`.

Ours, mlx.optimizers and (where installed) torch take the same step on the same tensors, next to a
probe of the bare memory traffic. No contender is timed before its step has been compared with the
update in float64; see mlx_fused_adam/_tools/timing.py for how times are taken. `--publish` makes the files
in bench/results and the figures in README.md, and refuses a machine that is not idle.
"""

import argparse
import sys
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
    sys.path[0] = str(ROOT)  # run as a script: the package `bench` stands there, not its modules

from bench import machine, pictures, readme, report, saved  # noqa: E402
from bench.cases import SUITES, Case  # noqa: E402
from bench.compare import memory_needed, run_case  # noqa: E402
from bench.contenders import HAS_TORCH  # noqa: E402
from bench.goals import goals  # noqa: E402

MEMORY_SHARE = 0.8  # of the machine's, that a case may need
PICTURES = (".png", ".svg", ".pdf")
SECONDS = 3.0  # for timing a case, unless the command line says otherwise
RESULTS = ROOT / "bench" / "results"


def run(cases: list[Case], options: argparse.Namespace, console: Console) -> list[dict[str, Any]]:
    """Run the cases one after the other; print each one's table when it is done."""
    results: list[dict[str, Any]] = []
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
                console.print(
                    f"left out: {escape(case.title)}: needs about {needed:.0f} GiB of memory"
                )
                continue
            result = run_case(
                case, options.device, options.bias_correction, options.seconds, options.rounds, show
            )
            make_table = report.case_table if case.is_timed else report.memory_table
            console.print(make_table(result))
            results.append(result)
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
    add("--json", type=Path, metavar="FILE", help="save all figures")
    add("--plot", type=Path, metavar="FILE", help="save a picture of all updates (.png, .svg)")
    add("--models-plot", type=Path, metavar="FILE", help="save a small picture of the real models")
    add("--growth-plot", type=Path, metavar="FILE", help="save a picture of how time grows")
    add("--memory-plot", type=Path, metavar="FILE", help="save a picture of steps' peak memory")
    add("--markdown", type=Path, metavar="FILE", help="save the tables as Markdown")
    add("--case", default="", metavar="TEXT", help="only cases whose title contains TEXT")
    add(
        "--bias-correction",
        action="store_true",
        help="let MLX's contenders correct the bias too, as torch always does",
    )
    add(
        "--seconds",
        type=float,
        metavar="S",
        help=f"time to spend on timing a case (default: {SECONDS:g})",
    )
    add(
        "--quick",
        action="store_true",
        help="small cases and few rounds: a trial of the benchmark, not a measurement",
    )
    add(
        "--publish",
        action="store_true",
        help="everything, into bench/results and README.md; on an idle machine alone",
    )
    options = parser.parse_args(arguments)
    if options.device == "gpu" and not mx.is_available(mx.gpu):
        parser.error("this MLX has no GPU")
    if options.publish:
        if set(arguments) - {"--publish", "--device", options.device}:
            parser.error("--publish goes with --device alone")
        options.json = RESULTS / f"{options.device}.json"
        options.markdown = RESULTS / f"{options.device}.md"
        options.plot = RESULTS / f"{options.device}.png"
        options.models_plot = RESULTS / f"{options.device}-models.png"
        options.growth_plot = RESULTS / f"{options.device}-growth.png"
        of_device = "" if options.device == "cpu" else f"{options.device}-"
        options.memory_plot = RESULTS / f"{of_device}memory.png"
    plots = (options.plot, options.models_plot, options.growth_plot, options.memory_plot)
    for path in plots:
        if path and path.suffix not in PICTURES:
            parser.error(f"{path} must end in one of {', '.join(PICTURES)}")
    for path in (options.json, *plots, options.markdown):
        if path and not path.parent.is_dir():
            parser.error(f"there is no folder {path.parent}")
    options.is_whole = not (
        options.quick or options.bias_correction or options.case or options.suite != ["all"]
    )
    if options.seconds is None:
        options.seconds = 0.1 if options.quick else SECONDS
    options.rounds = 2 if options.quick else 3
    device_memory = (
        mx.device_info().get("max_recommended_working_set_size")
        if options.device == "gpu"
        else None
    )
    options.memory = device_memory or machine.memory_bytes()
    return options


def why_not_publishable(
    options: argparse.Namespace, load: float, others: float | None = None
) -> list[str]:
    """Why figures of such a run should not be quoted; empty if they may."""
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
    console.print(f"[bold]{escape(saved.machine_text(here))}")
    reasons = why_not_publishable(options, here["load"])
    if options.publish and reasons:
        print(f"run.py: refused to publish: {'; '.join(reasons)}", file=sys.stderr)
        return 2
    if here["load"] > machine.BUSY:
        console.print(
            f"[yellow]the load average is {here['load']:.1f}: beside other programs, times mislead"
        )
    if options.quick:
        console.print("[yellow]--quick: a trial of the benchmark; its times mean little")

    watch = machine.OthersWatch()
    names = list(SUITES) if "all" in options.suite else options.suite
    cases = [
        case for name in names for case in SUITES[name](options.quick) if options.case in case.title
    ]
    found = run(cases, options, console)
    if not found:
        print("run.py: no case was run", file=sys.stderr)
        return 2
    timed = [case for case in found if case["suite"] != "memory"]
    refused = [
        (r["title"], name) for r in found for name, x in r["contenders"].items() if "refused" in x
    ]
    others = watch.busy_cores()
    reasons = why_not_publishable(options, here["load"], others)
    reasons += [f"{name} was refused in {title}" for title, name in refused]
    results = {
        "machine": here,
        "settings": {
            "command": " ".join(["python bench/run.py", *arguments]),
            "date": datetime.now(timezone.utc).date().isoformat(),
            "seconds": options.seconds,
            "quick": options.quick,
            "bias_correction": options.bias_correction,
            "cores_busy_with_others": None if others is None else round(others, 2),
            "not_publishable": reasons,
        },
        "cases": timed,
        "memory": [case for case in found if case not in timed],
        "goals": [goal.as_dict() for goal in goals(timed)],
    }

    if timed:
        console.print(report.summary_table(timed))
        console.print(saved.LEGEND)
    if timed and not options.quick:
        console.print(report.goals_table(timed))
    for title, name in refused:
        print(f"run.py: refused {name} in {title}", file=sys.stderr)
    if options.publish and reasons:
        print(f"run.py: refused to publish: {'; '.join(reasons)}", file=sys.stderr)
        return 1
    if options.json:
        saved.save_json(options.json, results)
    if options.plot:
        pictures.save_traffic(options.plot, results)
    if options.models_plot:
        pictures.save_models(options.models_plot, results)
    if options.growth_plot:
        pictures.save_growth(options.growth_plot, results)
    if options.memory_plot:
        pictures.save_memory(options.memory_plot, results)
    if options.markdown:
        saved.save_markdown(options.markdown, results)
    if options.publish and options.device == "cpu":
        readme.main([])
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
