"""Several Python threads, each with an MLX stream of its own, updating parameters at once; each must end as one thread
alone.

    python tests/platforms/sanitizers/streams.py [STEPS [THREADS]]      # by itself; run.py runs it under
    ThreadSanitizer

Each thread has an optimizer of its own, with other storage than its neighbour's, large tensors shared among helpers,
linear and column-major gradients, old values held for a while, and errors now and then.
"""

from __future__ import annotations

import sys
import threading

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

import mlx_fused_adam as fused

SHAPES = {"large": (300, 400), "long": (70000,), "small": (5, 7), "scalar": ()}
OPTIONS = [
    {"bias_correction": True},
    {"state_dtype": "bfloat16"},
    {"state_dtype": "int8"},
    {"state_dtype": "int4"},
    {"master_weights": True},
    {"max_grad_norm": 1.0, "skip_nonfinite": True},
]


def train(which: int, steps: int) -> list[np.ndarray]:
    """Parameters and state after `steps` steps of thread number `which`, on the default stream of this thread."""
    options = OPTIONS[which % len(OPTIONS)]
    dtype = mx.bfloat16 if "master_weights" in options else mx.float32
    rng = np.random.default_rng(which)

    def draw(shape: tuple[int, ...]) -> mx.array:
        return mx.array(rng.normal(size=shape).astype(np.float32)).astype(dtype)

    parameters = {name: draw(shape) for name, shape in SHAPES.items()}
    gradients = [{name: draw(shape[::-1]).T for name, shape in SHAPES.items()} for _ in range(4)]
    optimizer = fused.AdamW(1e-3, **options)
    held = []
    for step in range(steps):
        parameters = optimizer.apply_gradients(gradients[step % 4], parameters)
        if step % 3 == 0:
            mx.async_eval(parameters, optimizer.state)
        else:
            mx.eval(parameters, optimizer.state)
        held = [*held[-2:], dict(parameters)]
        if step % 50 == 0:
            try:
                fused.adam_update(mx.ones(3), mx.ones(4), mx.ones(3), mx.ones(3), 1e-3)
            except ValueError:
                continue
            raise AssertionError("a gradient of another shape was accepted")
    mx.eval(parameters, optimizer.state)
    arrays = [x for _, x in tree_flatten([parameters, optimizer.state])]
    return [np.array(x.astype(mx.float32)) for x in arrays]


def main(steps: int = 300, threads: int = 5) -> None:
    mx.set_default_device(mx.cpu)
    fused.set_num_threads(4)
    results: dict[int, list[np.ndarray]] = {}

    def work(which: int) -> None:
        with mx.stream(mx.new_stream(mx.cpu)):
            results[which] = train(which, steps)

    workers = [threading.Thread(target=work, args=(which,)) for which in range(threads)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for which in range(threads):
        for actual, expected in zip(results[which], train(which, steps), strict=True):
            np.testing.assert_array_equal(actual, expected)
    print(f"{threads} threads, {steps} steps each: as one thread alone")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
