"""Tensors in every storage format, laid out anyhow, and their update by one extension or the other, bit for bit."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_fused_adam import _ext

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


def extension_of_the_cpu(emulated: ModuleType) -> ModuleType:
    """The extension whose kernels are the CPU's: for DEVICE=emulated the installed one, beside the package's."""
    if _ext is not emulated:
        return _ext
    files = importlib.metadata.files("mlx-fused-adam") or []
    installed = next(f for f in files if f.match("mlx_fused_adam/_ext*.so")).locate()
    spec = importlib.util.spec_from_file_location("mlx_fused_adam_installed._ext", installed)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lay_out(x: mx.array, layout: str) -> mx.array:
    """The same values, lying otherwise in memory."""
    if layout == "column-major":
        return mx.contiguous(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    if layout == "column-major, padded":  # by 8, which leaves columns aligned
        rows = x.shape[-2]
        padded = mx.pad(x.swapaxes(-1, -2), [(0, 0)] * (x.ndim - 1) + [(0, -rows % 8)])
        return padded[..., :rows].swapaxes(-1, -2)
    if layout == "column-major, other batches":
        return mx.contiguous(x.transpose(1, 0, 3, 2)).transpose(1, 0, 3, 2)
    if layout == "strided":
        for axis in range(x.ndim):
            x = mx.repeat(x, 2, axis=axis)
        return x[tuple(slice(None, None, 2) for _ in x.shape)]
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


Tensor = dict[str, mx.array]
PARTS = ("parameter", "gradient", "m", "v", "remainder", "m_scale", "v_scale")


def make(
    extension: ModuleType, shape: tuple[int, ...], formats: tuple[str, str, str], seed: int = 4
) -> Tensor:
    """Values of many sizes within a block, among them 0."""
    rng = np.random.default_rng(seed)

    def values(spread: float, scale: float) -> mx.array:
        x = rng.normal(size=shape) * np.exp(rng.normal(size=shape) * spread) * scale
        x.reshape(-1)[:: rng.integers(5, 9)] = 0
        return mx.array(x.astype(np.float32))

    parameter, gradient, state = formats
    tensor = {
        "parameter": values(0, 1).astype(DTYPES.get(parameter, mx.bfloat16)),
        "gradient": values(1.5, 0.1).astype(DTYPES[gradient]),
    }
    if parameter == "master":
        remainder = mx.array(rng.integers(-(2**15), 2**15, size=shape, dtype=np.int16))
        # Beside 0 it would be a subnormal float32.
        tensor["remainder"] = mx.where(tensor["parameter"] == 0, 0, remainder).astype(mx.int16)
    for name, x in (("m", values(1.5, 0.1)), ("v", mx.square(values(1.5, 0.1)))):
        if state == "int8":
            tensor[name], tensor[f"{name}_scale"] = extension.quantize_moment(x, name == "v")
        else:
            tensor[name] = x.astype(DTYPES[state])
    mx.eval(tensor)
    return tensor


def update(
    extension: ModuleType,
    tensors: list[Tensor],
    *,
    rounding: str = "all",
    step: int = 5,
    **settings,
) -> list[Tensor]:
    """The tensors after a step, lazily."""
    settings = {"betas": (0.9, 0.99), "weight_decay": 0.1, "seed": 2**40 + 5, **settings}
    parameters, states = extension.adam_update(
        [t["parameter"] for t in tensors],
        [t["gradient"] for t in tensors],
        tensors,
        extension.AdamStep(mx.array(0.01), mx.array(step), rounding=rounding, **settings),
        numbers=[3 + 5 * i for i in range(len(tensors))],
        uses_kernel=lambda *dtypes: True,
        name=str,
    )
    return [
        tensor | {"parameter": parameter} | state
        for tensor, parameter, state in zip(tensors, parameters, states, strict=True)
    ]


def update_lists(
    extension: ModuleType, lists: Sequence[list[mx.array]], step: Any, numbers: Sequence[int] = ()
) -> list[list[mx.array]]:
    """Lists of new parameters, m and v from lists of parameters, gradients, m and v."""
    parameters, gradients, m, v = lists
    states = [{"m": a, "v": b} for a, b in zip(m, v, strict=True)]
    parameters, states = extension.adam_update(
        parameters, gradients, states, step, numbers=numbers, uses_kernel=lambda *_: True, name=str
    )
    return [parameters, *([state[name] for state in states] for name in ("m", "v"))]


def bits(x: mx.array) -> np.ndarray:
    kinds = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
    return np.array(mx.contiguous(x).view(kinds[x.dtype.size]))


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert set(actual) == set(expected)
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype and actual[name].shape == x.shape, name
        np.testing.assert_array_equal(bits(actual[name]), bits(x), f"{what}{name}")


def steps(
    extension: ModuleType,
    tensors: list[Tensor],
    layout: str,
    count: int = 2,
    of: str = "gradient",
    **settings,
) -> list[Tensor]:
    """Each step on the results of the one before, in place where that may be."""
    tensors = [dict(t) for t in tensors]
    for t in tensors:
        t[of] = lay_out(t[of], layout)
    for step in range(1, count + 1):
        tensors = update(extension, tensors, step=step, **settings)
        mx.eval(tensors)
    return tensors
