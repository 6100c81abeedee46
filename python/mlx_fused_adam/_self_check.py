"""Compares small updates with mlx.optimizers, for one combination of dtypes on one device, before a user's tensors are
trusted to the kernels.

Every kernel that the combination can meet takes part: row-major tensors alone and in company, aligned and not,
column-major and strided gradients, indices of 32 and 64 bits, more work than one threadgroup or thread, and a second step
that finds its buffers free to be reused.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import mlx.core as mx

# As they are at import: a user may put this package's classes in their place, and the reference must not be ourselves.
from mlx.optimizers import AdamW as _StockAdamW

Dtypes = tuple[mx.Dtype, mx.Dtype, mx.Dtype]  # of a parameter, its gradient, and its m and v

# Error allowed, relative to each element: a few roundings in float32, one in the 16-bit dtypes.
TOLERANCE = {mx.float32: 1e-5, mx.bfloat16: 2**-8, mx.float16: 2**-10}

_BETAS = (0.9, 0.99)
_SETTINGS = {"eps": 1e-6, "weight_decay": 0.1, "bias_correction": True}
_LEARNING_RATE = 0.01
_FIRST_STEP = 3

_streams: dict[mx.DeviceType, mx.Stream] = {}


class Tensor(NamedTuple):
    """One parameter of an update, or what has become of it."""

    parameter: mx.array
    gradient: mx.array
    m: mx.array
    v: mx.array


class Case(NamedTuple):
    """Tensors that are updated together, and the kernel that they are for."""

    kernel: str
    tensors: list[Tensor]
    wide_indices: bool = False
    is_stochastic: bool = False  # results may then be either neighbour, so twice as far off


def names(dtypes: Dtypes) -> str:
    """As in ``float32``, or ``float32 with bfloat16 gradients and float32 moments``."""
    parameter, gradient, state = (str(dtype).rpartition(".")[2] for dtype in dtypes)
    if parameter == gradient == state:
        return parameter
    return f"{parameter} with {gradient} gradients and {state} moments"


def run(extension: ModuleType, kind: mx.DeviceType, dtypes: Dtypes) -> str | None:
    """None if every kernel is right, else what is wrong."""
    try:
        for kernel, error in errors(extension, kind, dtypes):
            if not error <= 1:  # so that NaN fails too
                return f"self-check of the {kernel} kernel is off by {error:.1e} times what rounding explains"
    except Exception as error:  # any failure of a kernel must lead to stock, not to the user
        _streams.pop(kind, None)  # it may hold an error that is yet to be raised
        return f"self-check failed: {error}"
    return None


def errors(
    extension: ModuleType, kind: mx.DeviceType, dtypes: Dtypes
) -> Iterator[tuple[str, float]]:
    """For each kernel in turn, its largest error as a multiple of what is allowed."""
    # On the user's stream, an error of the user's own earlier work would be raised here, taken for ours, and lost.
    if kind not in _streams:
        _streams[kind] = mx.new_thread_unsafe_stream(kind)
        extension.note_idle_stream()
    cases = [_alone, _group, _column_major, _strided, _strided_wide]
    if any(dtype != mx.float32 for dtype in (dtypes[0], dtypes[2])):
        cases.append(_stochastic)
    for make in cases:
        with mx.stream(_streams[kind]):
            error = _error_of(extension, case := make(dtypes))
        yield case.kernel, error


def _error_of(extension: ModuleType, case: Case) -> float:
    worst = 0.0
    for step in (_FIRST_STEP, _FIRST_STEP + 1):
        expected = _stock_update(case.tensors, step)
        case = case._replace(tensors=_update(extension, case, step))
        mx.eval([[t.parameter, t.m, t.v] for t in case.tensors])
        worst = max(worst, *map(_error, case.tensors, expected))
    return worst / 2 if case.is_stochastic else worst


def _update(extension: ModuleType, case: Case, step: int) -> list[Tensor]:
    """Lazily; nothing here holds the old tensors once their update is queued."""
    lists = [list(column) for column in zip(*case.tensors, strict=True)]
    new_parameters, new_m, new_v = extension.adam_update(
        *lists, mx.array(_LEARNING_RATE), mx.array(step, mx.uint64),
        beta1=_BETAS[0], beta2=_BETAS[1], **_SETTINGS,
        rounding=(case.is_stochastic,) * 3,
        is_fused=lambda *dtypes: True, wide_indices=case.wide_indices, name=str,
    )  # fmt: skip
    return list(map(Tensor, new_parameters, lists[1], new_m, new_v))


def _stock_update(tensors: list[Tensor], step: int) -> list[Tensor]:
    """In float32, evaluated, and sharing no buffer with what it starts from."""
    reference = _StockAdamW(_LEARNING_RATE, betas=list(_BETAS), **_SETTINGS)
    reference.state["step"] = mx.array(step, mx.uint64)
    expected = []
    for tensor in tensors:
        p, g, m, v = (x.astype(mx.float32) for x in tensor)
        state = {"m": m, "v": v}
        expected.append(Tensor(reference.apply_single(g, p, state), g, state["m"], state["v"]))
    mx.eval([[t.parameter, t.m, t.v] for t in expected])
    return expected


def _error(actual: Tensor, expected: Tensor) -> float:
    pairs = zip(actual, expected, strict=True)
    quotients = [
        mx.max(mx.abs(a.astype(mx.float32) - e) / mx.abs(e)) / TOLERANCE[a.dtype]
        for a, e in pairs
        if a is not actual.gradient
    ]
    worst = mx.max(mx.stack(quotients)).item()
    return worst if not math.isnan(worst) else math.inf


def _sample(dtype: mx.Dtype, *shape: int, positive: bool = False) -> mx.array:
    """Values whose size is from 0.25 to 1, so that no sum of an update cancels."""
    x = mx.arange(math.prod(shape)) * 0.7
    size = mx.sin(x) * 0.375 + 0.625
    return (
        (size if positive else mx.where(mx.sin(x * 0.3) < 0, -size, size))
        .reshape(shape)
        .astype(dtype)
    )


def _tensor(dtypes: Dtypes, gradient: mx.array) -> Tensor:
    """With a parameter of the gradient's shape; m has the gradient's sign, lest their sum be near 0."""
    parameter = _sample(dtypes[0], *gradient.shape)
    v = _sample(dtypes[2], *gradient.shape, positive=True)
    tensor = Tensor(parameter, gradient, (gradient * v).astype(dtypes[2]), v)
    mx.eval(tensor)
    return tensor


def _alone(dtypes: Dtypes) -> Case:
    """More than one thread's share on a CPU, and more than tensors that share a node have."""
    return Case("linear", [_tensor(dtypes, _sample(dtypes[1], 70001))])


def _stochastic(dtypes: Dtypes) -> Case:
    return _alone(dtypes)._replace(kernel="linear, stochastic", is_stochastic=True)


def _group(dtypes: Dtypes) -> Case:
    """Small tensors in one node, one of which begins between two vectors."""
    tensors = [_tensor(dtypes, _sample(dtypes[1], size)) for size in (37, 301, 1025)]
    tensors.insert(1, Tensor(*(x[1:] for x in _tensor(dtypes, _sample(dtypes[1], 600)))))
    return Case("group", tensors)


def _column_major(dtypes: Dtypes) -> Case:
    return Case("column-major", [_tensor(dtypes, _sample(dtypes[1], 150, 170).T)])


def _strided(dtypes: Dtypes) -> Case:
    return Case("strided", [_tensor(dtypes, _sample(dtypes[1], 130, 2 * 70)[:, ::2])])


def _strided_wide(dtypes: Dtypes) -> Case:
    return _strided(dtypes)._replace(kernel="strided, 64-bit", wide_indices=True)
