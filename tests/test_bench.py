"""The benchmark: that it runs, says what it promises, and times nobody whose step is wrong.

No test looks at how long anything takes. torch takes part where it is installed.
"""

import argparse
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as stock
import numpy as np
import pytest

from mlx_fused_adam import _timing

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))
from bench import (  # noqa: E402
    cases,
    compare,
    contenders,
    goals,
    machine,
    memory,
    problem,
    run,
    saved,
    shapes,
)
from bench.training import LanguageTask, LinearTask  # noqa: E402

UPDATES = {"ours", "ours, compiled", "stock", "stock, compiled", "probe"}
if importlib.util.find_spec("torch"):
    UPDATES.add("torch fused")
WHOLE_STEPS = {"ours", "ours, compiled", "stock", "stock, compiled", "forward + backward"}
TINY = shapes.LlamaSizes(64, 32, 64, 2, 4, 2, 8, attention_bias=True)
MATRIX = [
    shapes.ParameterShape("weight", (33, 70), column_major=True),
    shapes.ParameterShape("bias", (33,)),
]


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what one quick run of every suite saved."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, ROOT / "bench" / "run.py", "--quick", "--device", "cpu"]
    files = ["--json", "run.json", "--plot", "run.png", "--markdown", "run.md"]
    files += ["--models-plot", "models.png"]
    done = subprocess.run([*command, *files], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def test_json_names_machine_and_versions(quick_run: Path) -> None:
    found = saved.load_json(quick_run / "run.json")["machine"]
    for field in ("cpu", "cores", "memory_GiB", "threads", "device"):
        assert found[field], field
    for name in ("python", "mlx", "mlx-fused-adam"):
        assert found["versions"][name], name
    assert found["backend"] == "cpu"
    assert found["load"] >= 0


def test_json_names_the_command_and_why_its_figures_are_not_to_be_quoted(quick_run: Path) -> None:
    settings = saved.load_json(quick_run / "run.json")["settings"]
    assert settings["command"].startswith(
        "python bench/run.py --quick --device cpu --json run.json"
    )
    assert settings["seconds"] == 0.1
    reasons = "; ".join(settings["not_publishable"])
    assert "not all cases" in reasons and "0.1 s were spent on a case" in reasons
    assert reasons in (quick_run / "run.md").read_text()


@pytest.mark.parametrize("suite", cases.SUITES)
def test_every_case_of_a_suite_has_all_figures(quick_run: Path, suite: str) -> None:
    found = [
        c for c in json.loads((quick_run / "run.json").read_text())["cases"] if c["suite"] == suite
    ]
    assert len(found) == len(list(cases.SUITES[suite](True)))
    for case in found:
        whole = case["is_training_step"]
        expected = WHOLE_STEPS if whole else UPDATES
        if suite == "buffers" and case["dtype"] != "float32":
            expected = expected | {"16-bit probe"}
        assert set(case["contenders"]) == expected, case["title"]
        for name, figures in case["contenders"].items():
            where = f"{name} in {case['title']}"
            assert 0 < figures["low_s"] <= figures["median_s"] <= figures["high_s"], where
            assert figures["samples"] >= 2, where
            if name != "forward + backward":
                assert figures["error_over_tolerance"] <= 1, where
            size = 4 if case["dtype"] == "float32" else 2
            if not whole:
                speed = 7 * size * case["parameters"] / figures["median_s"] / 1e9
                assert figures["GB_per_s"] == pytest.approx(speed), where
            if name not in ("torch fused", "forward + backward"):
                assert figures["peak_bytes"] > 4 * size * case["parameters"], where
            assert ("peak_extra_bytes_per_parameter" in figures) == (
                not whole and name != "torch fused"
            ), where


def test_the_summary_divides_like_by_like(quick_run: Path) -> None:
    for case in saved.load_json(quick_run / "run.json")["cases"]:
        medians = {name: x["median_s"] for name, x in case["contenders"].items()}
        row = dict(zip(saved.SUMMARY_COLUMNS, saved.summary_row(case), strict=True))
        expected = {
            "× stock": ("stock", "ours"),
            "× stock compiled": ("stock, compiled", "ours, compiled"),
            "× torch": ("torch fused", "ours"),
            "of probe": ("probe", "ours"),
        }
        for column, (theirs, ours) in expected.items():
            if theirs in medians:
                assert row[column] == saved.number(medians[theirs] / medians[ours]), case["title"]
            else:
                assert row[column] == "–"
        assert row["samples"] == str(min(x["samples"] for x in case["contenders"].values()))


def test_tables_plot_and_markdown_are_saved(quick_run: Path) -> None:
    for name in ("run.png", "models.png"):
        assert (quick_run / name).read_bytes().startswith(b"\x89PNG")
    markdown = (quick_run / "run.md").read_text()
    printed = (quick_run / "stdout").read_text()
    for case in json.loads((quick_run / "run.json").read_text())["cases"]:
        assert case["case"] in markdown
        assert case["case"] in printed
    assert "times torch's speed" in markdown or "torch fused" not in UPDATES


def ignore_layout(self: contenders.MlxAdam) -> None:
    """Read a column-major gradient in memory order."""
    gradients = {
        path: g.T.reshape(g.shape) if g.ndim == 2 else g
        for path, g in self.problem.gradients.items()
    }
    self.apply(gradients)


def keep_v(self: contenders.MlxAdam) -> None:
    old = {path: self.problem.state[path]["v"] + 0 for path in self.problem.parameters}
    self.apply(self.problem.gradients)
    for path, v in old.items():
        self.problem.state[path]["v"] = v


def forget_last_element(self: contenders.MlxAdam) -> None:
    old = self.problem.parameters["bias"] + 0
    self.apply(self.problem.gradients)
    new = self.problem.parameters["bias"]
    self.problem.parameters["bias"] = mx.concatenate([new[:-1], old[-1:]])


def do_nothing(self: contenders.MlxAdam) -> None:
    pass


def give_nan(self: contenders.MlxAdam) -> None:
    self.problem.parameters["weight"] *= math.nan


@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=str)
@pytest.mark.parametrize(
    "broken_step", [ignore_layout, keep_v, forget_last_element, do_nothing, give_nan]
)
def test_a_wrong_step_is_refused(broken_step, dtype: mx.Dtype, monkeypatch) -> None:
    tensors = problem.Problem.random(MATRIX, dtype)
    contender = contenders.MlxAdam(stock.Adam, tensors, compiled=False, bias_correction=False)
    assert problem.check_step(contender, lambda step: step()) <= 1
    monkeypatch.setattr(contenders.MlxAdam, "step", broken_step)
    with pytest.raises(problem.Incorrect, match="is off by"):
        problem.check_step(contender, lambda step: step())


