"""Arrays for tests: random values, memory layouts, and comparison bit for bit."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

DTYPES = (mx.float32, mx.bfloat16, mx.float16)


def random(rng: np.random.Generator, shape: Any, dtype: mx.Dtype = mx.float32, scale: float = 1.0) -> mx.array:
    return mx.array((scale * rng.normal(size=shape)).astype(np.float32)).astype(dtype)


def address(x: mx.array) -> int:
    """The place of the first element in memory."""
    return np.asarray(memoryview(x.view(mx.uint8))).ctypes.data


# ---- Layouts ----

LAYOUTS = (
    "linear", "column-major", "column-major, padded", "strided", "reversed", "broadcast", "broadcast columns",
    "between vectors",
)  # fmt: skip


def lay_out(x: mx.array, layout: str) -> mx.array:
    """The same values in another memory layout; "broadcast" ones repeat the first row or column."""
    if layout == "column-major":
        return mx.contiguous(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    if layout == "column-major, padded":  # by 8, which leaves columns aligned
        rows = x.shape[-2]
        padded = mx.pad(x.swapaxes(-1, -2), [(0, 0)] * (x.ndim - 1) + [(0, -rows % 8)])
        return padded[..., :rows].swapaxes(-1, -2)
    if layout == "column-major, other batches":
        return mx.contiguous(x.transpose(1, 0, 3, 2)).transpose(1, 0, 3, 2)
    if layout == "all axes reversed":
        return mx.contiguous(x.T).T
    if layout == "strided":
        for axis in range(x.ndim):
            x = mx.repeat(x, 2, axis=axis)
        return x[tuple(slice(None, None, 2) for _ in x.shape)]
    if layout == "strided columns":
        return mx.repeat(x, 2, axis=-1)[..., ::2]
    if layout == "reversed":
        back = tuple(slice(None, None, -1) for _ in x.shape)
        return mx.contiguous(x[back])[back]
    if layout == "broadcast":
        return mx.broadcast_to(x[:1], x.shape)
    if layout == "broadcast columns":
        return mx.broadcast_to(x[..., :1], x.shape)
    if layout == "between vectors":
        return mx.concatenate([mx.zeros(1, x.dtype), x.reshape(-1)])[1:].reshape(x.shape)
    assert layout == "linear"
    return x


# ---- Bits ----


def bits(x: mx.array) -> np.ndarray:
    """The bit patterns of the elements, as unsigned integers; a copy."""
    kind = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32, 8: mx.uint64}[x.dtype.size]
    return np.array(mx.contiguous(x).view(kind) if x.size else x.astype(kind))


def all_bits(tree: Any, without: tuple[str, ...] = ()) -> dict[tuple[str, mx.Dtype], np.ndarray]:
    """A copy of the bits of a tree's leaves, but for the leaves of these names."""
    leaves = tree_flatten(tree)
    return {(path, x.dtype): bits(x) for path, x in leaves if path.split(".")[-1] not in without}


def assert_same_bits(actual: Any, expected: Any, what: str = "") -> None:
    """Compares two trees, each an array, a tree of arrays or what all_bits() made of one: paths, dtypes, shapes,
    bits.
    """
    found, wanted = (
        x if isinstance(x, dict) and x and isinstance(next(iter(x)), tuple) else all_bits(x) for x in (actual, expected)
    )
    assert found.keys() == wanted.keys(), what
    for (path, _), x in wanted.items():
        np.testing.assert_array_equal(found[path, _], x, f"{what}{path}", strict=True)
