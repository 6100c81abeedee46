"""One training of the character model for bench/precision.py: parameters of a dtype, an optimizer, its options.

Each run has the same batches in the same order. With 16-bit parameters, forward and backward are in 16 bits too, except
for the loss itself.
"""

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
from mlx.utils import tree_flatten

import mlx_fused_adam as fused

from ..tables.names import ALL_OF_BFLOAT16, FUSED, INT8_STATE, MLX, OF_FLOAT32, OPTIONS
from .character_model import Sizes, Text, Transformer, learning_rate_schedule, mean_loss

STEPS_OF_A_MEAN = 10  # whose mean loss is kept
BATCH_SIZE, HELD_OUT_BATCHES, HELD_OUT_BATCH_SIZE = 8, 8, 16
TINY = Sizes(dims=32, layers=1, context=16)


@dataclass(frozen=True)
class Setting:
    """Parameters of a dtype, an implementation of bench/run.py, and the seed of the parameters at the start."""

    dtype: str
    implementation: str
    seed: int = 0

    @property
    def name(self) -> str:
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{self.dtype}: {self.implementation}{seed}"


SETTINGS = [
    *(Setting("float32", FUSED, seed) for seed in (0, 1, 2)),  # the reference, and its noise
    *(Setting("float32", option) for option in OF_FLOAT32),
    Setting("bfloat16", MLX),
    Setting("bfloat16", FUSED),
    *(Setting("bfloat16", option) for option in ALL_OF_BFLOAT16 if option != INT8_STATE),
]


class Rejected(Exception):
    """A run that is not what its name says, or did not end with a number."""


def use_one_thread() -> None:
    """Initialize a process whose runs share the machine with those of others."""
    fused.set_num_threads(1)


def train(setting: Setting, steps: int, device: str, is_small: bool = False) -> dict[str, Any]:
    """The losses of a whole run, the loss on held-out text, and the bytes of parameters and state."""
    mx.set_default_device(getattr(mx, device))
    sizes = TINY if is_small else Sizes()
    text = Text(sizes.context)
    mx.random.seed(setting.seed)
    model = Transformer(text.vocabulary, sizes)
    model.set_dtype(getattr(mx, setting.dtype))
    kind = mlx.optimizers.AdamW if setting.implementation == MLX else fused.AdamW
    optimizer = kind(
        learning_rate_schedule(5e-3, steps),
        betas=[0.9, 0.98],
        weight_decay=0.1,
        bias_correction=True,
        **OPTIONS.get(setting.implementation, {}),
    )
    if kind is fused.AdamW and optimizer.backend.startswith("stock"):
        raise Rejected(f"{setting.name} would be updated by {optimizer.backend}")
    optimizer.init(model.trainable_parameters())
    loss_and_gradients = nn.value_and_grad(model, mean_loss)
    state = [model.state, optimizer.state]
    mx.eval(state)

    def step(inputs: mx.array, targets: mx.array) -> mx.array:
        loss, gradients = loss_and_gradients(model, inputs, targets)
        optimizer.update(model, gradients)
        return loss

    compiled_step = mx.compile(step, inputs=state, outputs=state)
    mx.random.seed(0)
    losses = []
    for _ in range(steps):
        loss = compiled_step(*text.batch(text.train, BATCH_SIZE))
        mx.eval(loss, state)
        losses.append(loss.item())
    mx.random.seed(0)
    held_out = [
        mean_loss(model, *text.batch(text.held_out, HELD_OUT_BATCH_SIZE)).item() for _ in range(HELD_OUT_BATCHES)
    ]
    if not all(map(math.isfinite, [*losses, *held_out])):
        raise Rejected(f"{setting.name} diverged: a loss is not finite")
    return _results(setting, model, optimizer, losses, held_out)


def _results(
    setting: Setting,
    model: nn.Module,
    optimizer: mlx.optimizers.Optimizer,
    losses: list[float],
    held_out: list[float],
) -> dict[str, Any]:
    """One run in the JSON file; the final loss is the mean of the last ninth of the steps."""
    parameters = tree_flatten(model.parameters())
    count = sum(x.size for _, x in parameters)
    scalars = ("step", "learning_rate")
    state = [(path, x) for path, x in tree_flatten(optimizer.state) if path not in scalars]
    last, n = max(1, len(losses) // 9), STEPS_OF_A_MEAN
    return {
        "name": setting.name,
        "dtype": setting.dtype,
        "implementation": setting.implementation,
        "seed": setting.seed,
        "parameters": count,
        "parameter_bytes_per_parameter": sum(x.nbytes for _, x in parameters) / count,
        "state_bytes_per_parameter": sum(x.nbytes for _, x in state) / count,
        "final_loss": round(float(np.mean(losses[-last:])), 6),
        "held_out_loss": round(float(np.mean(held_out)), 6),
        "mean_losses": [round(float(np.mean(losses[i : i + n])), 5) for i in range(0, len(losses), n)],
    }
