"""python -m mlx_fused_adam plan: its bytes are those that optimizers hold, its peaks those of training steps, and the
documents' tables what it prints.
"""

from __future__ import annotations

import itertools
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

import mlx_fused_adam as fused
from mlx_fused_adam._tools import plan
from support.processes import run_python

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT))
from bench.tables import plan as tables  # noqa: E402

OPTIONS = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
LAYERS, SIDE = 4, 1536  # so few that a gradient more is seen; 16 MB in any dtype, below which nothing is chained
CHOICES = pytest.mark.parametrize("choice", plan.CHOICES, ids=lambda x: f"{x.dtype} {x.options}")


def run(*arguments: str):
    return run_python("-m", "mlx_fused_adam", "plan", *arguments)


class Training:
    """Steps of a model whose activations are tiny, on the CPU."""

    def __init__(self, dtype: str, is_compiled: bool = False, **options) -> None:
        mx.synchronize()
        mx.clear_cache()
        others = mx.get_active_memory()
        model = nn.Sequential(*(nn.Linear(SIDE, SIDE, bias=False) for _ in range(LAYERS)))
        model.set_dtype(getattr(mx, dtype))
        optimizer = fused.AdamW(1e-5, **options)
        optimizer.init(model.trainable_parameters())
        state = [model.state, optimizer.state]
        x = mx.ones((1, SIDE), getattr(mx, dtype))
        mx.eval(state, x)
        loss_and_gradients = nn.value_and_grad(model, lambda x: model(x).square().mean())

        def train() -> None:
            _, gradients = loss_and_gradients(x)
            optimizer.update(model, gradients)

        step = mx.compile(train, inputs=state, outputs=state) if is_compiled else train
        for _ in range(2):  # the first checks the kernels, or compiles
            mx.synchronize()
            mx.reset_peak_memory()
            step()
            mx.eval(state)
        self.peak = mx.get_peak_memory() - others
        self.stored = sum(x.nbytes for _, x in tree_flatten(state) if x.size > 1) / (LAYERS * SIDE**2)


@pytest.fixture
def on_the_cpu():
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


def training_on_the_cpu(dtype: str, is_compiled: bool, options: dict) -> tuple[int, float]:
    mx.set_default_device(mx.cpu)
    training = Training(dtype, is_compiled, **options)
    return training.peak, training.stored


