"""Peak memory of a step of a fully sharded model, whose blocks MLX gathers once or, by mx.checkpoint, twice.

    MLX_BFS_MAX_WIDTH=4 mlx.launch -n 2 --backend ring -- $(which python) $PWD/tests/distributed/fully_sharded_memory.py

prints what a step needs beside parameters and state, in bytes of the whole parameters. Run by test_sharded.py too.
"""

from __future__ import annotations

import json

import mlx.core as mx
import mlx.nn as nn
from fully_sharded_steps import sum_scatter

import mlx_fused_adam as fused

BLOCKS, WIDTH = 48, 512


class Model(nn.Module):
    def __init__(self, group: mx.distributed.Group, is_gathered_again: bool) -> None:
        super().__init__()
        linears = [nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(BLOCKS)]
        self.blocks = [nn.fully_shard(linear, group=group) for linear in linears]
        self.is_gathered_again = is_gathered_again

    def __call__(self, x: mx.array) -> mx.array:
        for block in self.blocks:
            x = nn.relu(nn.utils.checkpoint(block)(x) if self.is_gathered_again else block(x))
        return x


def peak(group: mx.distributed.Group, is_gathered_again: bool) -> float:
    model = Model(group, is_gathered_again)
    optimizer = fused.AdamW(1e-3)
    optimizer.init(model.trainable_parameters())
    loss_and_gradients = nn.value_and_grad(model, lambda model, x: model(x).square().mean())
    x = mx.random.normal((4, WIDTH))
    mx.eval(model.parameters(), optimizer.state, x)
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    loss, gradients = loss_and_gradients(model, x)
    optimizer.update(model, gradients)
    del gradients
    mx.eval(loss, model.parameters(), optimizer.state)
    mx.synchronize()
    return (mx.get_peak_memory() - before) / (BLOCKS * WIDTH * WIDTH * mx.float32.size)


def main() -> None:
    mx.set_default_device(mx.cpu)
    group = mx.distributed.init(backend="ring", strict=True)
    mx.distributed.sum_scatter = sum_scatter
    peaks = {"gathered once": peak(group, False), "gathered again": peak(group, True)}
    if group.rank() == 0:
        print(json.dumps({name: round(x, 2) for name, x in peaks.items()}))


if __name__ == "__main__":
    main()
