"""How many kernels a GPU compiles for a first step: those of the self-check, and none that the check has not tried."""

from __future__ import annotations

import re

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_map

import mlx_fused_adam as fused
from mlx_fused_adam import _backends, _self_check
from mlx_fused_adam._tools import report
from support.extension import use_extension

pytestmark = pytest.mark.usefixtures("on_the_cpu_stream")

Kernels = set[str]

PLAIN = ["adam_general", "adam_group", "adam_linear", "adam_tiled"]
QUANTIZED = ["adam_general", "adam_linear", "adam_tiled"]
NORM = ["norm_dense", "norm_general", "norm_total"]


@pytest.fixture
def compiled(emulator, emulated_extension, monkeypatch):
    """In a process that has compiled nothing: the kernels of the self-checks, and those that were asked for since."""
    use_extension(monkeypatch, emulated_extension)
    monkeypatch.setattr(_backends, "_known", {})
    of_checks: Kernels = set()
    run = _self_check.run

    def noting_run(*arguments):
        emulator.take_libraries()
        verdict = run(*arguments)
        of_checks.update(emulator.take_libraries())
        return verdict

    monkeypatch.setattr(_self_check, "run", noting_run)
    emulator.take_libraries()
    yield lambda: (of_checks, emulator.take_libraries())
    emulator.settle()


def kernels_of(libraries: Kernels) -> list[str]:
    return sorted(re.split(r"\W", name)[-1] for name in libraries)


class Block(nn.Module):
    """Large and small tensors of the usual layers: gradients in the layouts that MLX gives them."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1100, 64)
        self.convolution = nn.Conv1d(64, 64, 3, padding=1)
        self.norm = nn.RMSNorm(64)
        self.up = nn.Linear(64, 80)
        self.down = nn.Linear(80, 64)

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embedding(tokens)
        x = x + self.convolution(x)
        return self.embedding.as_linear(x + self.down(nn.gelu(self.up(self.norm(x)))))


class WithLora(nn.Module):
    """As mlx-lm's LoRALinear: its adapters are float32."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(32, 48)
        self.linear.freeze()
        self.lora_a = mx.random.normal((32, 8))
        self.lora_b = mx.zeros((8, 48))

    def __call__(self, x: mx.array) -> mx.array:
        return self.linear(x) + (x @ self.lora_a) @ self.lora_b


def step(model: nn.Module, x: mx.array, optimizer) -> None:
    loss_and_gradients = nn.value_and_grad(model, lambda x: model(x).square().mean())
    optimizer.update(model, loss_and_gradients(x)[1])
    mx.eval(model.state, optimizer.state)


# Dtype, options, kernels that are compiled, and those of them that the step does not need. Quantized state leaves small
# tensors as they are: two combinations of dtypes.
MODELS = {
    "float32": (mx.float32, {}, PLAIN, ["adam_general"]),
    "bfloat16": (mx.bfloat16, {}, PLAIN, ["adam_general"]),
    "all rounded": (mx.bfloat16, {"stochastic_rounding": True}, PLAIN, ["adam_general"]),
    "to nearest": (mx.bfloat16, {"stochastic_rounding": False}, PLAIN, ["adam_general"]),
    "int8": (mx.bfloat16, {"state_dtype": "int8"}, PLAIN + QUANTIZED, ["adam_general", *QUANTIZED]),
    "master weights": (mx.bfloat16, {"master_weights": True}, QUANTIZED, ["adam_general"]),
    "clipped": (mx.float32, {"max_grad_norm": 1.0}, PLAIN + NORM, ["adam_general", "norm_general"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_first_step_compiles_what_its_check_has_tried(compiled, name):
    dtype, options, expected, unused = MODELS[name]
    model = Block()
    model.update(tree_map(lambda p: p.astype(dtype), model.parameters()))
    step(model, mx.arange(8).reshape(1, 8), fused.AdamW(1e-3, **options))
    of_check, of_step = compiled()
    assert kernels_of(of_check) == sorted(expected)
    assert of_step <= of_check
    assert kernels_of(of_check - of_step) == sorted(unused)


def test_lora_compiles_four_kernels(compiled):
    """And runs one: what layouts its gradients will have is not known before."""
    step(WithLora(), mx.random.normal((4, 32)), fused.Adam(1e-3))
    of_check, of_step = compiled()
    assert kernels_of(of_check) == PLAIN
    assert of_step <= of_check and kernels_of(of_step) == ["adam_group"]


def test_the_name_of_the_back_end_compiles_nothing_after_a_step(compiled):
    optimizer = fused.Adam(1e-3)
    step(WithLora(), mx.random.normal((4, 32)), optimizer)
    compiled()
    assert optimizer.backend == "metal (emulated)"
    assert compiled()[1] == set()


def test_the_report_compiles_38_kernels(compiled, monkeypatch):
    monkeypatch.setattr(report, "_speed", lambda kind: {})
    monkeypatch.setattr(report, "_peaks", lambda kind: {})
    assert report.collect("cpu")["ok"]
    of_checks, after = compiled()
    assert len(of_checks) == 38 and not after
    # Those of training by default.
    linear = nn.Linear(64, 80)
    linear.update(tree_map(lambda p: p.astype(mx.bfloat16), linear.parameters()))
    step(linear, mx.ones((2, 64), mx.bfloat16), fused.AdamW(1e-3))
    assert len(compiled()[0]) == 38
