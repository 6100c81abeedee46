"""python -m mlx_fused_adam: report on this machine; python -m mlx_fused_adam run: any training script with our optimizers."""

import argparse
import sys

from ._tools import report, run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mlx_fused_adam",
        description="Checks the kernels on this machine and reports what it found. Exit status 1 if a check fails.",
    )
    parser.add_argument("--json", action="store_true", help="the report as JSON, for bug reports")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    launcher = commands.add_parser(
        "run",
        help="run a training script or module whose mlx.optimizers.Adam and AdamW become ours",
        description="Runs a script or module as Python would, with every mlx.optimizers.Adam and AdamW that it builds replaced "
        "by the fused one; in its child processes too.",
    )
    run.add_arguments(launcher)
    arguments = parser.parse_args()
    if arguments.command == "run":
        if arguments.json:
            parser.error("--json is of the report, and run makes none")
        run.run(launcher, arguments)
    return report.main(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
