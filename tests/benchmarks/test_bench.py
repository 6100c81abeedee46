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
import mlx.nn as nn
import mlx.optimizers as stock
import numpy as np
import pytest

from mlx_fused_adam import _ext
from mlx_fused_adam._tools import timing as _timing

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))
from bench import (  # noqa: E402
    cases,
    compare,
    contenders,
    goals,
    machine,
    memory,
    options,
    precision,
    precision_figures,
    precision_runs,
    problem,
    readme,
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
    files += ["--models-plot", "models.png", "--growth-plot", "growth.png"]
    files += ["--memory-plot", "memory.png"]
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


@pytest.mark.parametrize("suite", [name for name in cases.SUITES if name != "memory"])
def test_every_case_of_a_suite_has_all_figures(quick_run: Path, suite: str) -> None:
    found = [c for c in saved.load_json(quick_run / "run.json")["cases"] if c["suite"] == suite]
    asked = list(cases.SUITES[suite](True))
    assert [case["title"] for case in found] == [case.title for case in asked]
    for case, wanted in zip(found, asked, strict=True):
        whole = case["is_training_step"]
        expected = (WHOLE_STEPS if whole else UPDATES) | set(wanted.options)
        if suite == "growth":
            expected = expected | {"ours, 1 thread", "ours, 2 threads", "ours, 8 threads"}
        if len(wanted.tensors) == 1 and case["dtype"] != "float32":
            expected = expected | {"16-bit probe"}
        if options.GUARDED in wanted.options:
            expected = expected | {"stock, clipped", "stock, clipped, compiled"}
        assert set(case["contenders"]) == expected, case["title"]
        for name, figures in case["contenders"].items():
            where = f"{name} in {case['title']}"
            assert 0 < figures["low_s"] <= figures["median_s"] <= figures["high_s"], where
            assert figures["samples"] >= 2, where
            if name != "forward + backward":
                assert figures["error_over_tolerance"] <= 1, where
            size = 4 if case["dtype"] == "float32" else 2
            stored = figures.get("stored_bytes_per_parameter")
            if not whole:
                traffic = case["parameters"] * (size + 2 * stored)
                assert figures["GB_per_s"] == pytest.approx(traffic / figures["median_s"] / 1e9)
                if name not in options.OPTIONS:
                    assert stored == 3 * size, where
            if name not in ("torch fused", "forward + backward"):
                least = size + (stored or 3 * size)
                assert figures["peak_bytes"] >= least * case["parameters"], where
            if name in ("ours", "ours, compiled", *options.OPTIONS) and not whole:
                extra = figures["peak_extra_bytes_per_parameter"] * case["parameters"]
                assert extra <= goals.FEW_BYTES, where
            assert ("peak_extra_bytes_per_parameter" in figures) == (
                not whole and name != "torch fused"
            ), where


def test_options_take_the_bytes_that_they_promise(quick_run: Path) -> None:
    expected = {
        "float32": {options.BF16_STATE: 8.0, options.INT8_STATE: 6.13, options.GUARDED: 12.0},
        "bfloat16": {
            options.MASTER: 8.0,
            options.INT8_STATE: 4.13,
            options.MASTER_INT8: 6.13,
            options.GUARDED: 6.0,
        },
    }
    at = "buffers: 250×400 · 100,000 × {} · row-major gradients"
    found = {case["title"]: case for case in saved.load_json(quick_run / "run.json")["cases"]}
    for dtype, of_options in expected.items():
        case = found[at.format(dtype)]
        for name, stored in of_options.items():
            measured = case["contenders"][name]["stored_bytes_per_parameter"]
            assert measured == pytest.approx(stored, abs=0.005), name
        rows = saved.option_rows(case)
        assert [row[3] for row in rows][0] == "none" and len(rows) == 1 + len(of_options)


def test_memory_of_whole_steps_is_measured_for_each_option(quick_run: Path) -> None:
    (case,) = saved.load_json(quick_run / "run.json")["memory"]
    found = case["contenders"]
    assert set(found) == {*contenders.MLX_CONTENDERS, *options.OF_BFLOAT16}
    for name, figures in found.items():
        assert figures["peak_bytes"] > figures["stored_bytes"] > 0, name
    count = case["parameters"]
    for name, stored in (
        ("stock", 6),
        ("ours", 6),
        (options.MASTER, 8),
        (options.INT8_STATE, 4.13),
    ):
        assert found[name]["stored_bytes"] == pytest.approx(stored * count, rel=0.01), name
    peaks = {name: figures["peak_bytes"] for name, figures in found.items()}
    assert peaks["ours, compiled"] < peaks["stock, compiled"]
    assert peaks[options.INT8_STATE] < peaks["ours"] < peaks[options.MASTER]
    markdown = (quick_run / "run.md").read_text()
    for row in saved.memory_rows(case):
        assert " | ".join(row) in markdown


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
    for name in ("run.png", "models.png", "growth.png", "memory.png"):
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


def keep_remainder(self: contenders.OptionAdam) -> None:
    self.apply(self.problem.gradients)
    self.state["weight"]["remainder"] = mx.zeros_like(self.state["weight"]["remainder"])


def shift_codes(self: contenders.OptionAdam) -> None:
    self.apply(self.problem.gradients)
    self.state["weight"]["v"] = self.state["weight"]["v"] - 6


def halve_a_scale(self: contenders.OptionAdam) -> None:
    self.apply(self.problem.gradients)
    scale = self.state["weight"]["m_scale"]
    self.state["weight"]["m_scale"] = mx.concatenate([scale[:-1], scale[-1:] / 2])


@pytest.mark.parametrize("broken_step", [keep_remainder, shift_codes, halve_a_scale, do_nothing])
def test_a_wrong_step_of_an_option_is_refused(broken_step, monkeypatch) -> None:
    tensors = problem.Problem.random([shapes.ParameterShape("weight", (64, 80))], mx.bfloat16)
    contender = contenders.OptionAdam(options.MASTER_INT8, tensors, bias_correction=False)
    for step in (contender, contender.make_compiled()):
        assert problem.check_step(step, lambda step: step()) <= 1
    monkeypatch.setattr(contenders.OptionAdam, "step", broken_step)
    with pytest.raises(problem.Incorrect, match="is off by"):
        problem.check_step(contender, lambda step: step())


def test_an_option_whose_compiled_step_is_wrong_is_refused() -> None:
    tensors = problem.Problem.random(MATRIX, mx.bfloat16)

    def make() -> contenders.OptionAdam:
        contender = contenders.OptionAdam(options.MASTER, tensors, bias_correction=False)
        make_right = contender.make_compiled

        def make_wrong() -> contenders.OptionAdam:
            compiled = make_right()
            compiled.step = lambda: None
            return compiled

        contender.make_compiled = make_wrong
        return contender

    figures, _, contender = compare._checked(make)
    assert contender is None and "is off by" in figures["refused"]


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
    asked = cases.TIMED_OPTIONS_OF[str(dtype).removeprefix("mlx.core.")]
    for name, make in contenders.make_contenders(tensors, "cpu", bias_correction, asked).items():
        contender = make()
        for _ in range(3):
            assert problem.check_step(contender, lambda step: step()) <= 1, name
        if name.startswith("stock"):
            assert {tensors.state["weight"][k].dtype for k in "mv"} == {dtype}, name


def test_goals_of_options() -> None:
    fp32 = case("2048×2048", "row-major", ours=1.0)
    fp32["contenders"][options.INT8_STATE] = {
        "median_s": 1.1,
        "peak_extra_bytes_per_parameter": 20 / (4096 * 4096),
    }
    bf16 = case("2048×2048", "row-major", ours=0.5) | {"dtype": "bfloat16", "title": "16 bits"}
    for name, speed, seconds in (("probe", 10.0, 0.5), (options.MASTER, 9.0, 0.7)):
        bf16["contenders"][name] = {"GB_per_s": speed, "median_s": seconds}
    bf16["contenders"][options.INT8_STATE] = {"median_s": 0.8}
    found = {goal.name: goal for goal in goals.goals([fp32, bf16])}
    for start, measured, is_met in (
        ("of the probe's speed, master weights", 0.9, True),
        ("int8 state, times the fp32 step's speed, fp32", 1 / 1.1, False),
        ("int8 state, times the fp32 step's speed, bf16", 1 / 0.8, True),
        ("peak extra bytes in all, every option", 20, True),
    ):
        (goal,) = [goal for name, goal in found.items() if name.startswith(start)]
        assert (goal.measured, goal.met) == (pytest.approx(measured), is_met), start


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


def test_layouts_are_those_that_layers_leave_behind() -> None:
    """A transposed convolution's gradient is permuted and flipped, as the suite has it; and elements can lie apart."""
    layer = nn.ConvTranspose2d(8, 4, 3)
    loss = nn.value_and_grad(layer, lambda layer, x: layer(x).square().mean())
    real = loss(layer, mx.random.normal((2, 6, 6, 8)))[1]["weight"]
    quick = {case.name: case.tensors[0] for case in cases.layouts(True)}
    tensor = quick["ConvTranspose2d"]
    assert real.shape == tensor.shape
    made = problem.Problem.random([tensor], mx.float32).gradients["weight"]
    mx.eval(real)
    strides = [np.array(x, copy=False).strides for x in (made, real)]
    assert strides[0] == strides[1] == (4, -4 * 12, -4 * 4, 4 * 36)

    apart = problem.Problem.random([quick["every second"]], mx.float32).gradients["weight"]
    assert np.array(apart, copy=False).strides == (4 * 2 * 40, 8)
    order = [case.tensors[0] for case in cases.layouts(False) if case.name == "Bilinear"]
    assert order[0].memory_order == (2, 0, 1)


def test_ours_with_other_numbers_of_threads_leaves_the_number_as_it_was() -> None:
    before = _ext.num_threads()
    made = problem.Problem.random(MATRIX, mx.float32)
    contender = contenders.ThreadedAdam(before + 1, made, False)
    seen = []
    contender.apply = lambda gradients: seen.append(_ext.num_threads())
    contender.step()
    assert (seen, _ext.num_threads()) == ([before + 1], before)


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
    monkeypatch.setattr(run, "HAS_TORCH", True)
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
    monkeypatch.setattr(run, "HAS_TORCH", False)
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
        name: memory.memory_of_step(task, name, "cpu").peak for name in contenders.MLX_CONTENDERS
    }
    for name, peak in peaks.items():
        assert 16 * parameters < peak < 40 * parameters, name
    assert peaks["ours, compiled"] < 0.8 * peaks["stock, compiled"]
    del held


