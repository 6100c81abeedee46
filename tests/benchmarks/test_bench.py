"""The benchmark: it runs, has the results it promises, and times no wrong step. No test looks at how long anything
takes.
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
import mlx.optimizers
import numpy as np
import pytest

from mlx_fused_adam import _ext
from mlx_fused_adam._tools import timing

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))
from bench import precision, run  # noqa: E402
from bench.accuracy import training_runs  # noqa: E402
from bench.memory import whole_steps  # noqa: E402
from bench.speed import cases, compare, implementations, machine, problem, shapes  # noqa: E402
from bench.speed.copy_bandwidth import PIECE_BYTES, CopyBandwidth  # noqa: E402
from bench.speed.training import LanguageTask, LinearTask  # noqa: E402
from bench.tables import names, speed, text  # noqa: E402
from bench.tables import precision as precision_tables  # noqa: E402
from bench.tables.names import FUSED  # noqa: E402

PLAIN = {"fused", "fused, compiled", "mlx.optimizers", "mlx.optimizers, compiled"}
UPDATES = PLAIN | {"copy"}
if importlib.util.find_spec("torch"):
    UPDATES.add("torch")
FEW_BYTES = 512  # that an update may allocate, in all
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
    done = subprocess.run([*command, *files], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "plot: run.png" in done.stdout
    (folder / "stdout").write_text(done.stdout)
    return folder


def test_json_names_machine_and_versions(quick_run: Path, process_backend: str) -> None:
    found = text.load_json(quick_run / "run.json")["machine"]
    for field in ("cpu", "cores", "memory_GiB", "threads", "device"):
        assert found[field], field
    for name in ("python", "mlx", "mlx-fused-adam"):
        assert found["versions"][name], name
    # The command asks for the CPU, where the emulated package runs the Metal path.
    assert found["backend"] == (process_backend if "emulated" in process_backend else "cpu")
    assert found["load"] >= 0


def test_json_names_the_command_and_why_its_results_are_not_to_be_quoted(quick_run: Path) -> None:
    settings = text.load_json(quick_run / "run.json")["settings"]
    assert settings["command"].startswith("python bench/run.py --quick --device cpu --json run.json")
    assert settings["seconds"] == 0.1
    reasons = "; ".join(settings["not_publishable"])
    assert "not all cases" in reasons and "0.1 s were spent on a case" in reasons
    assert reasons in (quick_run / "run.md").read_text()


@pytest.mark.parametrize("suite", [name for name in cases.SUITES if name != "memory"])
def test_every_case_of_a_suite_has_all_results(quick_run: Path, suite: str) -> None:
    found = [c for c in text.load_json(quick_run / "run.json")["cases"] if c["suite"] == suite]
    asked = list(cases.SUITES[suite](True))
    assert [case["title"] for case in found] == [case.title for case in asked]
    for case, wanted in zip(found, asked, strict=True):
        whole = case["is_training_step"]
        expected = (PLAIN | {"forward + backward"} if whole else UPDATES) | set(wanted.options)
        if suite == "growth":
            expected = expected | {names.with_threads(count) for count in (1, 2, 8)}
        if names.CLIPPING in wanted.options:
            expected = expected | {names.MLX_CLIPPED, names.MLX_CLIPPED_COMPILED}
        assert set(case["implementations"]) == expected, case["title"]
        for name, results in case["implementations"].items():
            where = f"{name} in {case['title']}"
            assert 0 < results["low_s"] <= results["median_s"] <= results["high_s"], where
            assert results["samples"] >= 2, where
            if name == "copy":
                traffic = 7 * case["parameters"] * (4 if case["dtype"] == "float32" else 2)
                assert results["GB_per_s"] == pytest.approx(traffic / results["median_s"] / 1e9)
                continue
            if name != "forward + backward":
                assert results["error_over_tolerance"] <= 1, where
            size = 4 if case["dtype"] == "float32" else 2
            stored = results.get("stored_bytes_per_parameter")
            if not whole:
                traffic = case["parameters"] * (size + 2 * stored)
                assert results["GB_per_s"] == pytest.approx(traffic / results["median_s"] / 1e9)
                if name not in names.OPTIONS:
                    assert stored == 3 * size, where
            if name not in ("torch", "forward + backward"):
                least = size + (stored or 3 * size)
                assert results["peak_bytes"] >= least * case["parameters"], where
            if name in ("fused", "fused, compiled", *names.OPTIONS) and not whole:
                extra = results["peak_extra_bytes_per_parameter"] * case["parameters"]
                assert extra <= FEW_BYTES, where
            assert ("peak_extra_bytes_per_parameter" in results) == (not whole and name != "torch"), where


def test_options_take_the_bytes_that_they_promise(quick_run: Path) -> None:
    expected = {
        "float32": {names.BF16_STATE: 8.0, names.INT8_STATE: 6.13, names.CLIPPING: 12.0},
        "bfloat16": {
            names.MASTER: 8.0,
            names.INT8_STATE: 4.13,
            names.MASTER_INT8: 6.13,
            names.CLIPPING: 6.0,
        },
    }
    at = "buffers: 250×400 · 100,000 × {} · row-major gradients"
    found = {case["title"]: case for case in text.load_json(quick_run / "run.json")["cases"]}
    for dtype, of_names in expected.items():
        case = found[at.format(dtype)]
        for name, stored in of_names.items():
            measured = case["implementations"][name]["stored_bytes_per_parameter"]
            assert measured == pytest.approx(stored, abs=0.005), name
        rows = speed.option_rows(case)
        assert [row[3] for row in rows][0] == "none" and len(rows) == 1 + len(of_names)


def test_memory_of_whole_steps_is_measured_for_each_option(quick_run: Path) -> None:
    (case,) = text.load_json(quick_run / "run.json")["memory"]
    found = case["implementations"]
    assert set(found) == {*implementations.PLAIN, *names.OF_BFLOAT16}
    for name, results in found.items():
        assert results["peak_bytes"] > results["stored_bytes"] > 0, name
    count = case["parameters"]
    for name, stored in (
        ("mlx.optimizers", 6),
        ("fused", 6),
        (names.MASTER, 8),
        (names.INT8_STATE, 4.13),
    ):
        assert found[name]["stored_bytes"] == pytest.approx(stored * count, rel=0.01), name
    peaks = {name: results["peak_bytes"] for name, results in found.items()}
    assert peaks["fused, compiled"] < peaks["mlx.optimizers, compiled"]
    assert peaks[names.INT8_STATE] < peaks["fused"] < peaks[names.MASTER]
    markdown = (quick_run / "run.md").read_text()
    for row in speed.memory_rows(case):
        assert " | ".join(row) in markdown


def test_the_summary_divides_like_by_like(quick_run: Path) -> None:
    for case in text.load_json(quick_run / "run.json")["cases"]:
        medians = {name: x["median_s"] for name, x in case["implementations"].items()}
        row = dict(zip(speed.SUMMARY_COLUMNS, speed.summary_row(case), strict=True))
        expected = {
            "× mlx.optimizers": ("mlx.optimizers", "fused", text.number),
            "× compiled": ("mlx.optimizers, compiled", "fused, compiled", text.number),
            "× torch": ("torch", "fused", text.number),
            "of copy": ("copy", "fused", text.percent),
        }
        for column, (theirs, mine, form) in expected.items():
            if theirs in medians:
                assert row[column] == form(medians[theirs] / medians[mine]), case["title"]
            else:
                assert row[column] == "–"
        assert row["samples"] == str(min(x["samples"] for x in case["implementations"].values()))


def test_tables_plot_and_markdown_are_saved(quick_run: Path) -> None:
    assert (quick_run / "run.png").read_bytes().startswith(b"\x89PNG")
    markdown = (quick_run / "run.md").read_text()
    printed = (quick_run / "stdout").read_text()
    for case in json.loads((quick_run / "run.json").read_text())["cases"]:
        assert case["case"] in markdown
        assert case["case"] in printed


def ignore_layout(self: implementations.MlxAdam) -> None:
    """Read a column-major gradient in memory order."""
    gradients = {path: g.T.reshape(g.shape) if g.ndim == 2 else g for path, g in self.problem.gradients.items()}
    self.apply(gradients)


def keep_v(self: implementations.MlxAdam) -> None:
    old = {path: self.problem.state[path]["v"] + 0 for path in self.problem.parameters}
    self.apply(self.problem.gradients)
    for path, v in old.items():
        self.problem.state[path]["v"] = v


def forget_last_element(self: implementations.MlxAdam) -> None:
    old = self.problem.parameters["bias"] + 0
    self.apply(self.problem.gradients)
    new = self.problem.parameters["bias"]
    self.problem.parameters["bias"] = mx.concatenate([new[:-1], old[-1:]])


def do_nothing(self: implementations.MlxAdam) -> None:
    pass


def give_nan(self: implementations.MlxAdam) -> None:
    self.problem.parameters["weight"] *= math.nan


@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=str)
@pytest.mark.parametrize("broken_step", [ignore_layout, keep_v, forget_last_element, do_nothing, give_nan])
def test_a_wrong_step_is_rejected(broken_step, dtype: mx.Dtype, monkeypatch) -> None:
    tensors = problem.Problem.random(MATRIX, dtype)
    implementation = implementations.MlxAdam(mlx.optimizers.Adam, tensors, compiled=False)
    assert problem.check_step(implementation, lambda step: step()) <= 1
    monkeypatch.setattr(implementations.MlxAdam, "step", broken_step)
    with pytest.raises(problem.Incorrect, match="is off by"):
        problem.check_step(implementation, lambda step: step())


def keep_remainder(self: implementations.OptionAdam) -> None:
    self.apply(self.problem.gradients)
    self.state["weight"]["remainder"] = mx.zeros_like(self.state["weight"]["remainder"])


def shift_quantized_v(self: implementations.OptionAdam) -> None:
    self.apply(self.problem.gradients)
    self.state["weight"]["v"] = self.state["weight"]["v"] - 6


def halve_a_scale(self: implementations.OptionAdam) -> None:
    self.apply(self.problem.gradients)
    scale = self.state["weight"]["m_scale"]
    self.state["weight"]["m_scale"] = mx.concatenate([scale[:-1], scale[-1:] / 2])


@pytest.mark.parametrize("broken_step", [keep_remainder, shift_quantized_v, halve_a_scale, do_nothing])
def test_a_wrong_step_of_an_option_is_rejected(broken_step, monkeypatch) -> None:
    tensors = problem.Problem.random([shapes.ParameterShape("weight", (64, 80))], mx.bfloat16)
    implementation = implementations.OptionAdam(names.MASTER_INT8, tensors)
    for step in (implementation, implementation.make_compiled()):
        assert problem.check_step(step, lambda step: step()) <= 1
    monkeypatch.setattr(implementations.OptionAdam, "step", broken_step)
    with pytest.raises(problem.Incorrect, match="is off by"):
        problem.check_step(implementation, lambda step: step())


def test_an_option_whose_compiled_step_is_wrong_is_rejected() -> None:
    tensors = problem.Problem.random(MATRIX, mx.bfloat16)

    def make() -> implementations.OptionAdam:
        implementation = implementations.OptionAdam(names.MASTER, tensors)
        make_right = implementation.make_compiled

        def make_wrong() -> implementations.OptionAdam:
            compiled = make_right()
            compiled.step = lambda: None
            return compiled

        implementation.make_compiled = make_wrong
        return implementation

    results, _, implementation = compare._checked(make)
    assert implementation is None and "is off by" in results["rejected"]


@pytest.mark.parametrize("broken_step", [do_nothing, give_nan])
def test_a_rejected_implementation_is_not_timed_and_fails_the_run(broken_step, monkeypatch, capsys) -> None:
    timed: list[str] = []

    def record(steps, *_):
        timed.extend(steps)
        return {name: timing.Timing(1.0, 1.0, 1.0, 1) for name in steps}

    def broken(*arguments):
        makers = real(*arguments)
        makers["fused"] = lambda: Broken(mlx.optimizers.Adam, arguments[0], False)
        return makers

    class Broken(implementations.MlxAdam):
        step = broken_step

    real = implementations.make_implementations
    monkeypatch.setattr(compare, "make_implementations", broken)
    monkeypatch.setattr(compare, "measure", record)
    arguments = ["--quick", "--device", "cpu", "--suite", "buffers", "--case", "25×40"]
    assert run.main(arguments) == 1
    output = capsys.readouterr()
    assert "fused" not in timed and "mlx.optimizers" in timed
    assert "rejected fused in buffers" in output.err


@pytest.mark.parametrize("dtype", cases.DTYPES.values(), ids=str)
def test_every_implementation_passes_the_check_again_and_again(dtype: mx.Dtype) -> None:
    """In one set of arrays, so none may leave the next one's in another dtype."""
    tensors = problem.Problem.random(MATRIX, dtype)
    asked = cases.TIMED_OPTIONS_OF[str(dtype).removeprefix("mlx.core.")]
    for name, make in implementations.make_implementations(tensors, "cpu", asked).items():
        implementation = make()
        for _ in range(3):
            assert problem.check_step(implementation, lambda step: step()) <= 1, name
        if name.startswith("mlx.optimizers"):
            assert {tensors.state["weight"][k].dtype for k in "mv"} == {dtype}, name


