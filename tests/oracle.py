"""What tests compare with: the float64 Adam of bench/reference.py, and what a tensor of each dtype can hold of it."""

from __future__ import annotations

import sys
from pathlib import Path

import ml_dtypes
import mlx.core as mx
import numpy as np

sys.path.append(str(Path(__file__).parent.parent))
from bench.reference import Settings, adam, exact, stepwise, to_numpy  # noqa: E402

__all__ = ["NUMPY_DTYPES", "Settings", "adam", "exact", "stepwise", "store", "to_numpy"]

NUMPY_DTYPES = {
    mx.float32: np.dtype(np.float32),
    mx.bfloat16: np.dtype(ml_dtypes.bfloat16),
    mx.float16: np.dtype(np.float16),
}


def store(x: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """The value that a tensor of ``dtype`` holds after one rounding of ``x``, as float64."""
    with np.errstate(over="ignore"):
        return stepwise(x).astype(np.float32).astype(NUMPY_DTYPES[dtype]).astype(np.float64)
