"""How fast is one Adam step? `pip install '.[bench]' && python bench/run.py`.

Ours, mlx.optimizers and (where installed) torch take the same step on the same tensors, next to a
probe of the bare memory traffic. No contender is timed before its step has been compared with the
update in float64; see measure.py for how times are taken. Leave the machine alone while it runs.
"""

import argparse
import sys
from pathlib import Path
from typing import Any, NoReturn

try:
    import matplotlib  # noqa: F401  found missing now rather than after ten minutes
    import numpy  # noqa: F401
    import rich  # noqa: F401
except ImportError as error:
    sys.exit(f"run.py: {error}; install what the benchmark needs with: pip install '.[bench]'")

import mlx.core as mx
from cases import memory_needed, run_case
from report import (
    case_table,
    goals_table,
    in_words,
    machine,
    save_json,
    save_markdown,
    save_plot,
    summary_table,
)
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from suites import SUITES, Case

import mlx_fused_adam as fused

MEMORY_SHARE = 0.8  # of the machine's, that a case may need
PICTURES = (".png", ".svg", ".pdf")
BUSY = 0.5  # cores kept busy by others, above which a run is not worth quoting


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
            console.print(case_table(result))
            results.append(result)
    return results


class OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def parse_arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = OneLineParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
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
    add("--plot", type=Path, metavar="FILE", help="save a picture (.png, .svg)")
    add("--markdown", type=Path, metavar="FILE", help="save the summary as Markdown")
    add("--case", default="", metavar="TEXT", help="only cases whose title contains TEXT")
    add(
        "--bias-correction",
        action="store_true",
        help="let MLX's contenders correct the bias too, as torch always does",
    )
    add("--seconds", type=float, metavar="S", help="time to spend on timing a case (default: 4)")
    add(
        "--quick",
        action="store_true",
        help="small cases and few rounds: a trial of the benchmark, not a measurement",
    )
    options = parser.parse_args(arguments)
    if options.device == "gpu" and not mx.is_available(mx.gpu):
        parser.error("this MLX has no GPU")
    if options.plot and options.plot.suffix not in PICTURES:
        parser.error(f"{options.plot} must end in one of {', '.join(PICTURES)}")
    for path in (options.json, options.plot, options.markdown):
        if path and not path.parent.is_dir():
            parser.error(f"there is no folder {path.parent}")
    if options.seconds is None:
        options.seconds = 0.1 if options.quick else 4.0
    options.rounds = 2 if options.quick else 3
    device_memory = (
        mx.device_info().get("max_recommended_working_set_size")
        if options.device == "gpu"
        else None
    )
    options.memory = device_memory or machine(options.device, "")["memory_GiB"] * 2**30
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    mx.set_default_device(getattr(mx, options.device))
    console = Console()
    if not console.is_terminal:
        console = Console(width=150)
    # Also lets the package check itself before anything is measured.
    backend = fused.Adam(1e-3).backend
    here = machine(options.device, backend)
    console.print(f"[bold]{escape(in_words(here))}")
    if here["load"] > BUSY:
        console.print(
            f"[yellow]the load average is {here['load']:.1f}: beside other programs, times mislead"
        )
    if options.quick:
        console.print("[yellow]--quick: a trial of the benchmark; its times mean little")

    names = list(SUITES) if "all" in options.suite else options.suite
    cases = [
        case for name in names for case in SUITES[name](options.quick) if options.case in case.title
    ]
    results = run(cases, options, console)
    if not results:
        print("run.py: no case was run", file=sys.stderr)
        return 2
    console.print(summary_table(results))
    console.print(
        "light: the speed of light, a probe that reads and writes the same bytes and hardly computes"
    )
    if not options.quick:
        console.print(goals_table(results))
    if options.json:
        settings = {
            "seconds": options.seconds,
            "quick": options.quick,
            "bias_correction": options.bias_correction,
        }
        save_json(options.json, here, settings, results)
    if options.plot:
        save_plot(options.plot, here, results)
    if options.markdown:
        save_markdown(options.markdown, here, results)

    refused = [
        (r["title"], name) for r in results for name, x in r["contenders"].items() if "refused" in x
    ]
    for title, name in refused:
        print(f"run.py: refused {name} in {title}", file=sys.stderr)
    return 1 if refused else 0


if __name__ == "__main__":
    sys.exit(main())
