"""Peak memory of whole training steps, each implementation in a process of its own, so that no peak is another's.

MLX counts it (`mx.get_peak_memory`): parameters, moments, gradients, activations and what the update adds. torch has no
such count on the CPU, so it is left out.
"""

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, NamedTuple

import mlx.core as mx

from ..speed.cases import Case
from ..speed.implementations import PLAIN, WITH_OPTIONS
from ..speed.training import Task, TrainingStep


class Memory(NamedTuple):
    """Bytes."""

    peak: int  # the most that MLX's arrays took at once
    stored: int  # parameters and state


def measure(
    case: Case,
    device: str,
    on_progress: Callable[[str, float], None] = lambda doing, fraction: None,
) -> dict[str, dict[str, Any]]:
    """The results of each implementation's whole step, by name."""
    names = [*PLAIN, *case.options]
    # Large models, whose steps are not timed: two steps show the peak, which does not change from step to step.
    warm_up, steps = (2, 3) if case.is_timed else (1, 1)
    results = {}
    for done, name in enumerate(names):
        on_progress(f"memory of {name}", done / len(names))
        found = memory_of_step(case.task, name, device, warm_up, steps)
        results[name] = {
            "peak_bytes": found.peak,
            "stored_bytes": found.stored,
            "stored_bytes_per_parameter": found.stored / case.size,
        }
    return results


def memory_of_step(task: Task, name: str, device: str, warm_up_steps: int = 2, steps: int = 3) -> Memory:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_memory, task, name, device, warm_up_steps, steps).result()


def _memory(task: Task, name: str, device: str, warm_up_steps: int, steps: int) -> Memory:
    mx.set_default_device(getattr(mx, device))
    step = TrainingStep(task, *(PLAIN | WITH_OPTIONS)[name])
    for _ in range(warm_up_steps):
        step.step()
    mx.reset_peak_memory()
    for _ in range(steps):
        step.step()
    return Memory(mx.get_peak_memory(), step.stored_bytes)
