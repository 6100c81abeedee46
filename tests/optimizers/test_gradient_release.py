"""A gradient is released once its update has used it: at most two live beside weights, state and activations.

Each model trains in a process of its own, where MLX counts the peak; bits are those of a step whose gradients were all
evaluated before the update.
"""

import pytest

from support.processes import output_of_python

pytestmark = pytest.mark.cpu_only

PROGRAM = """
import sys
import mlx.core as mx, mlx.nn as nn
import mlx_fused_adam as fused
from mlx.utils import tree_flatten, tree_map

model, how, options = sys.argv[1], sys.argv[2], eval(sys.argv[3])
count, size = {"wide": (6, 1024), "deep": (30, 420), "deep, defined in reverse": (30, 420)}[model]

class Layers(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = [nn.Linear(size, size) for _ in range(count)]

    def __call__(self, x):
        for layer in reversed(self.layers) if "reverse" in model else self.layers:
            x = nn.relu(layer(x))
        return x

mx.random.seed(0)
layers, x = Layers(), mx.random.normal((4, size))
value_and_grad = nn.value_and_grad(layers, lambda layers, x: layers(x).square().mean())
optimizer, plain = fused.AdamW(1e-3, **options), fused.AdamW(1e-3, **options)
start = tree_map(mx.array, layers.parameters())

def step(x):
    loss, gradients = value_and_grad(layers, x)
    optimizer.update(layers, gradients)
    return loss

expected = start
for _ in range(3):
    layers.update(expected)
    gradients = value_and_grad(layers, x)[1]
    mx.eval(gradients)
    expected = plain.apply_gradients(gradients, expected)
    mx.eval(expected, plain.state)
expected = tree_map(lambda x: mx.sum(mx.abs(x)).item(), expected)
del plain, gradients

layers.update(start)
del start
optimizer.init(layers.parameters())
mx.eval(layers.state, optimizer.state)
if how == "compiled":
    step = mx.compile(step, inputs=[layers.state, optimizer.state], outputs=[layers.state, optimizer.state])
for _ in range(3):
    mx.synchronize()
    mx.reset_peak_memory()
    mx.eval(step(x), layers.state, optimizer.state)
assert tree_map(lambda x: mx.sum(mx.abs(x)).item(), layers.parameters()) == expected
stored = sum(x.nbytes for _, x in tree_flatten([layers.parameters(), optimizer.state]))
print((mx.get_peak_memory() - stored) / (4 * size**2))
"""


def gradients_at_the_peak(model: str, how: str, options: str = "{}") -> float:
    """The bytes beside weights and state, in gradients of a layer; activations are a fiftieth of one here."""
    return float(output_of_python("-c", PROGRAM, model, how, options))


@pytest.mark.parametrize("how", ["eager", "compiled"])
@pytest.mark.parametrize("model", ["wide", "deep", "deep, defined in reverse"])
def test_two_gradients_live_at_most(model, how):
    assert gradients_at_the_peak(model, how) < 2.8


def test_clipping_needs_all_of_them():
    assert gradients_at_the_peak("wide", "eager", "{'max_grad_norm': 1.0}") > 5.5
