"""One training of the character model for bench/precision.py: parameters of a dtype, an optimizer, its options.

Runs of one seed and regime have the same batches in the same order. With 16-bit parameters, forward and backward are in
16 bits too, except for the loss itself.
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

from ..tables import names
from ..tables.names import FUSED, MLX, OPTIONS
from .character_model import Sizes, Text, Transformer, learning_rate_schedule, mean_loss

STEPS_OF_A_MEAN = 10  # whose mean loss is kept
BATCH_SIZE, HELD_OUT_BATCHES, HELD_OUT_BATCH_SIZE = 8, 8, 32
SMALL = Sizes(dims=64, heads=2, layers=1, context=32)
TINY = Sizes(dims=64, heads=2, layers=1, context=8)
SEEDS = (0, 1, 2)

Weights = dict[str, np.ndarray]


@dataclass(frozen=True)
class Regime:
    """What is trained on which text, at which learning rate; a falling one has a warm-up and a cosine."""

    name: str
    text: str
    learning_rate: float
    steps: int
    falls: bool
    is_trained_before: bool = False


FROM_SCRATCH = Regime("from scratch", "prose", 3e-3, 480, falls=True)
FINE_TUNING = Regime("fine-tuning", "code", 1e-4, 240, falls=False, is_trained_before=True)
REGIMES = (FROM_SCRATCH, FINE_TUNING)
BEFORE = Regime("training before fine-tuning", "prose", 3e-3, 600, falls=True)


@dataclass(frozen=True)
class Setting:
    """Parameters of a dtype, and an implementation of bench/tables/names.py."""

    dtype: str
    implementation: str

    @property
    def name(self) -> str:
        return f"{self.dtype}: {self.implementation}"


REFERENCE = Setting("float32", FUSED)
SETTINGS = [
    REFERENCE,
    Setting("float32", MLX),  # agrees bit for bit
    Setting("float32", names.INT8_STATE),
    Setting("float32", names.INT4_STATE),
    Setting("bfloat16", MLX),
    Setting("bfloat16", names.NEAREST),
    Setting("bfloat16", FUSED),
    Setting("bfloat16", names.MASTER),
    Setting("bfloat16", names.MASTER_24),
    Setting("bfloat16", names.INT8_STATE),
    Setting("bfloat16", names.INT4_STATE),
    Setting("bfloat16", names.MASTER_24_INT8),
    Setting("bfloat16", names.MASTER_24_INT4),
]


class Rejected(Exception):
    """A run that is not what its name says, or did not end with a number."""


def use_one_thread() -> None:
    """Initialize a process whose runs share the machine with those of others."""
    fused.set_num_threads(1)


def train_before(steps: int, device: str, is_small: bool = False) -> Weights:
    """The float32 weights that fine-tuning starts from."""
    model = _trained(REFERENCE, BEFORE, 0, steps, device, is_small)[0]
    return {path: np.array(x) for path, x in tree_flatten(model.parameters())}


def train(
    setting: Setting,
    regime: Regime,
    seed: int,
    steps: int,
    device: str,
    is_small: bool = False,
    start: Weights | None = None,
) -> dict[str, Any]:
    """The losses of a whole run, the loss on held-out text, and the bytes of parameters and state."""
    model, optimizer, text, losses = _trained(setting, regime, seed, steps, device, is_small, start)
    mx.random.seed(0)
    held_out = [
        mean_loss(model, *text.batch(text.held_out, HELD_OUT_BATCH_SIZE)).item() for _ in range(HELD_OUT_BATCHES)
    ]
    if not all(map(math.isfinite, [*losses, *held_out])):
        raise Rejected(f"{setting.name}, {regime.name}, diverged: a loss is not finite")
    return {
        **_bytes(model, optimizer),
        "dtype": setting.dtype,
        "implementation": setting.implementation,
        "regime": regime.name,
        "seed": seed,
        "final_loss": round(float(np.mean(losses[-final_steps(steps) :])), 6),
        "held_out_loss": round(float(np.mean(held_out)), 6),
        "mean_losses": [
            round(float(np.mean(losses[i : i + STEPS_OF_A_MEAN])), 5) for i in range(0, steps, STEPS_OF_A_MEAN)
        ],
    }


def final_steps(steps: int) -> int:
    """The final loss is the mean of this many."""
    return max(1, steps // 4)


def _trained(
    setting: Setting,
    regime: Regime,
    seed: int,
    steps: int,
    device: str,
    is_small: bool,
    start: Weights | None = None,
) -> tuple[nn.Module, mlx.optimizers.Optimizer, Text, list[float]]:
    mx.set_default_device(getattr(mx, device))
    sizes = TINY if is_small else SMALL
    text = Text(sizes.context, regime.text)
    mx.random.seed(seed)
    model = Transformer(text.vocabulary, sizes)
    if start:
        model.load_weights([(path, mx.array(x)) for path, x in start.items()])
    model.set_dtype(getattr(mx, setting.dtype))
    rate = learning_rate_schedule(regime.learning_rate, steps) if regime.falls else regime.learning_rate
    settings: dict[str, Any] = {"betas": [0.9, 0.999], "weight_decay": 0.1, "bias_correction": True}
    optimizer: mlx.optimizers.Optimizer
    if setting.implementation == MLX:
        optimizer = mlx.optimizers.AdamW(rate, **settings)
    else:
        optimizer = fused.AdamW(rate, **settings, seed=seed, **OPTIONS.get(setting.implementation, {}))
        if optimizer.backend.startswith("stock"):
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
    mx.random.seed(100 + seed)
    losses = []
    for _ in range(steps):
        loss = compiled_step(*text.batch(text.train, BATCH_SIZE))
        mx.eval(loss, state)
        losses.append(loss.item())
    return model, optimizer, text, losses


def _bytes(model: nn.Module, optimizer: mlx.optimizers.Optimizer) -> dict[str, float]:
    parameters = [x for _, x in tree_flatten(model.parameters())]
    count = sum(x.size for x in parameters)
    state = [x for path, x in tree_flatten(optimizer.state) if path not in ("step", "learning_rate")]
    return {
        "parameters": count,
        "parameter_bytes_per_parameter": sum(x.nbytes for x in parameters) / count,
        "state_bytes_per_parameter": sum(x.nbytes for x in state) / count,
    }
