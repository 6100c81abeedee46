"""The ordinary training loop in a process of its own, for test_in_place.py: python ordinary_loop.py eager|compiled.

Prints the parameters and states whose buffers moved in any of a few steps, and in two steps evaluated at once.
"""

import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

import mlx_fused_adam as fused


def address(x: mx.array) -> int:
    return np.asarray(memoryview(x.view(mx.uint8))).ctypes.data


def main() -> None:
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30), nn.Linear(30, 20))
    optimizer = fused.AdamW(1e-3)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    x = mx.random.normal((8, 40))
    mx.eval(state, x)
    gradients_of = nn.value_and_grad(model, lambda model, x: model(x).square().sum())

    def step(x):
        loss, gradients = gradients_of(model, x)
        optimizer.update(model, gradients)
        return loss

    run = mx.compile(step, inputs=state, outputs=state) if sys.argv[1] == "compiled" else step

    def addresses():
        flat = tree_flatten([model.parameters(), optimizer.state])
        return {path: address(x) for path, x in flat if x.ndim}

    mx.eval(run(x), state)
    before = addresses()
    moved = set()
    for steps in (1, 1, 2, 1):
        losses = [run(x) for _ in range(steps)]
        mx.eval(losses, state)
        moved |= {path for path, a in addresses().items() if a != before[path]}
    print("moved:", sorted(moved))


if __name__ == "__main__":
    main()
