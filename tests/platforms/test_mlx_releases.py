"""docs/mlx-releases.md and the workflow of CI name the mlx releases that the build knows (releases/run.py)."""

import json
import re
from pathlib import Path

from platforms.releases import run

ROOT = Path(__file__).parents[2]
RESULTS = json.loads(run.RESULTS.read_text())


def test_the_table_is_that_of_the_results():
    (shown,) = run.TABLE.findall(run.DOCUMENT.read_text(encoding="utf-8"))
    assert shown == run.table(RESULTS)


def test_every_release_has_a_result_without_failures():
    assert [result["mlx"] for result in RESULTS if not result["failed"]] == list(run.NANOBIND)
    assert all(result["nanobind"] == run.NANOBIND[result["mlx"]] for result in RESULTS)


def test_ci_runs_every_release_but_the_newest_which_all_else_runs_with():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text()
    (listed,) = re.findall(r"^        mlx: \[(.*)\]$", workflow, re.MULTILINE)
    assert re.findall(r'"([\d.]+)"', listed) == list(run.NANOBIND)[1:]


def test_tests_are_counted_by_their_outcome(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text('<testsuites><testsuite tests="10" skipped="2" failures="1" errors="3"/></testsuites>')
    assert run.counts(report) == {"passed": 4, "skipped": 2, "failed": 4}


def test_a_result_takes_the_place_of_an_earlier_one(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "RESULTS", tmp_path / "results.json")
    monkeypatch.setattr(run, "DOCUMENT", tmp_path / "document.md")
    run.RESULTS.write_text("[]")
    run.DOCUMENT.write_text("before\n<!-- releases:table -->\n<!-- end -->\nafter\n")
    result = RESULTS[0]
    others = [dict(x, passed=1) for x in RESULTS]
    for x in (*reversed(others), result):
        run.keep(x)
    text = run.DOCUMENT.read_text()
    rows = [line for line in text.splitlines() if re.match(r"\| \d", line)]
    assert [row.split(" | ")[0][2:] for row in rows] == list(run.NANOBIND)
    assert f"| {result['passed']} |" in rows[0] and all("| 1 |" in row for row in rows[1:])
    assert text.startswith("before\n") and text.endswith("<!-- end -->\nafter\n")
