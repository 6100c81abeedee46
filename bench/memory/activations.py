"""Peak memory of the activations of a step by mlx-lm: python activations.py MODEL TOKENS, with a folder that it reads.

Forward and backward as its trainer compiles them, for the first norm alone: the backward pass goes through all layers,
but makes no gradient to speak of.
"""

import sys

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx_lm.tuner.trainer import default_loss

if __name__ == "__main__":
    model = mlx_lm.load(sys.argv[1])[0]
    model.freeze()
    model.layers[0].input_layernorm.unfreeze()
    model.train()
    tokens = int(sys.argv[2])
    loss_and_gradients = nn.value_and_grad(model, default_loss)
    step = mx.compile(lambda *batch: loss_and_gradients(model, *batch), inputs=[model.state])
    batch = mx.zeros((1, tokens + 1), mx.int32), mx.array([[0, tokens]])
    mx.eval(model.parameters(), batch)
    weights = mx.get_active_memory()
    mx.reset_peak_memory()
    mx.eval(step(*batch))
    print(f"peak memory: {mx.get_peak_memory() - weights} bytes")
