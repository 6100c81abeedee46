"""The ordinary training loop in a process of its own, for test_in_place.py.

Prints the parameters and states whose buffers moved in any of a few steps, and in two steps evaluated at once.
Run: python ordinary_loop.py eager|compiled at-once|gradients-first cpu|gpu
"""

import sys

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

import mlx_fused_adam as fused


def address(x: mx.array) -> int:
    return np.asarray(memoryview(x.view(mx.uint8))).ctypes.data


def main(compiled: str, evaluation: str, device: str) -> None:
    mx.set_default_device({"cpu": mx.cpu, "gpu": mx.gpu}[device])
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(40, 30), nn.LayerNorm(30), nn.Linear(30, 20))
    optimizer = fused.AdamW(1e-3)
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]
    x = mx.random.normal((8, 40))
    mx.eval(state, x)
    loss_and_gradients = nn.value_and_grad(model, lambda model, x: model(x).square().sum())

    def differentiate(x):
        parameters = model.trainable_parameters()
        result = loss_and_gradients(model, x)
        model.update(parameters)  # value_and_grad leaves its tracers in the model
        return result

    def update(gradients):
        optimizer.update(model, gradients)

    def step(x):
        loss, gradients = loss_and_gradients(model, x)
        optimizer.update(model, gradients)
        return loss

    if compiled == "compiled":
        step = mx.compile(step, inputs=state, outputs=state)
        differentiate = mx.compile(differentiate, inputs=[model.state])
        update = mx.compile(update, inputs=state, outputs=state)

    def run(x):
        if evaluation == "at-once":
            return step(x)
        loss, gradients = differentiate(x)
        mx.eval(loss, gradients)
        mx.synchronize()  # a GPU lets go of what it has read a little after it says that it is done
        update(gradients)
        return loss

    def addresses():
        flat = tree_flatten([model.parameters(), optimizer.state])
        return {path: address(x) for path, x in flat if x.ndim}

    mx.eval(run(x), state)
    before = addresses()
    moved = set()
    for steps in (1, 1, 2, 1) if evaluation == "at-once" else (1, 1, 1):
        losses = [run(x) for _ in range(steps)]
        mx.eval(losses, state)
        mx.synchronize()
        moved |= {path for path, a in addresses().items() if a != before[path]}
    print("moved:", sorted(moved))


if __name__ == "__main__":
    main(*sys.argv[1:])
