"""The values that tests compare with: the float64 Adam of bench/speed/reference.py, as a tensor of each dtype holds
them.
"""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import mlx.core as mx
import numpy as np

sys.path.append(str(Path(__file__).parents[2]))
from bench.speed.reference import Settings, adam, exact, stepwise, to_numpy  # noqa: E402
from emulator.hostile import scalar_error  # noqa: E402

__all__ = [
    "FLUSHED", "NUMPY_DTYPES", "Settings", "adam", "exact", "slack_on_gpu", "stepwise", "store", "to_numpy"
]  # fmt: skip

NUMPY_DTYPES = {
    mx.float32: np.dtype(np.float32),
    mx.bfloat16: np.dtype(ml_dtypes.bfloat16),
    mx.float16: np.dtype(np.float16),
}


def store(x: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """The value that a tensor of ``dtype`` holds after one rounding of ``x``, as float64."""
    with np.errstate(over="ignore"):
        return stepwise(x).astype(np.float32).astype(NUMPY_DTYPES[dtype]).astype(np.float64)


# The loss of float32 numbers where a GPU flushes subnormal ones: a few of its smallest normal ones.
FLUSHED = 4 * float(np.finfo(np.float32).tiny)


def slack_on_gpu(w: np.ndarray, new_w: np.ndarray, step: int, s: Settings) -> np.ndarray:
    """How far a GPU may be off the float32 value of each element of the new parameter, in one step from ``w``.

    By its power and square root, of which the step's scalars are made, and by flushing an m that is divided by eps.
    """
    slack = np.full(new_w.shape, FLUSHED / s.eps if s.eps > 0 else 0.0)
    if s.bias_correction:
        with np.errstate(invalid="ignore"):
            update = np.abs(new_w - w * (1 - s.learning_rate * s.weight_decay))
            slack += scalar_error(s.beta1, s.beta2, step) * update + 2.0**-23 * np.abs(new_w)
    return np.where(np.isfinite(slack), slack, 0.0)
