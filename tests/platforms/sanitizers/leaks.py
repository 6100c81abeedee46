"""A process that does a little of everything the extension does, many times, for LeakSanitizer to look at when it ends.

python tests/platforms/sanitizers/run.py leaks
"""

from __future__ import annotations

import gc

import mlx.core as mx
from mlx.utils import tree_flatten

import mlx_fused_adam as fused

OPTIONS = [
    {},
    {"state_dtype": "bfloat16"},
    {"state_dtype": "int8"},
    {"state_dtype": "int4"},
    {"master_weights": True},
    {"max_grad_norm": 1.0, "skip_nonfinite": True},
]


def train(dtype: mx.Dtype, options: dict, is_compiled: bool) -> None:
    parameters = {
        "a": mx.ones((33, 70), dtype),
        "b": mx.ones(70000, dtype),
        "c": mx.ones((), dtype),
    }
    gradients = {
        "a": mx.ones((70, 33), dtype).T,
        "b": mx.ones(70000, dtype),
        "c": mx.array(1, dtype),
    }
    optimizer = fused.AdamW(1e-3, bias_correction=True, **options)
    optimizer.init(parameters)

    def step(parameters: dict) -> dict:
        return optimizer.apply_gradients(gradients, parameters)

    if is_compiled:
        step = mx.compile(step, inputs=optimizer.state, outputs=optimizer.state)
    for _ in range(10):
        parameters = step(parameters)
        mx.eval(parameters, optimizer.state)
    assert all(x.size for _, x in tree_flatten(optimizer.state))


def reject() -> None:
    x = mx.ones(3)
    for arguments in ((x, mx.ones(4), x, x), (x, x, x, x.astype(mx.int32)), (x, x, None, x)):
        try:
            fused.adam_update(*arguments, 1e-3)
        except (TypeError, ValueError):
            continue
        raise AssertionError("a bad argument was accepted")


def transform() -> None:
    x = mx.ones((5, 6))

    def update(w: mx.array) -> mx.array:
        return fused.adam_update(w, x[0], x[0], x[0], 1e-3)[0].sum()

    mx.eval(mx.vmap(update)(x), mx.grad(update)(x[0]))


if __name__ == "__main__":
    mx.set_default_device(mx.cpu)
    for _ in range(5):
        for options in OPTIONS:
            dtype = mx.bfloat16 if "master_weights" in options else mx.float32
            for is_compiled in (False, True):
                train(dtype, options, is_compiled)
        reject()
        transform()
    gc.collect()