@pytest.mark.parametrize("broken_step", [do_nothing, give_nan])
def test_a_refused_contender_is_not_timed_and_fails_the_run(
    broken_step, monkeypatch, capsys
) -> None:
    timed: list[str] = []

    def record(steps, *_):
        timed.extend(steps)
        return {name: _timing.Timing(1.0, 1.0, 1.0, 1) for name in steps}

    def broken(*arguments):
        makers = real(*arguments)
        makers["ours"] = lambda: Broken(stock.Adam, *arguments[:1], False, False)
        return makers

    class Broken(contenders.MlxAdam):
        step = broken_step

    real = contenders.make_contenders
    monkeypatch.setattr(compare, "make_contenders", broken)
    monkeypatch.setattr(compare, "measure", record)
    arguments = ["--quick", "--device", "cpu", "--suite", "buffers", "--case", "25×40"]
    assert run.main(arguments) == 1
    output = capsys.readouterr()
    assert "ours" not in timed and "stock" in timed
    assert "refused ours in buffers" in output.err


@pytest.mark.parametrize("bias_correction", [False, True])
@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=str)
def test_every_contender_passes_the_check_again_and_again(
    dtype: mx.Dtype, bias_correction: bool
) -> None:
    """In one set of arrays, so none may leave the next one's in another dtype."""
    tensors = problem.Problem.random(MATRIX, dtype)
    for name, make in contenders.make_contenders(tensors, "cpu", bias_correction).items():
        contender = make()
        for _ in range(3):
            assert problem.check_step(contender, lambda step: step()) <= 1, name
        if name.startswith("stock"):
            assert {tensors.state["weight"][k].dtype for k in "mv"} == {dtype}, name


