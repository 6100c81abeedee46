"""python -m mlx_fused_adam: check this machine; run: train any script with the fused optimizers; plan: what fits."""

import argparse
import sys

from ._tools import plan, report, run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mlx_fused_adam",
        description="Check and time the kernels on this machine. Exits with 1 if a check fails.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON, for bug reports")
    parser.add_argument("--device", choices=["cpu", "gpu"], help="report on this device alone")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    launcher = commands.add_parser(
        "run",
        help="run a training script or module with the fused Adam and AdamW",
        description="Run a script or module as Python would; each mlx.optimizers.Adam and AdamW that it or its child "
        "processes build is the fused one.",
    )
    run.add_arguments(launcher)
    planner = commands.add_parser(
        "plan",
        help="show which options fit a model into a Mac's memory",
        description="Bytes of each option and the peak of a training step, and which fits.",
    )
    plan.add_arguments(planner)
    arguments = parser.parse_args()
    if arguments.command and (arguments.json or arguments.device):
        option = "--json" if arguments.json else "--device"
        parser.error(f"{option} belongs to the report; {arguments.command} prints none")
    if arguments.command == "plan":
        return plan.main(arguments)
    if arguments.command == "run":
        run.run(launcher, arguments)
    if arguments.device not in (None, *(kind.name for kind in report.available())):
        parser.error(f"argument --device: this MLX has no {arguments.device}")
    return report.main(arguments.json, arguments.device)


if __name__ == "__main__":
    sys.exit(main())
