"""python -m mlx_fused_adam: check this machine; python -m mlx_fused_adam run: train any script with the fused
optimizers.
"""

import argparse
import sys

from ._tools import report, run


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mlx_fused_adam",
        description="Check and time the kernels on this machine. Exits with 1 if a check fails.",
    )
    parser.add_argument("--json", action="store_true", help="print the report as JSON, for bug reports")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    launcher = commands.add_parser(
        "run",
        help="run a training script or module with the fused Adam and AdamW",
        description="Run a script or module as Python would; each mlx.optimizers.Adam and AdamW that it or its child "
        "processes build is the fused one.",
    )
    run.add_arguments(launcher)
    arguments = parser.parse_args()
    if arguments.command == "run":
        if arguments.json:
            parser.error("--json belongs to the report; run prints none")
        run.run(launcher, arguments)
    return report.main(arguments.json)


if __name__ == "__main__":
    sys.exit(main())
