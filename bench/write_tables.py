"""Write the tables in README.md and docs/ from bench/results, without measuring: `python bench/write_tables.py
[--check]`.

`--check` writes nothing, and fails if a document is out of date. bench/README.md has the commands that measure.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
if __name__ == "__main__" and not __package__:
    sys.path[0] = str(ROOT)  # run as a script: import the package `bench`, not its modules

from bench.tables import documents  # noqa: E402


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="write_tables.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if out of date")
    check = parser.parse_args(arguments).check
    changed = documents.write(check)
    for document in changed:
        state = "is out of date; run python bench/write_tables.py" if check else "written"
        print(f"write_tables.py: {document.name} {state}")
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
