"""The reference for everything: Adam in NumPy float64, written from the papers, independent of the kernels.

Kingma & Ba 2015; Loshchilov & Hutter 2019; in the form of mlx.optimizers. `exact` rounds nothing. `stepwise` rounds
each operation's result to float32 (float64 holds each one exactly enough that this is IEEE float32 arithmetic), so a
float32 kernel must match it bit for bit. Benchmarks and tests use it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

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


def to_numpy(x: mx.array) -> np.ndarray:
    """Any of the three dtypes as float64, exactly."""
    return np.array(x.astype(mx.float32)).astype(np.float64)