@pytest.fixture(scope="module")
def quick_precision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what one quick run of precision.py saved."""
    folder = tmp_path_factory.mktemp("precision")
    command = [sys.executable, ROOT / "bench" / "precision.py", "--quick", "--device", "cpu"]
    files = ["--json", "precision.json", "--plot", "precision.png", "--markdown", "precision.md"]
    done = subprocess.run([*command, *files], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_precision_trains_with_every_option(quick_precision: Path) -> None:
    found = saved.load_json(quick_precision / "precision.json")
    runs = {x["name"]: x for x in found["runs"]}
    assert list(runs) == [setting.name for setting in precision_runs.SETTINGS]
    used = {x["contender"] for x in found["runs"]}
    assert used == {"ours", "stock", *options.OPTIONS} - {options.GUARDED}
    for name, x in runs.items():
        assert 0 < x["final_loss"] < 6 and len(x["loss_of_pieces"]) == 1, name
        assert x["parameter_bytes_per_parameter"] == (4 if x["dtype"] == "float32" else 2), name
    for name, state in (
        ("float32: ours", 8),
        ("float32: ours, bfloat16 state", 4),
        ("bfloat16: stock", 4),
        ("bfloat16: ours", 4),
        ("bfloat16: ours, master weights", 6),
        ("bfloat16: ours, master weights + float32 state", 10),
    ):
        assert runs[name]["state_bytes_per_parameter"] == state, name
    for name, x in runs.items():
        if "int8" in name:
            whole = 5 if "master" in name else 3  # some of the tiny model's tensors are coded
            assert x["state_bytes_per_parameter"] < whole + 0.5, name
    reference = runs["float32: ours"]
    assert precision_figures.over_reference(found, reference) == 0
    assert precision_figures.noise(found) > 0
    assert "not all steps" in "; ".join(found["settings"]["not_publishable"])


def test_precision_saves_table_and_picture_and_readme_can_show_them(quick_precision: Path) -> None:
    assert (quick_precision / "precision.png").read_bytes().startswith(b"\x89PNG")
    found = saved.load_json(quick_precision / "precision.json")
    markdown = (quick_precision / "precision.md").read_text()
    assert "Provisional, not to be quoted" in markdown
    for row in precision.rows(found):
        assert "| " + " | ".join(row) + " |" in markdown
    goal_rows = precision_figures.goal_rows(found)
    assert len(goal_rows) == len(precision_figures.GOALS)
    worse = json.loads(json.dumps(found))
    for x in worse["runs"]:
        x["final_loss"] *= 1 if x["name"] == "float32: ours" else 1.006
    of_worse = {tuple(row[:2]): row[4] for row in precision_figures.goal_rows(worse)}
    assert of_worse["bfloat16", "`stochastic_rounding=True`"] == "no"
    assert [row[4] for row in goal_rows].count("yes") > list(of_worse.values()).count("yes")
    results = saved.load_json(readme.RESULTS) | {"precision": found}
    table = readme.BLOCKS["options"](results)
    for x in found["runs"]:
        shown = f"| {x['dtype']} | {precision_figures.options_text(x)} |"
        assert (shown in table) == (not x["seed"] or x["contender"] == "ours"), x["name"]
    assert readme.BLOCKS["options"](results | {"precision": None}) == readme.NOT_YET


def test_readme_shows_the_memory_of_whole_steps(quick_run: Path) -> None:
    found = saved.load_json(quick_run / "run.json")
    text = readme.BLOCKS["memory"](found)
    figures = found["memory"][0]["contenders"]
    for name in (*contenders.MLX_CONTENDERS, options.INT8_STATE):
        assert saved.bytes_text(figures[name]["peak_bytes"]) in text, name
    assert "](bench/results/memory.png)" in text
    assert readme.BLOCKS["memory"](found | {"memory": []}) == readme.NOT_YET


def test_a_diverging_run_and_one_that_stock_would_do_are_refused(monkeypatch) -> None:
    monkeypatch.setattr(precision_runs, "PIECE", 1)
    setting = precision_runs.REFERENCE
    with monkeypatch.context() as patch:
        patch.setattr(precision_runs, "mean_loss", lambda *_: mx.array(math.nan))
        with pytest.raises(precision_runs.Refused, match="float32: ours diverged"):
            precision_runs.train(setting, 1, "cpu", is_small=True)
    property_of_stock = property(lambda _: "stock (of the test)")
    monkeypatch.setattr(precision_runs.fused.AdamW, "backend", property_of_stock)
    with pytest.raises(precision_runs.Refused, match=r"updated by stock \(of the test\)"):
        precision_runs.train(setting, 1, "cpu", is_small=True)


def test_precision_with_a_refused_run_fails_and_is_not_published(monkeypatch, capsys) -> None:
    monkeypatch.setattr(precision, "run", lambda *_: ([], ["float32: ours diverged"]))
    monkeypatch.setattr(saved, "save_json", lambda *_: pytest.fail("saved"))
    assert precision.main(["--publish", "--device", "cpu"]) == 1
    assert "refused to publish: refused: float32: ours diverged" in capsys.readouterr().err
    assert precision.main(["--quick", "--device", "cpu"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--plot", "figures.xyz"], "must end in one of"),
        (["--json", "/no/such/folder/x.json"], "there is no folder"),
        (["--publish", "--quick"], "--publish goes with --device alone"),
    ],
)
def test_bad_options_of_precision(arguments: list[str], message: str, capsys) -> None:
    with pytest.raises(SystemExit) as stop:
        precision.main(["--device", "cpu", *arguments])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


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
