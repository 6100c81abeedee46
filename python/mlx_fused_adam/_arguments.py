"""Convert users' arguments (numbers, NumPy arrays, YAML's strings) to what the extension takes, or raise.

Errors read ``[op] what must be X but got Y``. The extension checks arrays (shapes, dtypes, ranges) when it builds the
graph.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Sequence
from numbers import Complex, Real
from typing import Any

import mlx.core as mx

Scalar = float | mx.array

_LARGEST_FLOAT32 = 3.4028234663852886e38
_LARGEST_STEP = 2**63 - 1


def as_number(op: str, what: str, x: Any, finite: bool = True) -> float:
    """A float from a number or its text, since YAML reads ``1e-3`` as a string.

    Raises:
        TypeError: If ``x`` is not a number.
        ValueError: If it is not real, not finite (where it must be), or not the text of a number.
    """
    if isinstance(x, mx.array) and x.size == 1:
        x = x.item()
    if isinstance(x, Complex) and not isinstance(x, Real):
        raise ValueError(f"[{op}] {what} must be real but got {x!r}")
    if not isinstance(x, (Real, str)):
        raise TypeError(f"[{op}] {what} must be a number but got {_described(x)}")
    try:
        number = float(x)
    except OverflowError:
        number = math.inf
    except ValueError:
        raise ValueError(f"[{op}] {what} must be a number but got {x!r}") from None
    if finite and not abs(number) <= _LARGEST_FLOAT32:
        raise ValueError(f"[{op}] {what} must be finite but got {reprlib.repr(x)}")
    return number


def check_betas(op: str, betas: Any) -> tuple[float, float]:
    """Two numbers, whose range the caller checks."""
    if isinstance(betas, str) or not isinstance(betas, Sequence) or len(betas) != 2:
        kind = ValueError if isinstance(betas, Sequence) else TypeError
        raise kind(f"[{op}] betas must be two numbers but got {betas!r}")
    beta1, beta2 = (as_number(op, f"beta{i}", x, finite=False) for i, x in enumerate(betas, 1))
    return beta1, beta2


def check_ranges(op: str, betas: Sequence[float], eps: float) -> None:
    """Check what older releases of mlx.optimizers accept silently; newer ones raise first."""
    for i, beta in enumerate(betas, 1):
        if not 0 <= beta < 1:
            raise ValueError(f"[{op}] beta{i} must be in [0, 1) but got {beta}")
    if eps < 0:
        raise ValueError(f"[{op}] eps must be at least 0 but got {eps}")


def as_scalar(what: str, x: Any) -> mx.array:
    """An array as it is, or a number as a float32 array."""
    if isinstance(x, mx.array):
        return x
    if hasattr(x, "__array__") and not isinstance(x, Complex):
        return as_array(what, x)
    if what != "step":
        return mx.array(as_number("adam_update", what, x), mx.float32)
    if not isinstance(x, Complex):
        raise TypeError(f"[adam_update] step must be a number but got {_described(x)}")
    if not (isinstance(x, Real) and 1 <= x <= _LARGEST_STEP):  # type: ignore[operator]  # Real has no int beside it
        raise ValueError(f"[adam_update] step must be from 1 to 2**63 - 1 but got {reprlib.repr(x)}")
    return mx.array(float(x), mx.float32)


def as_array(what: str, x: Any, path: str = "") -> mx.array:
    """An array as it is, or a copy of a NumPy array. NumPy gradients are rejected: MLX never produces them.

    Raises:
        TypeError: For anything else, naming the path of the leaf.
    """
    if isinstance(x, mx.array):
        return x
    if what == "gradient" or not hasattr(x, "__array__"):
        leaf = f" of {path}" if path else ""
        raise TypeError(f"[adam_update] {what}{leaf} must be an array but got {_described(x)}")
    try:
        return mx.array(x)
    except (BufferError, ValueError):  # strides that MLX rejects
        return mx.array(x.copy())


def _described(x: Any) -> str:
    return "None" if x is None else f"{reprlib.repr(x)} ({type(x).__name__})"
