"""Tables in README.md and docs/ are those of the published runs, and the documented commands write them."""

import copy
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))
from bench import precision, run, write_tables  # noqa: E402
from bench.speed import cases, machine  # noqa: E402
from bench.tables import documents, plots, speed, text  # noqa: E402
from bench.tables import precision as precision_tables  # noqa: E402
from bench.tables.metrics import TIMES_TORCH, fewest_samples  # noqa: E402
from bench.tables.names import CLIPPING, COPY, FUSED, FUSED_COMPILED, MLX, MLX_COMPILED  # noqa: E402

RESULTS = documents.load("cpu")
DOCUMENTS = {path.name: path.read_text(encoding="utf-8") for path in documents.documents()}
BENCHMARKS = DOCUMENTS["benchmarks.md"]


def blocks(document: str) -> set[str]:
    return {match[2] for match in documents.BLOCK.finditer(DOCUMENTS[document])}


def test_every_table_is_up_to_date_and_shown() -> None:
    assert write_tables.main(["--check"]) == 0, "run python bench/write_tables.py"
    assert set().union(*map(blocks, DOCUMENTS)) == set(documents.TABLES)
    assert blocks("README.md") == {"headline"}
    assert blocks("benchmarks.md") == {"training", "summary", "falls-short", "origin"}
    assert "finetuning" in blocks("mlx-lm.md")