def test_implementations_take_turns_in_changing_order() -> None:
    calls: list[str] = []
    names = ["a", "b", "c"]
    steps = {name: lambda name=name: calls.append(name) for name in names}
    timings = timing.measure(steps, seconds=0, fewest_rounds=6)
    assert set(timings) == set(names)
    turns = [name for name, before in zip(calls, [None, *calls], strict=False) if name != before]
    rounds = [turns[i : i + 3] for i in range(3, len(turns) - 2, 3)]  # the first three warm up
    assert len({tuple(order) for order in rounds}) > 1
    assert all(found.samples == 6 * timing.MOST_REPEATS for found in timings.values())


def test_a_long_step_is_measured_as_often_as_there_are_rounds(monkeypatch) -> None:
    monkeypatch.setattr(timing, "LONG_STEP_SECONDS", -1.0)
    calls: list[None] = []
    found = timing.measure({"a": lambda: calls.append(None)}, seconds=0, fewest_rounds=4)["a"]
    assert found.samples == len(calls) == 4


def test_timing_is_median_and_quartiles() -> None:
    assert timing.Timing.of([5.0, 1.0, 3.0, 2.0, 4.0]) == timing.Timing(3.0, 2.0, 4.0, 5)
    assert timing.Timing.of([7.0]) == timing.Timing(7.0, 7.0, 7.0, 1)


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
def test_models_have_their_published_size(tensors: list[shapes.ParameterShape], count: int, size: int) -> None:
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


