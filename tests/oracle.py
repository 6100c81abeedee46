"""The reference that everything is compared with: Adam in NumPy float64, written from the papers, knowing no kernel.

`exact` rounds nothing. `stepwise` rounds each operation's result to float32 (float64 holds each one exactly enough
that this is IEEE float32 arithmetic), so a float32 kernel must match it bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import ml_dtypes
import mlx.core as mx
import numpy as np

NUMPY_DTYPES = {
    mx.float32: np.dtype(np.float32),
    mx.bfloat16: np.dtype(ml_dtypes.bfloat16),
    mx.float16: np.dtype(np.float16),
}
Rounding = Callable[[np.ndarray], np.ndarray]


def exact(x: np.ndarray) -> np.ndarray:
    return np.asarray(x, np.float64)


def stepwise(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.asarray(x, np.float64).astype(np.float32).astype(np.float64)


@dataclass(frozen=True)
class Settings:
    learning_rate: float = 1e-3
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    bias_correction: bool = False

    def arguments(self, step: int) -> dict:
        """As keyword arguments of ``fused.adam_update``."""
        return {
            "learning_rate": self.learning_rate,
            "step": step,
            "betas": (self.beta1, self.beta2),
            "eps": self.eps,
            "weight_decay": self.weight_decay,
            "bias_correction": self.bias_correction,
        }


def adam(w, g, m, v, step: int, s: Settings, r: Rounding = exact):
    """One step on float64 arrays, each operation's result passed through ``r``; returns new (w, m, v)."""
    with np.errstate(all="ignore"):
        lr, t = r(s.learning_rate), float(step)
        step_size, denominator_scale, decay = lr, 1.0, 1.0
        if s.bias_correction:
            step_size = r(lr / r(1.0 - r(r(s.beta1) ** t)))
            denominator_scale = r(1.0 / r(np.sqrt(r(1.0 - r(r(s.beta2) ** t)))))
        if s.weight_decay:
            decay = r(1.0 - r(lr * r(s.weight_decay)))
        m = r(r(r(s.beta1) * m) + r(r(1.0 - s.beta1) * g))
        v = r(r(r(s.beta2) * v) + r(r(1.0 - s.beta2) * r(g * g)))
        denominator = r(r(r(np.sqrt(v)) * denominator_scale) + r(s.eps))
        w = r(r(w * decay) - r(r(step_size * m) / denominator))
        return w, m, v


def store(x: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """The value that a tensor of ``dtype`` holds after one rounding of ``x``, as float64."""
    with np.errstate(over="ignore"):
        return stepwise(x).astype(np.float32).astype(NUMPY_DTYPES[dtype]).astype(np.float64)


def to_numpy(x: mx.array) -> np.ndarray:
    """Any of the three dtypes as float64, exactly."""
    return np.array(x.astype(mx.float32)).astype(np.float64)


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