@pytest.fixture(scope="module")
def process():
    """One without other streams, beside which large updates are not waited for."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        yield pool


@pytest.mark.cpu_only
@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("more", [{}, {"max_grad_norm": 1.0}], ids=["", "clipped"])
@CHOICES
def test_a_training_step_takes_what_is_planned(process, choice, more, is_compiled):
    """Bytes of weights and state to the last, and the peak within 10 %."""
    planned = plan.peaks(choice, plan.Model(LAYERS * SIDE**2, SIDE**2, LAYERS))[len(more)]
    options = choice.options | more
    peak, stored = process.submit(training_on_the_cpu, choice.dtype, is_compiled, options).result()
    assert stored == choice.stored
    assert 0.9 * planned < peak < 1.1 * planned, f"{peak / planned:.3f} of the plan"


@pytest.mark.cpu_only
@pytest.mark.parametrize("options", [
    {"stochastic_rounding": True, "seed": 1}, {"bias_correction": True}, {"decay_filter": ["weight"]},
    {"max_grad_norm": 1.0, "skip_nonfinite": True, "shard_group": mx.distributed.init()},
], ids=lambda options: ", ".join(options))  # fmt: skip
def test_other_options_take_no_bytes_that_grow_with_the_model(on_the_cpu, options):
    assert Training("bfloat16", **options).stored == plan.Choice("bfloat16", {}).stored
    for name in options:
        assert f"`{name}`" in OPTIONS


def test_choices_go_from_the_most_exact_to_the_smallest_and_can_be_pasted():
    stored = [choice.stored for choice in plan.CHOICES]
    assert stored == sorted(stored, reverse=True)
    for choice in plan.CHOICES:
        optimizer = eval(choice.call(), {"fused": fused})
        assert {name: getattr(optimizer, name) for name in choice.options} == choice.options


@pytest.mark.parametrize("ranks", [2, 4, 1024])
def test_traffic_is_that_of_a_ring(ranks):
    """Counted piece by piece, as MLX's ring sends them: gather and scatter, each n - 1 pieces of n."""
    elements, item = 1024 * 3, 2
    assert plan.sent_bytes(elements, ranks) == 2 * sum(elements // ranks * item for _ in range(ranks - 1))


def test_larger_models_need_more_and_more_machines_need_less_each():
    for choice in plan.CHOICES:
        for case in (0, 1):
            by_size = [plan.peaks(choice, model)[case] for model in plan.MODELS.values()]
            by_ranks = [plan.peaks(choice, plan.MODELS["Llama-3.1-70B"], n)[case] for n in (2, 4, 8, 16)]
            assert by_size == sorted(by_size)
            assert all(few > many for few, many in itertools.pairwise(by_ranks))
    for _, model in plan.MODELS.items():
        assert plan.model_of(model.parameters) == model
        assert plan.peaks(plan.CHOICES[0], model)[0] < plan.peaks(plan.CHOICES[0], model)[1]


@pytest.mark.parametrize(
    "text, count", [("7e9", 7e9), ("7B", 7e9), ("1.2b", 1.2e9), ("135M", 135e6), ("7_000_000", 7e6), ("1.5e+3", 1500)]
)
def test_counts_are_read_as_people_write_them(text, count):
    assert plan.as_count(text) == count


@pytest.mark.parametrize(("arguments", "message"), [
    (["0"], "argument PARAMETERS: must be a number such as 7e9, 7B or 135M but got '0'"),
    (["B"], "but got 'B'"),
    (["1e999"], "but got '1e999'"),
    (["7B", "--memory", "x"], "argument --memory: must be a Mac's memory in GB, such as 32, but got 'x'"),
    (["7B", "--memory", "-1"], "expected one argument|but got '-1'"),
    (["7B", "--fully-sharded", "0"], "argument --fully-sharded: must be a number of machines such as 4 but got '0'"),
])  # fmt: skip
def test_what_is_no_number_is_refused(arguments, message, capsys):
    done = run(*arguments)
    assert done.returncode == 2 and re.search(message, done.stderr), done.stderr


@pytest.mark.parametrize("mac", [16, 64, 512])
@pytest.mark.parametrize("name", ["Llama-3.2-1B", "Llama-3.1-8B"])
def test_the_documents_table_is_what_the_command_prints(name, mac):
    model = plan.MODELS[name]
    printed = run(f"{model.parameters}", "--largest", f"{model.largest}", "--memory", f"{mac}").stdout
    verdicts = [re.findall(r" (yes|no) ", line) for line in printed.splitlines() if " = " in line]
    assert len(verdicts) == len(plan.CHOICES)
    first = [str(case.index("yes") + 1) if "yes" in case else "–" for case in zip(*verdicts, strict=True)]
    header, *rows = [line.strip("| ").split(" | ") for line in tables.fits().splitlines()]
    shown = next(row for row in rows if row[0] == name)
    assert " / ".join(first) == shown[header.index(f"{mac} GB")]


def test_the_command_says_what_fits_and_what_does_not():
    assert "python -m mlx_fused_adam plan 7B --memory 32" in OPTIONS
    fits = run("1.2B", "--memory", "24").stdout
    assert "1.2 billion parameters, 255 million in the largest tensor (in proportion to Llama-3.2-1B)" in fits
    assert "Most exact that fits: fused.AdamW(1e-5); " in fits and "GB left for activations" in fits
    assert "\nMost exact that fits clipped: fused.AdamW(1e-5, max_grad_norm=1.0); 0." in fits, fits
    tight = run("7B", "--memory", "32").stdout
    assert 'state_dtype="int4"), after' in tight and "\nMost exact that fits clipped: none.\n" in tight, tight
    assert "None fits: train LoRA adapters" in run("70B", "--memory", "8").stdout
    sharded = run("7B", "--memory", "32", "--fully-sharded", "4").stdout
    assert "shard_group=group)" in sharded and "Each sends 21.0 GB a step: at least 2.1 s" in sharded


def test_without_memory_it_plans_for_this_machine(monkeypatch):
    monkeypatch.setattr(mx, "device_info", lambda: {"device_name": "Apple M4", "max_recommended_working_set_size": 5})
    assert plan.memory_of_this_machine() == (5, "what macOS lets Apple M4 use")
    monkeypatch.setattr(mx, "device_info", lambda: {})
    memory, source = plan.memory_of_this_machine()
    assert memory > 2**28 and "of this machine's" in source
