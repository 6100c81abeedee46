"""What tests compare with: the float64 Adam of bench/reference.py, and what a tensor of each dtype can hold of it."""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import mlx.core as mx
import numpy as np

sys.path.append(str(Path(__file__).parent.parent))
from bench.reference import Settings, adam, exact, stepwise, to_numpy  # noqa: E402

__all__ = [
    "NUMPY_DTYPES", "Settings", "adam", "exact", "slack_of_scalars", "spacing", "stepwise", "store", "to_numpy"
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


def slack_of_scalars(w: np.ndarray, new_w: np.ndarray, step: int, s: Settings) -> np.ndarray:
    """How far a GPU's scalars may move each element of the new parameter, in one step from ``w``.

    Metal's power may be 16 units in the last place off, its reciprocal square root a few. The difference from 1, of which
    the bias corrections are made, multiplies that where beta ** step is near 1.
    """
    if not s.bias_correction:
        return np.zeros_like(new_w)
    unit = 2.0**-23
    powers = [beta**step for beta in (s.beta1, s.beta2)]
    relative = 4 * unit + sum(16 * unit * power / (1 - power) for power in powers)
    with np.errstate(invalid="ignore"):
        update = np.abs(new_w - w * (1 - s.learning_rate * s.weight_decay))
        slack = relative * update + unit * np.abs(new_w)
    return np.where(np.isfinite(slack), slack, 0.0)


def spacing(x: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """The distance from each number that ``dtype`` holds to the next; 0 for float32."""
    if dtype == mx.float32:
        return np.zeros_like(x)
    bits, smallest = {mx.bfloat16: (8, -126), mx.float16: (11, -14)}[dtype]
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(np.abs(np.where(np.isfinite(x), x, 0.0))))
    return np.exp2(np.maximum(exponent, smallest) - (bits - 1))
