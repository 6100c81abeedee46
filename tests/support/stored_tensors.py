"""Tensors in every storage format, and their update by a given extension: the one place that calls its adam_update."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from support.arrays import lay_out

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}

# Formats of parameter, gradient, m and v; "master" is bfloat16 with a correction, "master24" with one of 8 bits.
FORMATS = [
    (parameter, "bfloat16" if parameter.startswith("master") else parameter, state)
    for parameter in ("float32", "bfloat16", "float16", "master", "master24")
    for state in ("bfloat16", "float32", "int8", "int4")
]
BITS = {"int8": 8, "int4": 4}

Tensor = dict[str, mx.array]
PARTS = ("parameter", "gradient", "m", "v", "remainder", "m_scale", "v_scale")


def named(formats: tuple[str, str, str]) -> str:
    """The id of a test with these formats."""
    return "-".join(formats)


def make(extension: ModuleType, shape: tuple[int, ...], formats: tuple[str, str, str], seed: int = 4) -> Tensor:
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
    if parameter.startswith("master"):
        kind = mx.int8 if parameter == "master24" else mx.int16
        largest = 2 ** (8 * kind.size - 1)
        remainder = mx.array(rng.integers(-largest, largest, size=shape))
        # Beside 0 it would be a subnormal float32.
        tensor["remainder"] = mx.where(tensor["parameter"] == 0, 0, remainder).astype(kind)
    for name, x in (("m", values(1.5, 0.1)), ("v", mx.square(values(1.5, 0.1)))):
        if bits := BITS.get(state):
            tensor[name], tensor[f"{name}_scale"] = extension.quantize_moment(x, name == "v", bits)
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
    **settings: Any,
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


def sum_of_squares(extension: ModuleType, gradients: list[mx.array]) -> mx.array:
    return extension.sum_of_squares(gradients, uses_kernel=lambda dtype: True)


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