@pytest.mark.parametrize("words", [3, 100_000, PIECE_BYTES // 4 + 5])
def test_the_copy_moves_all_bytes_once(words: int, monkeypatch) -> None:
    copy = CopyBandwidth(8 * words, "cpu")
    assert sum(copy.pieces) == words and max(copy.pieces) * 4 <= PIECE_BYTES
    moved: list[int] = []

    def count(part, zero, out):
        assert zero == 0 and out is part and np.shares_memory(part, copy.array)
        moved.append(part.nbytes)

    monkeypatch.setattr(np, "add", count)
    copy.step()
    assert sum(moved) == 4 * words
    assert len(moved) >= min(_ext.num_threads(), max(1, words // 65536))


def test_the_copy_on_a_gpu_makes_as_many_new_elements(monkeypatch) -> None:
    copy = CopyBandwidth(2 * PIECE_BYTES + 8 * 5, "gpu")
    made: list[int] = []
    monkeypatch.setattr(mx, "eval", lambda x: made.append(x.size))
    copy.step()
    assert made == [PIECE_BYTES // 4, 5]


def test_fused_with_another_number_of_threads_restores_it() -> None:
    before = _ext.num_threads()
    made = problem.Problem.random(MATRIX, mx.float32)
    implementation = implementations.ThreadedAdam(before + 1, made)
    seen = []
    implementation.apply = lambda gradients: seen.append(_ext.num_threads())
    implementation.step()
    assert (seen, _ext.num_threads()) == ([before + 1], before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "nonsense"], "invalid choice"),
        (["--plot", "plot.xyz"], "must end in one of"),
        (["--json", "/no/such/folder/x.json"], "there is no folder"),
        (["--quick", "--case", "no such case"], "no case was run"),
        (["--publish", "--quick"], "only --device goes with --publish"),
        (["--publish", "--seconds", "1"], "only --device goes with --publish"),
    ],
)
def test_bad_options_give_no_traceback(arguments: list[str], message: str) -> None:
    command = [sys.executable, ROOT / "bench" / "run.py", "--device", "cpu", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr, done.stderr


def options_of(*arguments: str) -> argparse.Namespace:
    return run.parse_arguments(["--device", "cpu", *arguments])


def test_a_loaded_machine_is_rejected_before_anything_is_run(monkeypatch, capsys) -> None:
    monkeypatch.setattr(machine.os, "getloadavg", lambda: (machine.BUSY + 0.6, 0.0, 0.0))
    monkeypatch.setattr(run, "run", lambda *_: pytest.fail("ran"))
    assert run.main(["--publish", "--device", "cpu"]) == 2
    assert "not published: the load average was 1.1" in capsys.readouterr().err


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
        (["--seconds", "1"], idle, idle),
    ):
        found = run.why_not_publishable(options_of(*arguments), load, others)
        assert len(found) == 1, (arguments, load, others, found)
    monkeypatch.setattr(run, "HAS_TORCH", False)
    assert run.why_not_publishable(options_of(), idle, idle) == ["torch is not installed"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc/stat")
def test_the_watch_counts_others_and_not_itself() -> None:
    watch = machine.OthersWatch()
    times = [(10.0, 50.0, 7.0), (0.0, 30.0, 2.0)]  # 20 s of processors in 10 s, 5 s of them its own
    watch._times = lambda: times[0]
    watch._start = times[1]
    assert watch.busy_cores() == pytest.approx(1.5)
    wall, everyone, own = machine.OthersWatch._times()
    assert min(wall, everyone, own) > 0


def test_peak_memory_is_of_the_step_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a process of its own: what this one holds is not counted, and the update's share shows."""
    # With them a step may need new buffers while the last one is in flight.
    monkeypatch.delenv("FUSED_ADAM_EMULATOR_LATE_HANDLERS", raising=False)
    held = mx.zeros((1 << 24,))
    mx.eval(held)
    task = LinearTask(4, 128, 1)
    parameters = sum(shape.size for shape in task.shapes())
    peaks = {name: whole_steps.memory_of_step(task, name, "cpu").peak for name in implementations.PLAIN}
    for name, peak in peaks.items():
        assert 12 * parameters < peak < 40 * parameters, name
    assert peaks["fused, compiled"] < 0.8 * peaks["mlx.optimizers, compiled"]
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


def test_precision_trains_with_every_option_in_both_regimes(quick_precision: Path) -> None:
    found = text.load_json(quick_precision / "precision.json")
    expected = [(s.dtype, s.implementation) for s in training_runs.SETTINGS]
    assert precision_tables.rows_of(found) == expected
    assert precision_tables.regimes(found) == [x.name for x in training_runs.REGIMES]
    assert len(found["runs"]) == 2 * 2 * len(expected)
    for x in found["runs"]:
        assert 0 < x["final_loss"] < 6 and len(x["mean_losses"]) == 1, x
        assert x["parameter_bytes_per_parameter"] == (4 if x["dtype"] == "float32" else 2), x
    for row, total in (
        (("float32", FUSED), 12),
        (("float32", names.MLX), 12),
        (("bfloat16", names.MLX), 6),
        (("bfloat16", FUSED), 6),
        (("bfloat16", names.NEAREST), 6),
        (("bfloat16", names.MASTER), 8),
        (("bfloat16", names.MASTER_24), 7),
    ):
        assert precision_tables.bytes_of(found, row) == total, row
    for name, total in ((names.INT8_STATE, 4.125), (names.INT4_STATE, 3.125), (names.MASTER_24_INT4, 4.125)):
        # Small tensors are not quantized.
        assert total <= precision_tables.bytes_of(found, ("bfloat16", name)) < total + 0.2, name
    for regime in training_runs.REGIMES:
        assert precision_tables.differences(found, ("float32", names.MLX), regime.name) == [0, 0]
        assert precision_tables.difference(found, ("float32", names.MLX), regime.name) == "identical"
        assert precision_tables.spread(found, regime.name) > 0
    assert "not all steps" in "; ".join(found["settings"]["not_publishable"])


def test_fine_tuning_starts_from_what_was_trained_before() -> None:
    run = (training_runs.REFERENCE, training_runs.FINE_TUNING, 0, 1, "cpu", True)
    before = training_runs.train_before(3, "cpu", is_small=True)
    assert training_runs.train(*run, start=before)["final_loss"] < training_runs.train(*run)["final_loss"]


@pytest.mark.parametrize(
    ("losses", "shown"),
    [
        ((2.0, 3.0), "identical"),
        ((2.1, 3.3), "equal (+7.50 % ± 3.54 %)"),
        ((2.6, 4.2), "+35.00 % ± 7.07 %"),
        ((1.2, 1.8), "−40.00 % ± 0.00 %"),
    ],
)
def test_a_difference_below_the_spread_of_float32s_seeds_is_equal(losses: tuple, shown: str) -> None:
    """Seeds of float32 are 20 % from their mean; another row is compared with the same seeds."""

    def runs(implementation: str, found: tuple) -> list[dict]:
        common = {"dtype": "float32", "regime": "from scratch", "implementation": implementation}
        return [{**common, "seed": seed, "final_loss": loss} for seed, loss in enumerate(found)]

    results = {"runs": runs(FUSED, (2.0, 3.0)) + runs("other", losses)}
    assert precision_tables.spread(results, "from scratch") == pytest.approx(0.2)
    assert precision_tables.difference(results, ("float32", "other"), "from scratch") == shown


def test_precision_saves_table_and_plot(quick_precision: Path) -> None:
    assert (quick_precision / "precision.png").read_bytes().startswith(b"\x89PNG")
    found = text.load_json(quick_precision / "precision.json")
    markdown = (quick_precision / "precision.md").read_text()
    assert "Provisional, not to be quoted" in markdown
    for row in precision_tables.rows(found):
        assert "| " + " | ".join(row) + " |" in markdown


def test_a_diverging_run_and_one_without_the_kernel_are_rejected(monkeypatch) -> None:
    run = (training_runs.REFERENCE, training_runs.FROM_SCRATCH, 0, 1, "cpu", True)
    with monkeypatch.context() as patch:
        patch.setattr(training_runs, "mean_loss", lambda *_: mx.array(math.nan))
        with pytest.raises(training_runs.Rejected, match="float32: fused, from scratch, diverged"):
            training_runs.train(*run)
    backend = property(lambda _: "stock (of the test)")
    monkeypatch.setattr(training_runs.fused.AdamW, "backend", backend)
    with pytest.raises(training_runs.Rejected, match=r"updated by stock \(of the test\)"):
        training_runs.train(*run)


def test_precision_with_a_rejected_run_fails_and_is_not_published(monkeypatch, capsys) -> None:
    monkeypatch.setattr(precision, "run", lambda *_: ([], ["float32: fused diverged"]))
    monkeypatch.setattr(text, "save_json", lambda *_: pytest.fail("saved"))
    assert precision.main(["--publish", "--device", "cpu"]) == 1
    assert "not published: rejected: float32: fused diverged" in capsys.readouterr().err
    assert precision.main(["--quick", "--device", "cpu"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--plot", "plot.xyz"], "must end in one of"),
        (["--json", "/no/such/folder/x.json"], "there is no folder"),
        (["--publish", "--quick"], "only --device goes with --publish"),
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
