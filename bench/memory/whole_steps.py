"""Peak memory of a whole training step, each contender in a process of its own, so that no peak is another's.

MLX counts it (`mx.get_peak_memory`): parameters, moments, gradients, activations and what the update adds. torch has no
such count on the CPU, so it is left out.
"""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import NamedTuple

import mlx.core as mx

from .contenders import MLX_CONTENDERS, OPTION_CONTENDERS
from .training import Task, TrainingStep

WARM_UP_STEPS = 2
STEPS = 3


class StepMemory(NamedTuple):
    """Bytes."""

    peak: int  # the most that MLX's arrays took at once
    stored: int  # parameters and state


def memory_of_step(
    task: Task, contender: str, device: str, warm_up_steps: int = WARM_UP_STEPS, steps: int = STEPS
) -> StepMemory:
    """Of steps after the first ones."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_memory, task, contender, device, warm_up_steps, steps).result()


def _memory(task: Task, contender: str, device: str, warm_up_steps: int, steps: int) -> StepMemory:
    mx.set_default_device(getattr(mx, device))
    step = TrainingStep(task, *(MLX_CONTENDERS | OPTION_CONTENDERS)[contender])
    for _ in range(warm_up_steps):
        step.step()
    mx.reset_peak_memory()
    for _ in range(steps):
        step.step()
    return StepMemory(mx.get_peak_memory(), step.stored_bytes)
