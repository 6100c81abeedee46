"""Peak memory of a whole training step, each contender in a process of its own, so that no peak is another's.

MLX counts it (`mx.get_peak_memory`): parameters, moments, gradients, activations and what the update adds. torch has no
such count on the CPU, so it is left out.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import mlx.core as mx

from .contenders import MLX_CONTENDERS
from .training import Task, TrainingStep

WARM_UP_STEPS = 2
STEPS = 3


def peak_bytes_of_step(task: Task, contender: str, device: str) -> int:
    """The most bytes that MLX's arrays took at once in a step after the first ones."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_peak_bytes, task, contender, device).result()


def _peak_bytes(task: Task, contender: str, device: str) -> int:
    mx.set_default_device(getattr(mx, device))
    step = TrainingStep(task, *MLX_CONTENDERS[contender])
    for _ in range(WARM_UP_STEPS):
        step.step()
    mx.reset_peak_memory()
    for _ in range(STEPS):
        step.step()
    return mx.get_peak_memory()
