"""README's and docs' figures are those of the published run, and the documented commands write them."""

import copy
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))
from bench import cases, machine, pictures, precision, readme, run, saved  # noqa: E402
from bench.documents import BLOCK  # noqa: E402
from bench.figures import fewest_samples  # noqa: E402

RESULTS = readme.load_results()
README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_documented_command_writes_the_files_that_readme_shows() -> None:
    assert "python bench/run.py --publish" in README
    options = run.parse_arguments(["--publish", "--device", "cpu"])
    assert (options.json, options.seconds) == (readme.RESULTS, run.SECONDS)
    for path in (options.models_plot, options.markdown):
        assert path.relative_to(ROOT).as_posix() in README
        assert path.is_file()
    if RESULTS.get("memory"):
        assert f"]({options.memory_plot.relative_to(ROOT).as_posix()})" in README


def test_the_other_documented_command_writes_what_readme_shows() -> None:
    assert "python bench/precision.py --publish" in README
    options = precision.parse_arguments(["--publish", "--device", "cpu"])
    assert options.json == readme.PRECISION and options.is_whole
    if RESULTS["precision"]:
        assert f"]({options.markdown.relative_to(ROOT).as_posix()})" in README
        assert options.plot.is_file()
        assert RESULTS["precision"]["settings"]["command"] == "python bench/precision.py --publish"
        assert RESULTS["precision"]["settings"]["not_publishable"] == []


def test_documents_say_what_the_published_run_gave() -> None:
    assert readme.main(["--check"]) == 0, "run python bench/readme.py"
    texts = [document.read_text(encoding="utf-8") for document in readme.DOCUMENTS]
    used = {match[2] for text in texts for match in BLOCK.finditer(text)}
    assert used == set(readme.BLOCKS)
    for page in (ROOT / "docs").glob("*.md"):
        blocks = {match[2] for match in BLOCK.finditer(page.read_text(encoding="utf-8"))}
        assert page in readme.DOCUMENTS or not blocks & used, f"{page.name} is in no one's care"


@pytest.mark.parametrize(
    "document", ["README.md", "docs/index.md", "docs/start.md", "docs/options.md", "docs/mlx-lm.md"]
)
def test_no_measured_figure_is_typed_by_hand(document: str) -> None:
    prose = BLOCK.sub("", (ROOT / document).read_text(encoding="utf-8"))
    typed = re.findall(r"\d[\d.,]* ?(?:ms|µs|[MG]B\b|×|times|%)|× ?\d", prose)
    assert not typed, typed


@pytest.mark.parametrize("document", readme.DOCUMENTS[1:], ids=lambda path: path.name)
def test_no_markup_follows_a_comment_that_begins_a_line(document: Path) -> None:
    """Markdown would take such a line for HTML, and show its markup as it is typed."""
    text = document.read_text(encoding="utf-8")
    assert not re.findall(r"^<!-- bench:[a-z-]+ -->[^\n]*[`*\[].*", text, re.M)


def test_a_figure_changed_in_readme_or_results_is_seen(tmp_path, monkeypatch, capsys) -> None:
    changed = copy.deepcopy(RESULTS)
    for case in changed["cases"]:
        case["contenders"]["ours"]["median_s"] *= 1.5
    assert readme.render(README, changed) != README
    first = next(x for x in BLOCK.finditer(README) if re.search(r"\d", x[0]))
    at = first.start() + re.search(r"\d", first[0]).start()
    other = README[:at] + str((int(README[at]) + 1) % 10) + README[at + 1 :]
    copied = tmp_path / "README.md"
    copied.write_text(other, encoding="utf-8")
    monkeypatch.setattr(readme, "DOCUMENTS", [copied])
    assert readme.main(["--check"]) == 1
    assert readme.main([]) == 0 and copied.read_text(encoding="utf-8") == README


def test_links_in_a_page_s_figures_start_from_the_page(tmp_path, monkeypatch) -> None:
    page = tmp_path / "docs" / "page.md"
    page.parent.mkdir()
    page.write_text("<!-- bench:options --><!-- end -->", encoding="utf-8")
    monkeypatch.setattr(readme, "DOCUMENTS", [page])
    assert readme.main([]) == 0
    links = re.findall(r"\]\(([^)]*)\)", page.read_text(encoding="utf-8"))
    assert links and all(link.startswith("../bench/results/") for link in links), links


def test_readme_shows_the_worst_of_each_group_and_counts_torch_right() -> None:
    updates = [case for case in RESULTS["cases"] if not case["is_training_step"]]
    ratios = {
        case["title"]: case["contenders"]["torch fused"]["median_s"]
        / case["contenders"]["ours"]["median_s"]
        for case in updates
    }
    shown = readme.BLOCKS["summary"](RESULTS)
    groups: dict[tuple, list[dict]] = {}
    for case in updates:
        groups.setdefault(readme.group(case), []).append(case)
    for group, members in groups.items():
        worst = min(members, key=lambda case: ratios[case["title"]])
        row = saved.table([], [saved.summary_row(worst)[: readme.COLUMNS]]).splitlines()[-1]
        assert row in shown, group
    assert "| models: SmolLM-135M | float32 |" in shown
    slower = sum(ratio < 1 for ratio in ratios.values())
    assert f"faster than ours in {slower} of {len(updates)} updates" in README


def test_published_figures_are_the_documented_command_s_or_readme_warns() -> None:
    settings = RESULTS["settings"]
    if settings["not_publishable"]:
        assert "**Provisional, not to be quoted:**" in README
    else:
        assert settings["command"] == "python bench/run.py --publish"
        assert settings["seconds"] == run.SECONDS
        assert RESULTS["machine"]["load"] <= machine.BUSY
        assert "Provisional" not in README
    expected = [case for suite in cases.SUITES.values() for case in suite(False)]
    timed = {case.title for case in expected if case.is_timed}
    assert {case["title"] for case in RESULTS["cases"]} == timed
    if "memory" in RESULTS:  # not in a run of before
        others = {case.title for case in expected if not case.is_timed}
        assert {case["title"] for case in RESULTS["memory"]} == others
    assert all(fewest_samples(case) >= 2 for case in RESULTS["cases"])


def test_the_small_picture_is_of_three_real_models() -> None:
    names = [case["case"] for case in pictures.real_models(RESULTS["cases"])]
    assert names == ["GPT-2 124M", "SmolLM-135M", "Qwen2.5-0.5B"]
