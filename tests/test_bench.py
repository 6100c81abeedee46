"""The benchmark: that it runs, says what it promises, and times nobody whose step is wrong.

No test looks at how long anything takes. torch takes part where it is installed.
"""

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

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "bench"))
import cases  # noqa: E402
import contenders  # noqa: E402
import goals  # noqa: E402
import measure  # noqa: E402
import problem  # noqa: E402
import run  # noqa: E402
import shapes  # noqa: E402
import suites  # noqa: E402
from training import Task  # noqa: E402

UPDATES = {"fused", "fused, compiled", "stock", "stock, compiled", "speed of light"}
if importlib.util.find_spec("torch"):
    UPDATES.add("torch fused")
WHOLE_STEPS = {"fused", "fused, compiled", "stock", "stock, compiled", "forward + backward"}
MATRIX = [shapes.Tensor("weight", (33, 70), column_major=True), shapes.Tensor("bias", (33,))]


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with what one quick run of every suite saved."""
    folder = tmp_path_factory.mktemp("bench")
    command = [sys.executable, ROOT / "bench" / "run.py", "--quick", "--device", "cpu"]
    files = ["--json", "run.json", "--plot", "run.png", "--markdown", "run.md"]
    done = subprocess.run([*command, *files], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (folder / "stdout").write_text(done.stdout)
    return folder


def test_json_names_machine_and_versions(quick_run: Path) -> None:
    machine = json.loads((quick_run / "run.json").read_text())["machine"]
    for field in (
        "cpu",
        "cores",
        "memory_GiB",
        "threads",
        "python",
        "mlx",
        "mlx-fused-adam",
        "device",
    ):
        assert machine[field], field
    assert machine["backend"] == "cpu"


@pytest.mark.parametrize("suite", suites.SUITES)
def test_every_case_of_a_suite_has_all_figures(quick_run: Path, suite: str) -> None:
    found = [
        c for c in json.loads((quick_run / "run.json").read_text())["cases"] if c["suite"] == suite
    ]
    assert len(found) == len(list(suites.SUITES[suite](True)))
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
            if not whole:
                size = 4 if case["dtype"] == "float32" else 2
                speed = 7 * size * case["parameters"] / figures["median_s"] / 1e9
                assert figures["GB_per_s"] == pytest.approx(speed), where
                light = case["contenders"]["speed of light"]["median_s"] / figures["median_s"]
                assert figures["of_speed_of_light"] == pytest.approx(light), where
                assert ("peak_extra_bytes_per_parameter" in figures) == (name != "torch fused"), (
                    where
                )
        if whole:
            assert "peak_extra_bytes_per_parameter" not in case["contenders"]["fused"]
            assert "update_share" in case["contenders"]["fused, compiled"]


def test_tables_plot_and_markdown_are_saved(quick_run: Path) -> None:
    assert (quick_run / "run.png").read_bytes().startswith(b"\x89PNG")
    markdown = (quick_run / "run.md").read_text()
    printed = (quick_run / "stdout").read_text()
    for case in json.loads((quick_run / "run.json").read_text())["cases"]:
        assert f"{case['suite']}: {case['case']}" in markdown or case["suite"] == case["case"]
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


@pytest.mark.parametrize("dtype", suites.DTYPES.values(), ids=str)
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
        return {name: measure.Timing(1.0, 1.0, 1.0, 1) for name in steps}

    def broken(*arguments):
        makers = real(*arguments)
        makers["fused"] = lambda: Broken(stock.Adam, *arguments[:1], False, False)
        return makers

    class Broken(contenders.MlxAdam):
        step = broken_step

    real = contenders.make_contenders
    monkeypatch.setattr(cases, "make_contenders", broken)
    monkeypatch.setattr(cases, "measure", record)
    arguments = ["--quick", "--device", "cpu", "--suite", "buffers", "--case", "25×40"]
    assert run.main(arguments) == 1
    output = capsys.readouterr()
    assert "fused" not in timed and "stock" in timed
    assert "refused fused in buffers" in output.err


@pytest.mark.parametrize("bias_correction", [False, True])
def test_every_contender_passes_the_check_again_after_many_steps(bias_correction: bool) -> None:
    tensors = problem.Problem.random(MATRIX, mx.float32)
    for name, make in contenders.make_contenders(tensors, "cpu", bias_correction).items():
        contender = make()
        for _ in range(5):
            assert problem.check_step(contender, lambda step: step()) <= 1, name


def test_contenders_take_turns_in_changing_order() -> None:
    calls: list[str] = []
    names = ["a", "b", "c"]
    steps = {name: lambda name=name: calls.append(name) for name in names}
    timings = measure.measure(steps, seconds=0, fewest_rounds=6)
    assert set(timings) == set(names)
    turns = [name for name, before in zip(calls, [None, *calls], strict=False) if name != before]
    rounds = [turns[i : i + 3] for i in range(3, len(turns) - 2, 3)]  # the first three warm up
    assert len({tuple(order) for order in rounds}) > 1
    assert all(timing.samples == 6 * measure.MOST_REPEATS for timing in timings.values())


def test_a_long_step_is_measured_as_often_as_there_are_rounds(monkeypatch) -> None:
    monkeypatch.setattr(measure, "LONG_STEP_SECONDS", -1.0)
    calls: list[None] = []
    timing = measure.measure({"a": lambda: calls.append(None)}, seconds=0, fewest_rounds=4)["a"]
    assert timing.samples == len(calls) == 4


def test_timing_is_median_and_quartiles() -> None:
    assert measure.Timing.of([5.0, 1.0, 3.0, 2.0, 4.0]) == measure.Timing(3.0, 2.0, 4.0, 5)
    assert measure.Timing.of([7.0]) == measure.Timing(7.0, 7.0, 7.0, 1)


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
    tensors: list[shapes.Tensor], count: int, size: int
) -> None:
    assert len({tensor.path for tensor in tensors}) == count
    assert sum(tensor.size for tensor in tensors) == size


def test_autograd_gives_linear_weights_column_major_gradients() -> None:
    tensors = Task(vocabulary=64, dims=32, layers=1, batch=2, context=16).tensors()
    column_major = {tensor.path for tensor in tensors if tensor.column_major}
    matrices = {tensor.path for tensor in tensors if len(tensor.shape) == 2}
    assert column_major == matrices - {"embedding.weight"}


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
            case(
                "4096×4096", "row-major", fused=1.0, torch_fused=1.2, speed_of_light=0.96, stock=20
            ),
            case("4096×4096", "column-major", fused=1.3, torch_fused=1.2, speed_of_light=0.9),
        ]
    )
    by_name = {goal.name: goal for goal in found}
    torch = by_name["times torch's speed, every update"]
    assert (torch.met, torch.worst_case) == (False, "4096×4096 column-major")
    assert torch.measured == pytest.approx(1.2 / 1.3)
    assert by_name["column-major over row-major time, 4096×4096 fp32"].measured == pytest.approx(
        1.3
    )
    light = [goal for name, goal in by_name.items() if name.startswith("of the speed of light")]
    assert [goal.met for goal in light] == [True, False]
    assert by_name["times stock's speed, 16M fp32 and bf16"].met
    assert "times torch's speed, many" not in by_name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suite", "nonsense"], "invalid choice"),
        (["--plot", "figures.xyz"], "must end in one of"),
        (["--json", "/no/such/folder/x.json"], "there is no folder"),
        (["--quick", "--case", "no such case"], "no case was run"),
    ],
)
def test_bad_options_give_one_line(arguments: list[str], message: str) -> None:
    command = [sys.executable, ROOT / "bench" / "run.py", "--device", "cpu", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert message in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr
