"""One training of the example's model for precision.py: parameters of a dtype, an optimizer, its options.

Each run has the same batches in the same order. With 16-bit parameters forward and backward are in 16 bits too, but for the
loss itself, which is taken in float32 from 16-bit logits: in bfloat16 it would have three digits.
"""

import math
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as stock
import numpy as np
from mlx.utils import tree_flatten

import mlx_fused_adam as fused

from .example import Transformer, learning_rate_schedule, parse_arguments
from .names import OURS, STOCK
from .options import ALL_OF_BFLOAT16, INT8_STATE, OF_FLOAT32, OPTIONS

PIECE = 10  # steps whose mean loss is kept
HELD_OUT_BATCHES, HELD_OUT_BATCH_SIZE = 8, 16  # as in the example


@dataclass(frozen=True)
class Setting:
    """What is trained: parameters of a dtype, with a contender of bench/run.py, from the parameters of a seed."""

    dtype: str
    contender: str
    seed: int = 0  # of the parameters at the start; batches are the same for all

    @property
    def name(self) -> str:
        seed = f", seed {self.seed}" if self.seed else ""
        return f"{self.dtype}: {self.contender}{seed}"


REFERENCE = Setting("float32", OURS)
OTHER_SEEDS = [Setting("float32", OURS, seed) for seed in (1, 2)]
SETTINGS = [
    REFERENCE,
    *OTHER_SEEDS,
    *(Setting("float32", option) for option in OF_FLOAT32),
    Setting("bfloat16", STOCK),
    Setting("bfloat16", OURS),
    *(Setting("bfloat16", option) for option in ALL_OF_BFLOAT16 if option != INT8_STATE),
]


class Refused(Exception):
    """A run that is not what its name says, or did not end with a number."""


def use_one_thread() -> None:
    """In a process whose runs stand beside those of others."""
    fused.set_num_threads(1)


def train(setting: Setting, steps: int, device: str, is_small: bool = False) -> dict[str, Any]:
    """The losses of a whole run, the loss on held-out text, and the bytes of what is kept."""
    mx.set_default_device(getattr(mx, device))
    example = parse_arguments(
        ["--dims", "32", "--layers", "1", "--context", "16"] if is_small else []
    )
    corpus = example.corpus
    mx.random.seed(setting.seed)
    model = Transformer(
        len(corpus.characters), example.context, example.dims, example.heads, example.layers
    )
    model.set_dtype(getattr(mx, setting.dtype))
    kind = stock.AdamW if setting.contender == STOCK else fused.AdamW
    optimizer = kind(
        learning_rate_schedule(example.learning_rate, steps),
        betas=[0.9, 0.98],
        weight_decay=example.weight_decay,
        bias_correction=True,
        **OPTIONS.get(setting.contender, {}),
    )
    if kind is fused.AdamW and optimizer.backend.startswith("stock"):
        raise Refused(f"{setting.name} would be updated by {optimizer.backend}")
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
        loss = compiled_step(*corpus.batch(corpus.train, example.batch_size))
        mx.eval(loss, state)
        losses.append(loss.item())
    mx.random.seed(0)
    held_out = [
        mean_loss(model, *corpus.batch(corpus.held_out, HELD_OUT_BATCH_SIZE)).item()
        for _ in range(HELD_OUT_BATCHES)
    ]
    if not all(map(math.isfinite, [*losses, *held_out])):
        raise Refused(f"{setting.name} diverged: a loss is not finite")
    return figures(setting, model, optimizer, losses, held_out)


def mean_loss(model: nn.Module, inputs: mx.array, targets: mx.array) -> mx.array:
    """Cross entropy of the next character, in nats, in float32."""
    logits = model(inputs).astype(mx.float32)
    return nn.losses.cross_entropy(logits, targets, reduction="mean")


def figures(
    setting: Setting,
    model: nn.Module,
    optimizer: stock.Optimizer,
    losses: list[float],
    held_out: list[float],
) -> dict[str, Any]:
    """As the JSON file has a run; the final loss is the mean of the last ninth of the steps, a hundred of the example's."""
    parameters = tree_flatten(model.parameters())
    count = sum(x.size for _, x in parameters)
    numbers = ("step", "learning_rate")
    state = [(path, x) for path, x in tree_flatten(optimizer.state) if path not in numbers]
    last = max(1, len(losses) // 9)
    pieces = [float(np.mean(losses[i : i + PIECE])) for i in range(0, len(losses), PIECE)]
    return {
        "name": setting.name,
        "dtype": setting.dtype,
        "contender": setting.contender,
        "seed": setting.seed,
        "parameters": count,
        "parameter_bytes_per_parameter": sum(x.nbytes for _, x in parameters) / count,
        "state_bytes_per_parameter": sum(x.nbytes for _, x in state) / count,
        "final_loss": round(float(np.mean(losses[-last:])), 6),
        "held_out_loss": round(float(np.mean(held_out)), 6),
        "loss_of_pieces": [round(x, 5) for x in pieces],
    }
