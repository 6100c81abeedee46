"""Builds the package for each mlx release that it knows, runs the CPU tests there, and keeps the table in
docs/mlx-releases.md.

python tests/platforms/releases/run.py                            every release in build_tools/mlx_releases.py
python tests/platforms/releases/run.py --release 0.32.2           one of them; more with --release again
python tests/platforms/releases/run.py --release 0.32.2 -- tests  pytest's arguments: all tests; the table is not
written

Each release gets a new virtual environment in build/releases, and there the command that users are told. Needs the
network.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import venv
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
FOLDER = ROOT / "build" / "releases"
RESULTS = Path(__file__).with_name("results.json")
DOCUMENT = ROOT / "docs" / "mlx-releases.md"
TABLE = re.compile(r"(?<=<!-- releases:table -->\n).*?(?=<!-- end -->)", re.DOTALL)

sys.path.insert(0, str(ROOT / "build_tools"))
from mlx_releases import NANOBIND, VARIABLE  # noqa: E402

# About this project alone, the emulated GPU or another system: the others show what an mlx release makes of it.
NOT_HERE = (
    "arm64 bench clipping_metal cuda_compile docs emulator emulator_calibration hostile_gpu metal_faults "
    "mlx_releases sanitizers shader_strict state_formats_metal tables"
).split()
COLUMNS = ("mlx", "nanobind", "passed", "skipped", "failed", "Python", "system", "date")
Result = dict[str, str | int]


def install(mlx: str) -> Path:
    """The Python of a new environment, in which the package is built for this mlx and installed with what its tests
    need.
    """
    folder = FOLDER / mlx
    venv.create(folder, with_pip=True, clear=True)
    python = folder / "bin" / "python"
    command = [python, "-m", "pip", "install", "--quiet", f"{ROOT}[test,tools]"]
    subprocess.run(command, check=True, env=os.environ | {VARIABLE: mlx})
    return python


def counts(report: Path) -> dict[str, int]:
    """How many tests passed, were skipped and failed, from pytest's JUnit report."""
    suites = list(ElementTree.parse(report).getroot().iter("testsuite"))
    total, skipped, failures, errors = (
        sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "skipped", "failures", "errors")
    )
    failed = failures + errors
    return {"passed": total - skipped - failed, "skipped": skipped, "failed": failed}


def run_tests(mlx: str, python: Path, arguments: Sequence[str]) -> Result:
    report = FOLDER / f"{mlx}.xml"
    report.unlink(missing_ok=True)
    options = ["-p", "no:cacheprovider", "-ra", f"--junitxml={report}"]
    selected = arguments or [f"--ignore-glob=*/test_{name}.py" for name in NOT_HERE]
    command = [python, "-m", "pytest", *options, *selected]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"DEVICE": "cpu"})
    if done.returncode not in (0, 1):  # all passed, some failed
        raise SystemExit(f"mlx {mlx}: pytest ended with {done.returncode}, not with a verdict")
    return {
        "mlx": mlx,
        "nanobind": NANOBIND[mlx],
        **counts(report),
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "date": datetime.date.today().isoformat(),
    }


def table(results: Sequence[Result]) -> str:
    """In Markdown."""
    rows = [COLUMNS, ["---"] * len(COLUMNS), *([x[name] for name in COLUMNS] for x in results)]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def keep(result: Result) -> None:
    """In results.json and in the document, in place of an earlier one of the same release; in the order of the
    releases.
    """
    known = {x["mlx"]: x for x in json.loads(RESULTS.read_text())} | {result["mlx"]: result}
    results = [known[mlx] for mlx in NANOBIND if mlx in known]
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")
    text = DOCUMENT.read_text(encoding="utf-8")
    DOCUMENT.write_text(TABLE.sub(lambda _: table(results), text), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--release", action="append", choices=NANOBIND, help="one mlx release; default: all")
    parser.add_argument("pytest", nargs="*", help="pytest's arguments, after --")
    arguments = parser.parse_args()
    failed = []
    for mlx in arguments.release or NANOBIND:
        result = run_tests(mlx, install(mlx), arguments.pytest)
        if not arguments.pytest:
            keep(result)
        print(table([result]), flush=True)
        if result["failed"] or not result["passed"]:
            failed.append(mlx)
    if failed:
        print(f"failed: mlx {', '.join(failed)}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
