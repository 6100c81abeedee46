"""Memory and traffic of a rank, from 1 to 1024 ranks: `python bench/scale.py [--check]` writes the tables of
docs/scale.md.

It measures nothing. For a model of your own, `python bench/scale.py --parameters 7e9` prints the tables and writes
nothing.
"""

import argparse
import math
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(ROOT)  # run as a script: import the package `bench`, not its modules

from bench import write_tables  # noqa: E402
from bench.tables import scale  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scale.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    parser.add_argument("--parameters", type=float, help="print the tables for so many parameters")
    options = parser.parse_args(arguments)
    if options.parameters is None:
        return write_tables.main(["--check"] if options.check else [])
    if not 1 <= options.parameters < math.inf:
        parser.error(f"--parameters must be at least 1 but got {options.parameters:g}")
    print(scale.shown(options.parameters))
    return 0


if __name__ == "__main__":
    sys.exit(main())
