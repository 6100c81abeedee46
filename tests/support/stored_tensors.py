"""Tensors in every storage format, and their update by a given extension: the one place that calls its adam_update."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import mlx.core as mx
import numpy as np

from support.arrays import lay_out

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
ROUNDINGS = {"v": (False, False, True), "all": (True, True, True), "none": (False, False, False)}

# Of parameter, gradient, m and v; "master" is bfloat16 with a correction.
FORMATS = [
    (parameter, parameter.replace("master", "bfloat16"), state)
    for parameter in ("float32", "bfloat16", "float16", "master")
    for state in ("bfloat16", "float32", "int8")
]

Tensor = dict[str, mx.array]
PARTS = ("parameter", "gradient", "m", "v", "remainder", "m_scale", "v_scale")
RESULTS = ("parameter", "m", "v")


def named(formats: tuple[str, str, str]) -> str:
    """The id of a test with these formats."""
    return "-".join(formats)


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
    learning_rate: float = 0.01,
    step: int | None = 5,
    betas: tuple[float, float] = (0.9, 0.99),
    eps: float = 1e-8,
    weight_decay: float = 0.1,
    bias_correction: bool = False,
    rounding: str | tuple[bool, bool, bool] = "all",
    seed: int = 2**40 + 5,
    numbers: list[int] | None = None,
    **settings: Any,
) -> list[Tensor]:
    """The tensors after a step, lazily."""
    lists = [[t[part] for t in tensors] for part in PARTS[:4]]
    extras = [tuple(map(t.get, PARTS[4:])) for t in tensors]
    has_extras = any(x is not None for extra in extras for x in extra)
    *new, new_extras = extension.adam_update(
        *lists,
        mx.array(learning_rate),
        None if step is None else mx.array(step),
        beta1=betas[0],
        beta2=betas[1],
        eps=eps,
        weight_decay=weight_decay,
        bias_correction=bias_correction,
        rounding=ROUNDINGS[rounding] if isinstance(rounding, str) else rounding,
        seed=seed,
        numbers=numbers or [3 + 5 * i for i in range(len(tensors))],
        is_fused=lambda *dtypes: True,
        name=str,
        extras=extras if has_extras else [],
        **settings,
    )
    results = []
    for i, tensor in enumerate(tensors):
        values = dict(zip(RESULTS, (x[i] for x in new), strict=True))
        if has_extras:
            values |= zip(PARTS[4:], new_extras[i], strict=True)
        results.append(tensor | {name: x for name, x in values.items() if x is not None})
    return results


def sum_of_squares(extension: ModuleType, gradients: list[mx.array]) -> mx.array:
    return extension.sum_of_squares(gradients, is_fused=lambda dtype: True)


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
