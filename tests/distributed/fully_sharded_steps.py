"""One of several processes that train a model which nn.fully_shard has wrapped: writes what it ends with.

Run by test_sharded.py: mlx.launch -n 2 --backend ring -- python fully_sharded_steps.py FOLDER eager,compiled
[FOLDER OF OTHER RANKS].
MLX's ring has no sum_scatter, which nn.fully_shard needs: all_sum and a slice stand in for it. The result is the same,
and twice as much is sent.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

import mlx_fused_adam as fused

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.launched import join_ring  # noqa: E402

SAMPLES, INPUTS, OUTPUTS = 12, 96, 132  # samples and outputs are divisible by 2 and by 3
STEPS, BAD_STEP, SAVED_STEP = 5, 1, 3
LEARNING_RATE, MAX_NORM = 1e-2, 0.05
GUARD = {"max_grad_norm": MAX_NORM, "skip_nonfinite": True}
EVERYTHING = {"state_dtype": "int8", "master_weights": True, "bias_correction": True, **GUARD}

Tree = dict[str, mx.array]
Group = mx.distributed.Group


def sum_scatter(x: mx.array, *, group: Group) -> mx.array:
    return mx.split(mx.distributed.all_sum(x, group=group), group.size())[group.rank()]


class Model(nn.Module):
    """Two layers side by side, so that a bad row of the output is one of both, and of no other row."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Linear(INPUTS, OUTPUTS)
        self.right = nn.Linear(INPUTS, OUTPUTS)

    def __call__(self, x: mx.array) -> mx.array:
        return self.left(x) + self.right(-x)


def new_model(group: Group, dtype: mx.Dtype) -> Model:
    mx.random.seed(0)
    model = Model()
    model.set_dtype(dtype)
    model.left = nn.fully_shard(model.left, group=group)
    model.right = nn.fully_shard(model.right, group=group)
    return model


def mean_loss(model: Model, x: mx.array, y: mx.array) -> mx.array:
    return (model(x) * y).mean()


def batches(dtype: mx.Dtype, has_bad_gradient: bool) -> list[tuple[mx.array, mx.array]]:
    """The batches of all ranks together. The bad gradient is that of the last row: it is in the last rank's shard
    alone.
    """
    rng = np.random.default_rng(0)
    found = []
    for i in range(STEPS):
        x, y = rng.normal(size=(SAMPLES, INPUTS)), rng.normal(size=(SAMPLES, OUTPUTS))
        if has_bad_gradient and i == BAD_STEP:
            y[:, -1] = np.nan
        found.append((mx.array(x, dtype), mx.array(y, dtype)))
    return found


class Training:
    """A model, its optimizer, and the norms that nn.utils.clip_grad_norm_sharded finds in their gradients."""

    def __init__(
        self,
        group: Group,
        new_optimizer: Callable[[], optim.Adam],
        dtype: mx.Dtype = mx.float32,
        is_compiled: bool = False,
    ) -> None:
        self.group, self.dtype = group, dtype
        self.model, self.optimizer = new_model(group, dtype), new_optimizer()
        self.optimizer.init(self.model.trainable_parameters())
        self.state = [self.model.state, self.optimizer.state]
        mx.eval(self.state)
        self.norms: list[float] = []
        step = self._step
        self._run = mx.compile(step, inputs=self.state, outputs=self.state) if is_compiled else step

    def _step(self, x: mx.array, y: mx.array) -> Any:
        _, gradients = nn.value_and_grad(self.model, mean_loss)(self.model, x, y)
        self.optimizer.update(self.model, gradients)
        return gradients

    def run(self, first: int = 0, last: int = STEPS) -> None:
        rank, size = self.group.rank(), self.group.size()
        has_guard = "skipped" in self.optimizer.state
        for batch in batches(self.dtype, has_guard)[first:last]:
            gradients = self._run(*(mx.split(x, size)[rank] for x in batch))
            mx.eval(gradients, self.state)
            _, norm = nn.utils.clip_grad_norm_sharded(gradients, MAX_NORM, self.group)
            self.norms.append(norm.item())

    def end(self) -> Tree:
        """Parameters and state, under the same paths whether they are sharded or not."""
        tree = {"model": self.model.parameters(), "state": self.optimizer.state}
        return {path.replace(".module.", "."): x for path, x in tree_flatten(tree)}


def fused_adamw(group: Group | None, options: dict[str, Any]) -> Callable[[], fused.AdamW]:
    return lambda: fused.AdamW(LEARNING_RATE, shard_group=group, **options)


def resumed(path: Path, group: Group, options: dict[str, Any], dtype: mx.Dtype) -> tuple[Tree, Tree]:
    """The ends of a run that went through, and of one that was saved on its way and went on in new objects."""
    through = Training(group, fused_adamw(group, options), dtype)
    through.run(last=SAVED_STEP)
    fused.save_optimizer(path, through.optimizer)
    parameters = tree_flatten(through.model.parameters())
    again = Training(group, fused_adamw(group, options), dtype)
    again.model.update(tree_unflatten(parameters))
    fused.load_optimizer(path, again.optimizer)
    for training in (through, again):
        training.run(first=SAVED_STEP)
    return through.end(), again.end()


def rejection(path: Path, optimizer: fused.AdamW) -> str:
    """The error of load_optimizer for a file that is not this rank's; empty if it takes it."""
    try:
        fused.load_optimizer(path, optimizer)
    except ValueError as error:
        return str(error)
    return ""


def main() -> None:
    folder, ways, *others = Path(sys.argv[1]), sys.argv[2].split(","), *map(Path, sys.argv[3:])
    group = join_ring(folder)
    rank, size = group.rank(), group.size()
    mx.distributed.sum_scatter = sum_scatter
    ends: dict[str, Tree] = {}
    runs = {
        "mlx.optimizers/eager": lambda: optim.AdamW(LEARNING_RATE),
        "fused/eager": fused_adamw(None, {}),
        **{f"clipping/{how}": fused_adamw(group, GUARD) for how in ways},
    }
    for name, new_optimizer in runs.items():
        training = Training(group, new_optimizer, is_compiled=name.endswith("compiled"))
        training.run()
        ends[name] = training.end() | {"norms": mx.array(training.norms)}

    # The second has no option that looks at the gradients: its files say all the same whose shards they are.
    least = EVERYTHING | {"state_dtype": "int4", "master_weight_bits": 24}
    setups = {"everything": (EVERYTHING, mx.bfloat16), "least": (least, mx.bfloat16), "plain": ({}, mx.float32)}
    rejected = {}
    for name, (options, dtype) in setups.items():
        path = folder / f"{name}{rank}.safetensors"
        ends[f"{name}/through"], ends[f"{name}/resumed"] = resumed(path, group, options, dtype)
        mx.eval(mx.distributed.all_sum(mx.zeros(size), group=group))  # all have saved
        other_rank = folder / f"{name}{(rank + 1) % size}.safetensors"
        rejected[f"{name}, other rank"] = rejection(other_rank, fused_adamw(group, options)())
        rejected[f"{name}, unsharded"] = rejection(path, fused_adamw(None, options)())
        for other in others:
            file = other / f"{name}{rank % 2}.safetensors"
            rejected[f"{name}, other number"] = rejection(file, fused_adamw(group, options)())
    flat = {f"{name}/{path}": x for name, end in ends.items() for path, x in end.items()}
    mx.save_safetensors(str(folder / f"end{rank}.safetensors"), flat)
    (folder / f"rejected{rank}.json").write_text(json.dumps(rejected))


if __name__ == "__main__":
    main()