def test_contenders_take_turns_in_changing_order() -> None:
    calls: list[str] = []
    names = ["a", "b", "c"]
    steps = {name: lambda name=name: calls.append(name) for name in names}
    timings = _timing.measure(steps, seconds=0, fewest_rounds=6)
    assert set(timings) == set(names)
    turns = [name for name, before in zip(calls, [None, *calls], strict=False) if name != before]
    rounds = [turns[i : i + 3] for i in range(3, len(turns) - 2, 3)]  # the first three warm up
    assert len({tuple(order) for order in rounds}) > 1
    assert all(timing.samples == 6 * _timing.MOST_REPEATS for timing in timings.values())


def test_a_long_step_is_measured_as_often_as_there_are_rounds(monkeypatch) -> None:
    monkeypatch.setattr(_timing, "LONG_STEP_SECONDS", -1.0)
    calls: list[None] = []
    timing = _timing.measure({"a": lambda: calls.append(None)}, seconds=0, fewest_rounds=4)["a"]
    assert timing.samples == len(calls) == 4


def test_timing_is_median_and_quartiles() -> None:
    assert _timing.Timing.of([5.0, 1.0, 3.0, 2.0, 4.0]) == _timing.Timing(3.0, 2.0, 4.0, 5)
    assert _timing.Timing.of([7.0]) == _timing.Timing(7.0, 7.0, 7.0, 1)


@pytest.mark.parametrize(
    ("tensors", "count", "size"),
    [
        (shapes.gpt2(), 148, 124_439_808),
        (shapes.llama(shapes.SMOLLM_135M), 272, 134_515_008),
        (shapes.llama(shapes.QWEN2_5_500M), 290, 494_032_768),
        (shapes.llama(shapes.LLAMA3_2_1B), 146, 1_235_814_400),
        (shapes.lora(shapes.LLAMA3_2_1B, rank=8), 224, 5_636_096),
    ],
    ids=["GPT-2", "SmolLM-135M", "Qwen2.5-0.5B", "Llama-3.2-1B", "LoRA"],
)
def test_models_have_their_published_size(
    tensors: list[shapes.ParameterShape], count: int, size: int
) -> None:
    assert len({tensor.path for tensor in tensors}) == count
    assert sum(tensor.size for tensor in tensors) == size


def test_autograd_gives_the_layouts_that_shapes_say() -> None:
    """Linear weights column-major, all else row-major: in a model of the real layers, too."""
    assert sorted(LanguageTask(TINY, 2, 16).shapes()) == sorted(shapes.llama(TINY))
    assert [x.column_major for x in LinearTask(2, 8, 4).shapes() if len(x.shape) == 2] == [True] * 2


def test_problem_has_the_layouts_it_says() -> None:
    tensors = problem.Problem.random(MATRIX, mx.float32)
    assert np.array(tensors.gradients["weight"], copy=False).strides == (4, 4 * 33)
    assert np.array(tensors.parameters["weight"], copy=False).strides == (4 * 70, 4)


def case(name: str, layout: str, **medians: float) -> dict:
    return {
        "suite": "buffers", "case": name, "dtype": "float32", "gradient_layout": layout,
        "parameters": 4096 * 4096, "title": f"{name} {layout}", "is_training_step": False,
        "contenders": {k.replace("_", " "): {"median_s": x} for k, x in medians.items()},
    }  # fmt: skip


