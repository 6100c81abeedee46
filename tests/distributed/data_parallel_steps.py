"""One of several processes that train replicas of a model, with each option: writes the parameters and states it ends
with.

Run by test_data_parallel.py: mlx.launch -n 2 --backend ring -- python data_parallel_steps.py FOLDER [eager] [compiled].
Each rank takes its part of every batch, and nn.average_gradients joins the gradients.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten

import mlx_fused_adam as fused

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.launched import join_ring  # noqa: E402

SAMPLES, INPUTS, HIDDEN, OUTPUTS = 16, 64, 96, 40
STEPS, BAD_STEP = 4, 1
LEARNING_RATE = 1e-2


def parts(learning_rate: float, **options: Any) -> fused.MultiOptimizer:
    """Fused ones and one of MLX's."""
    return fused.MultiOptimizer(
        [fused.AdamW(learning_rate), optim.Lion(learning_rate / 10), fused.Adam(learning_rate)],
        [lambda path, _: path == "first.weight", lambda path, _: path.startswith("first")],
        **options,
    )


class Setup(NamedTuple):
    """The optimizers that train the replicas, by the name that its results have in the file."""

    kind: Callable[..., optim.Optimizer]
    options: dict[str, Any] = {}
    dtype: mx.Dtype = mx.float32
    has_bad_gradient: bool = False  # NaN, on the last rank alone


SETUPS = {
    "Adam": Setup(fused.Adam),
    "AdamW": Setup(fused.AdamW),
    "bias_correction": Setup(fused.AdamW, {"bias_correction": True}),
    "decay_filter": Setup(fused.AdamW, {"weight_decay": 0.5, "decay_filter": ["weight$"]}),
    "bfloat16 state": Setup(fused.AdamW, {"state_dtype": "bfloat16"}),
    "int8 state": Setup(fused.AdamW, {"state_dtype": "int8"}),
    "int4 state": Setup(fused.AdamW, {"state_dtype": "int4"}),
    "max_grad_norm": Setup(fused.AdamW, {"max_grad_norm": 0.5}),
    "skip_nonfinite": Setup(fused.AdamW, {"skip_nonfinite": True}, has_bad_gradient=True),
    "MultiOptimizer": Setup(parts, {"max_grad_norm": 0.5, "skip_nonfinite": True}, has_bad_gradient=True),
    "bfloat16": Setup(fused.AdamW, dtype=mx.bfloat16),
    "stochastic_rounding": Setup(fused.AdamW, {"stochastic_rounding": True, "seed": 3}, dtype=mx.bfloat16),
    "master_weights": Setup(fused.AdamW, {"master_weights": True}, dtype=mx.bfloat16),
    "24 bits": Setup(fused.AdamW, {"master_weights": True, "master_weight_bits": 24}, dtype=mx.bfloat16),
    "all": Setup(
        fused.AdamW,
        {
            "bias_correction": True,
            "decay_filter": ["weight$"],
            "state_dtype": "int8",
            "master_weights": True,
            "max_grad_norm": 0.5,
            "skip_nonfinite": True,
        },
        dtype=mx.bfloat16,
        has_bad_gradient=True,
    ),
}
# Those that are compiled too: each takes every rank its compiler's time.
COMPILED = ("AdamW", "stochastic_rounding", "all")
# Those of mlx.optimizers as well; its results are called "mlx.optimizers, Adam" in the file.
BOTH = {"Adam": optim.Adam, "AdamW": optim.AdamW, "bias_correction": optim.AdamW}


def runs_of(ways: Iterable[str]) -> list[tuple[str, str]]:
    """Names of setups, and how each is run."""
    return [(name, how) for name in SETUPS for how in ways if how == "eager" or name in COMPILED]


class Model(nn.Module):
    """A matrix large enough for 8-bit codes, and tensors too small for them. Nothing that mx.compile would compile for
    long.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(INPUTS, HIDDEN)
        self.last = nn.Linear(HIDDEN, OUTPUTS)

    def __call__(self, x: mx.array) -> mx.array:
        return self.last(self.first(x))


def mean_loss(model: Model, x: mx.array, y: mx.array) -> mx.array:
    return (model(x) * y).mean()


def batches(setup: Setup) -> list[tuple[mx.array, mx.array]]:
    rng = np.random.default_rng(0)
    found = []
    for i in range(STEPS):
        x, y = rng.normal(size=(SAMPLES, INPUTS)), rng.normal(size=(SAMPLES, OUTPUTS))
        if setup.has_bad_gradient and i == BAD_STEP:
            y[-1, 0] = np.nan
        found.append((mx.array(x, setup.dtype), mx.array(y, setup.dtype)))
    return found


def train(setup: Setup, group: mx.distributed.Group, is_compiled: bool) -> dict[str, mx.array]:
    """Parameters and optimizer's state after the last step."""
    mx.random.seed(0)
    model = Model()
    model.set_dtype(setup.dtype)
    optimizer = setup.kind(LEARNING_RATE, **setup.options)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    mx.eval(state)
    loss_and_gradients = nn.value_and_grad(model, mean_loss)

    def step(x: mx.array, y: mx.array) -> None:
        _, gradients = loss_and_gradients(model, x, y)
        optimizer.update(model, nn.average_gradients(gradients, group))

    run = mx.compile(step, inputs=state, outputs=state) if is_compiled else step
    for batch in batches(setup):
        run(*(mx.split(x, group.size())[group.rank()] for x in batch))
        mx.eval(state)
    return dict(tree_flatten({"model": model.parameters(), "state": optimizer.state}))


def main() -> None:
    folder, ways = Path(sys.argv[1]), sys.argv[2:]
    group = join_ring(folder)
    runs = [(name, SETUPS[name], how) for name, how in runs_of(ways)]
    runs += [(f"mlx.optimizers, {name}", SETUPS[name]._replace(kind=kind), "eager") for name, kind in BOTH.items()]
    ends = {
        f"{name}/{how}/{path}": x
        for name, setup, how in runs
        for path, x in train(setup, group, how == "compiled").items()
    }
    mx.save_safetensors(str(folder / f"rank{group.rank()}.safetensors"), ends)


if __name__ == "__main__":
    main()