@pytest.mark.parametrize("table", documents.TABLES.values(), ids=documents.TABLES)
def test_a_table_names_the_command_that_makes_it(table: documents.Table) -> None:
    """bench/README.md has the command, and the document that shows the table."""
    command = table.command.split()[0]
    assert (ROOT / command).is_file()
    row = next(
        line
        for line in (ROOT / "bench/README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith(f"| `python {command}`")
    )
    name = next(name for name, x in documents.TABLES.items() if x is table)
    shown_in = [document for document in DOCUMENTS if name in blocks(document)]
    assert any(document.removesuffix(".md") in row for document in shown_in)


def test_the_documented_commands_write_the_files_that_documents_show() -> None:
    assert "python bench/run.py --publish" in BENCHMARKS
    options = run.parse_arguments(["--publish", "--device", "cpu"])
    assert options.seconds == run.SECONDS and options.json.name == "cpu.json"
    assert "](bench/results/memory.png)" in DOCUMENTS["README.md"]
    for path in (options.plot, options.markdown):
        assert path.is_file()
        assert f"](../{path.relative_to(ROOT).as_posix()})" in BENCHMARKS
    options = precision.parse_arguments(["--publish", "--device", "cpu"])
    assert options.is_whole and options.plot.is_file()
    assert f"](../{options.markdown.relative_to(ROOT).as_posix()})" in DOCUMENTS["options.md"]


def test_published_results_are_those_of_the_documented_commands() -> None:
    for name, command in (("cpu", "run"), ("precision", "precision"), ("finetuning", "finetuning")):
        settings = documents.load(name)["settings"]
        assert settings["command"] == f"python bench/{command}.py --publish"
        assert not settings.get("not_publishable")
    assert RESULTS["settings"]["seconds"] == run.SECONDS
    assert RESULTS["machine"]["load"] <= machine.BUSY
    expected = [case for suite in cases.SUITES.values() for case in suite(False)]
    for key, is_timed in (("cases", True), ("memory", False)):
        titles = {case.title for case in expected if case.is_timed == is_timed}
        assert {case["title"] for case in RESULTS[key]} == titles
    assert all(fewest_samples(case) >= 2 for case in RESULTS["cases"])


# A number of a unit that runs are measured in.
MEASURED = re.compile(r"(\d[\d.,]*) ?(ms|µs|[MG]B\b|×|times|%)|× ?(\d[\d.,]*)")


@pytest.mark.parametrize("document", ["README.md", "index.md", "start.md", "options.md", "mlx-lm.md", "benchmarks.md"])
def test_prose_has_no_measured_number_that_is_in_no_table(document: str) -> None:
    """So a number that a new run changes is noticed. "31 % less" is 69 % in a table."""
    tables = " ".join(match[0] for text in DOCUMENTS.values() for match in documents.BLOCK.finditer(text))
    known = set(re.findall(r"\d[\d.,]*", tables))
    prose = documents.BLOCK.sub("", DOCUMENTS[document])
    for value, unit, factor in MEASURED.findall(prose):
        number = (value or factor).rstrip(".,")
        complement = f"{100 - float(number):g}" if unit == "%" else number
        assert {number, complement} & known, f"{number} {unit} in {document}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_no_markup_follows_a_comment_that_begins_a_line(document: str) -> None:
    """Markdown would take such a line for HTML, and show its markup as it is typed."""
    assert not re.findall(r"^<!-- bench:[a-z0-9-]+ -->[^\n]*[`*\[].*", DOCUMENTS[document], re.M)


def test_a_number_changed_in_a_document_or_in_results_is_seen(tmp_path, monkeypatch, capsys) -> None:
    changed = copy.deepcopy(RESULTS)
    for case in changed["cases"]:
        case["implementations"][FUSED]["median_s"] *= 1.5
    assert documents.filled(BENCHMARKS, lambda name: changed) != BENCHMARKS
    page = tmp_path / "page.md"
    page.write_text(re.sub(r"\| (\d)", "| 9\\1", BENCHMARKS), encoding="utf-8")
    monkeypatch.setattr(documents, "documents", lambda: [page])
    assert write_tables.main(["--check"]) == 1
    assert "page.md is out of date" in capsys.readouterr().out
    assert write_tables.main([]) == 0 and page.read_text(encoding="utf-8") == BENCHMARKS
    page.write_text("<!-- bench:no-such-table --><!-- end -->", encoding="utf-8")
    with pytest.raises(KeyError, match="no-such-table"):
        write_tables.main([])


def record(name: str, dtype: str, layout: str, **seconds: float) -> dict:
    """A case as results have it, of 2 M parameters."""
    size = 28e6 if dtype == "float32" else 14e6
    found = {
        key: {"median_s": x, "GB_per_s": 2 * size / x / 1e9, "samples": 9, "peak_bytes": 16 * x}
        for key, x in seconds.items()
    }
    return {
        "suite": "buffers", "case": name, "dtype": dtype, "gradient_layout": layout, "tensors": 1,
        "parameters": 2_000_000, "title": f"{name} {dtype} {layout}", "is_training_step": False,
        "implementations": found,
    }  # fmt: skip


CASES = [
    record("1×1", "float32", "row-major", **{FUSED: 1.0, COPY: 0.9, "torch": 1.2, MLX: 10.0, CLIPPING: 1.3}),
    record("1×1", "float32", "column-major", **{FUSED: 1.5, COPY: 0.9, "torch": 1.2, MLX: 30.0, CLIPPING: 1.6}),
    record("2×1", "bfloat16", "row-major", **{FUSED: 2.0, COPY: 1.0, "torch": 1.8, MLX: 4.0}),
]  # fmt: skip


def test_falls_short_has_the_worst_case_of_each_metric() -> None:
    made = speed.worst_cases({"cases": CASES})
    rows = {line.split(" | ")[0][2:]: line.split(" | ")[1:] for line in made.splitlines()[2:]}
    for start, slower, middle, worst, where in (
        ("speed, over mlx.optimizers", "0 of 3 cases", "10.0 ×", "2.00 ×", "2×1, bfloat16, row-major |"),
        ("speed, over torch", "2 of 3 cases", "0.90 ×", "0.80 ×", "1×1, float32, column-major |"),
        ("of copy bandwidth", "3 of 3 cases", "60 %", "50 %", "2×1, bfloat16, row-major |"),
        ("column-major", "1 of 1 cases", "1.50 ×", "1.50 ×", "1×1, float32, column-major |"),
        ("clipping", "2 of 2 cases", "1.30 ×", "1.30 ×", "1×1, float32, row-major |"),
    ):  # fmt: skip
        (row,) = [row for name, row in rows.items() if name.startswith(start)]
        assert row == [slower, middle, worst, where], start
    assert not [name for name in rows if "int8" in name or "compiled" in name]


def test_the_summary_has_the_worst_case_of_each_group_against_torch() -> None:
    slow = record("3×1", "float32", "row-major", **{FUSED: 1.0, "torch": 0.3})
    results = {"cases": [*CASES, slow]}
    assert speed.shown_in_summary(results) == [CASES[1], CASES[2], slow]
    assert "| 90 % |" in speed.table(speed.SUMMARY_COLUMNS, [speed.summary_row(CASES[0])], 3)
    shown = speed.shown_in_summary(RESULTS)
    for group in {speed.group(case) for case in speed.updates(RESULTS)}:
        members = [case for case in speed.updates(RESULTS) if speed.group(case) == group]
        assert min(members, key=TIMES_TORCH) in shown, group
    assert "| models: SmolLM-135M | float32 |" in speed.summary(RESULTS)


def test_training_compares_eager_with_eager_and_compiled_with_compiled() -> None:
    times = {FUSED: 1.0, MLX: 2.0, FUSED_COMPILED: 3.0, MLX_COMPILED: 12.0}
    step = record("a step", "float32", "autograd", **times) | {"is_training_step": True}
    eager, compiled = speed.training({"cases": [step], "memory": []}).splitlines()[2:]
    assert "| eager | 16 bytes | 32 bytes | 50 % | 1.00 s | 2.00 s | 2.00 |" in eager
    assert "| compiled | 48 bytes | 192 bytes | 75 % | 3.00 s | 12.00 s | 4.00 |" in compiled


def test_headline_has_the_optimizers_of_one_model() -> None:
    lines = documents.TABLES["headline"].make(documents.load("finetuning")).splitlines()
    assert lines[0] == "| optimizer | peak memory | of mlx.optimizers |"
    first = [line.split(" | ")[0] for line in lines[2:]]
    assert first == [
        "| `mlx.optimizers.AdamW`",
        "| `fused.AdamW`",
        '| `fused.AdamW`, `state_dtype="int8"`',
        '| `fused.AdamW`, `state_dtype="int4"`',
    ]
    assert "| 100 % |" in lines[2]


def test_options_have_the_spread_of_seeds_and_the_time_over_fused() -> None:
    def training_run(name: str, loss: float, seed: int = 0) -> dict:
        return {
            "dtype": "float32", "implementation": name, "regime": "from scratch", "seed": seed, "held_out_loss": loss,
            "parameter_bytes_per_parameter": 4, "state_bytes_per_parameter": 8,
        }  # fmt: skip

    runs = [
        training_run(FUSED, 2.02),
        training_run(FUSED, 1.98, seed=1),
        training_run(CLIPPING, 2.0301),
        training_run(MLX, 2.222),
    ]
    case = record("SmolLM-135M", "float32", "autograd", **{FUSED: 1.0, CLIPPING: 1.5})
    lines = precision_tables.options({"runs": runs}, {"cases": [case]}).splitlines()[2:]
    assert [line.split(" | ")[3] for line in lines] == ["identical", "equal (+0.50 %)", "+10.00 %", "± 1.00 %"]
    assert lines[1].endswith("| 1.50 |") and lines[0].endswith("| 1.00 |")


def test_plots_are_drawn_of_what_a_run_has(tmp_path) -> None:
    here = {**RESULTS["machine"]}
    step = record("a step", "float32", "autograd", **{FUSED: 1.0}) | {"is_training_step": True}
    for i, chosen in enumerate((CASES, [step], [{**CASES[0], "suite": "lora"}])):
        path = tmp_path / f"{i}.png"
        plots.save_run(path, {"machine": here, "cases": chosen, "memory": []})
        assert path.read_bytes().startswith(b"\x89PNG")
    plots.save_finetuning(tmp_path / "memory.svg", documents.load("finetuning"))
    drawn = (tmp_path / "memory.svg").read_text(encoding="utf-8")
    for label in ("Llama-3.2-1B", "SmolLM-135M", "activations", "mlx-lm", "device cpu", "fused, default options"):
        assert f"<!-- {label}" in drawn or label in drawn, label
    assert text.NONE not in drawn