def test_goals_name_the_worst_case_and_whether_it_is_met() -> None:
    found = goals.goals(
        [
            case("4096×4096", "row-major", ours=1.0, torch_fused=1.2, probe=0.96, stock=20),
            case("4096×4096", "column-major", ours=1.3, torch_fused=1.2, probe=0.9),
        ]
    )
    by_name = {goal.name: goal for goal in found}
    torch = by_name["times torch's speed, every update"]
    assert (torch.met, torch.worst_case) == (False, "4096×4096 column-major")
    assert torch.measured == pytest.approx(1.2 / 1.3)
    assert by_name["column-major over row-major time, 4096×4096 fp32"].measured == pytest.approx(
        1.3
    )
    probe = [goal for name, goal in by_name.items() if name.startswith("of the probe's speed")]
    assert [goal.met for goal in probe] == [True, False]
    assert by_name["times stock's speed, 16M fp32 and bf16"].met
    assert "times torch's speed, many" not in by_name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "nonsense"], "invalid choice"),
        (["--plot", "figures.xyz"], "must end in one of"),
        (["--json", "/no/such/folder/x.json"], "there is no folder"),
        (["--quick", "--case", "no such case"], "no case was run"),
        (["--publish", "--quick"], "--publish goes with --device alone"),
        (["--publish", "--seconds", "1"], "--publish goes with --device alone"),
    ],
)
def test_bad_options_give_no_traceback(arguments: list[str], message: str) -> None:
    command = [sys.executable, ROOT / "bench" / "run.py", "--device", "cpu", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr, done.stderr


def options_of(*arguments: str) -> argparse.Namespace:
    return run.parse_arguments(["--device", "cpu", *arguments])


def test_a_loaded_machine_is_refused_before_anything_is_run(monkeypatch, capsys) -> None:
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (machine.BUSY + 0.6, 0.0, 0.0))
    monkeypatch.setattr(run, "run", lambda *_: pytest.fail("ran"))
    assert run.main(["--publish", "--device", "cpu"]) == 2
    assert "refused to publish: the load average was 1.1" in capsys.readouterr().err


def test_what_makes_a_run_unfit_to_quote(monkeypatch) -> None:
    monkeypatch.setattr(run, "torch", object())
    idle, busy = machine.BUSY / 2, machine.BUSY * 2
    assert run.why_not_publishable(options_of(), idle, idle) == []
    assert run.why_not_publishable(options_of("--publish"), idle, None) == []
    for arguments, load, others in (
        ([], busy, idle),
        ([], idle, busy),
        (["--quick", "--seconds", str(run.SECONDS)], idle, idle),
        (["--suite", "many"], idle, idle),
        (["--case", "25×40"], idle, idle),
        (["--bias-correction"], idle, idle),
        (["--seconds", "1"], idle, idle),
    ):
        found = run.why_not_publishable(options_of(*arguments), load, others)
        assert len(found) == 1, (arguments, load, others, found)
    monkeypatch.setattr(run, "torch", None)
    assert run.why_not_publishable(options_of(), idle, idle) == ["torch is not installed"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_the_watch_counts_others_and_not_itself() -> None:
    watch = machine.OthersWatch()
    times = [(10.0, 50.0, 7.0), (0.0, 30.0, 2.0)]  # 20 s of processors in 10 s, 5 s of them ours
    watch._times = lambda: times[0]
    watch._start = times[1]
    assert watch.busy_cores() == pytest.approx(1.5)
    wall, everyone, own = machine.OthersWatch._times()
    assert min(wall, everyone, own) > 0


def test_peak_memory_is_of_the_step_alone() -> None:
    """In a process of its own: what this one holds is not counted, and the update's share shows."""
    held = mx.zeros((1 << 24,))
    mx.eval(held)
    task = LinearTask(4, 128, 1)
    parameters = sum(shape.size for shape in task.shapes())
    peaks = {
        name: memory.peak_bytes_of_step(task, name, "cpu") for name in contenders.MLX_CONTENDERS
    }
    for name, peak in peaks.items():
        assert 16 * parameters < peak < 40 * parameters, name
    assert peaks["ours, compiled"] < 0.8 * peaks["stock, compiled"]
    del held


def test_no_module_of_the_benchmark_is_known_by_a_name_that_others_may_have() -> None:
    """`run` and `cases` exist elsewhere in tests/: whichever came first would stand for both."""
    code = (
        "import sys, bench.run\n"
        "files = {n: getattr(m, '__file__', None) or '' for n, m in sys.modules.items()}\n"
        f"print([n for n, f in files.items() if f.startswith({str(ROOT / 'bench')!r}) "
        "and n.split('.')[0] != 'bench'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr
