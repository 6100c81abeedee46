"""Compares small updates with mlx.optimizers, for one combination of dtypes on one device, before a user's tensors are
trusted to the kernels.

Every kernel that the combination can meet takes part: row-major tensors alone and in company, aligned and not,
column-major and strided gradients, indices of 32 and 64 bits, more work than one threadgroup or thread, a second step
that finds its buffers free to be reused, clipped gradients, and a step that is not applied. The kernel that sums the
gradients' squares is checked by itself, for each dtype of gradients.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import mlx.core as mx

from ._reference import AdamW as _StockAdamW

# Of a parameter, its gradient, its m (with int8, v is uint8), and of its remainder if there is one. Of the gradient alone where
# the sum of its squares is meant.
Dtypes = tuple[mx.Dtype, ...]

# Error allowed, relative to each element: a few roundings in float32, one in the 16-bit dtypes, one code in those of 8 bits.
TOLERANCE = {
    mx.float32: 1e-5,
    mx.bfloat16: 2**-8,
    mx.float16: 2**-10,
    mx.int8: 0.1,
    mx.uint8: 0.04,
}

# Of a sum of squares, all of one sign.
_NORM_TOLERANCE = 1e-5

_BETAS = (0.9, 0.99)
_SETTINGS: dict[str, Any] = {"eps": 1e-6, "weight_decay": 0.1, "bias_correction": True}
_LEARNING_RATE = 0.01
_FIRST_STEP = 3

_streams: dict[mx.DeviceType, mx.Stream] = {}


class Tensor(NamedTuple):
    """One parameter of an update, or what has become of it."""

    parameter: mx.array
    gradient: mx.array
    m: mx.array
    v: mx.array
    remainder: mx.array | None = None
    m_scale: mx.array | None = None
    v_scale: mx.array | None = None

    def values(self, extension: ModuleType) -> list[mx.array]:
        """What parameter, m and v stand for, in float32."""
        parameter, m, v = (x.astype(mx.float32) for x in (self.parameter, self.m, self.v))
        if self.remainder is not None:
            parameter = (parameter.view(mx.int32) + self.remainder).view(mx.float32)
        if self.m_scale is not None:
            m = extension.dequantize_moment(self.m, self.m_scale)
            v = extension.dequantize_moment(self.v, self.v_scale)
        return [parameter, m, v]

    def stored(self) -> list[mx.array]:
        """What an update writes."""
        return [x for name, x in self._asdict().items() if x is not None and name != "gradient"]

    def tolerances(self) -> list[float]:
        """What errors of those values are allowed."""
        parameter = self.parameter.dtype if self.remainder is None else mx.float32
        return [TOLERANCE[dtype] for dtype in (parameter, self.m.dtype, self.v.dtype)]


class Case(NamedTuple):
    """Tensors that are updated together, and the kernel that they are for."""

    kernel: str
    tensors: list[Tensor]
    wide_indices: bool = False
    gradient_scale: float | None = None
    is_skipped: bool = False
    is_stochastic: bool = False  # results may then be either neighbour, so twice as far off


def is_update(dtypes: Dtypes) -> bool:
    """Whether the dtypes are those of an update, not of a sum of squares."""
    return len(dtypes) > 1


def names(dtypes: Dtypes) -> str:
    """As in ``float32``, ``float32 with bfloat16 gradients and float32 moments``, or ``norms of float32 gradients``."""
    if not is_update(dtypes):
        return f"norms of {str(dtypes[0]).rpartition('.')[2]} gradients"
    parameter, gradient, state, *rest = (str(dtype).rpartition(".")[2] for dtype in dtypes)
    if parameter == gradient == state and not rest:
        return parameter
    with_remainder = " and remainder" if rest else ""
    return f"{parameter}{with_remainder} with {gradient} gradients and {state} moments"


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
        extension.note_idle_stream(_streams[kind])
    if not is_update(dtypes):
        with mx.stream(_streams[kind]):
            yield "norm", _error_of_norm(extension, dtypes[0])
        return
    cases = [_alone, _group, _column_major, _strided, _strided_wide]
    if dtypes[2] != mx.float32 or (dtypes[0] != mx.float32 and len(dtypes) == 3):
        cases.append(_stochastic)
    for make in cases:
        with mx.stream(_streams[kind]):
            error = _error_of(extension, case := make(extension, dtypes))
            skipped = make(extension, dtypes)._replace(is_skipped=True)
        yield case.kernel, error
        with mx.stream(_streams[kind]):
            error = _change_of(extension, skipped)
        yield f"{case.kernel}, skipped", error


def _error_of(extension: ModuleType, case: Case) -> float:
    worst = 0.0
    for step in (_FIRST_STEP, _FIRST_STEP + 1):
        scale = 1.0 if case.gradient_scale is None else case.gradient_scale
        expected = [_stock_update(extension, tensor, step, scale) for tensor in case.tensors]
        case = case._replace(tensors=_update(extension, case, step))
        mx.eval(case.tensors)
        for tensor, values in zip(case.tensors, expected, strict=True):
            worst = max(worst, _error(extension, tensor, values))
    return worst / 2 if case.is_stochastic else worst


def _change_of(extension: ModuleType, case: Case) -> float:
    """Infinite if an update that is not applied changes anything, else 0."""
    before = [[x + 0 for x in tensor.stored()] for tensor in case.tensors]
    mx.eval(before)
    new = _update(extension, case, _FIRST_STEP)
    del case  # so that it is in place where it may be
    pairs = zip(before, new, strict=True)
    same = [mx.array_equal(a, b) for old, t in pairs for a, b in zip(old, t.stored(), strict=True)]
    return 0.0 if mx.all(mx.stack(same)).item() else math.inf


def _error_of_norm(extension: ModuleType, dtype: mx.Dtype) -> float:
    """More than one threadgroup's or thread's share, small and large, every layout; then what is not finite."""
    x = _sample(dtype, 150, 170)
    gradients = [
        _sample(dtype, 70001), *(_sample(dtype, size) for size in (1, 37, 301, 1025)),
        x, x.T, x[:, ::2], x[1:], x.reshape(15, 10, 170)[:, 3].T, _sample(dtype, 600)[1:],
        mx.broadcast_to(x[0], (20, 170)), mx.zeros((0, 3), dtype), x[::-1, 7:],
    ]  # fmt: skip
    mx.eval(gradients)

    def total(gradients: list[mx.array]) -> float:
        return _number(extension.sum_of_squares(gradients, is_fused=lambda dtype: True))

    # In two stages, since float32 sums of so many terms are not exact enough.
    squares = mx.square(mx.concatenate([g.astype(mx.float32).reshape(-1) for g in gradients]))
    rows = mx.pad(squares, (0, -squares.size % 256)).reshape(-1, 256)
    expected = _number(mx.sum(mx.sum(rows, axis=1)))
    worst = abs(total(gradients) - expected) / expected / _NORM_TOLERANCE
    for bad in (math.nan, math.inf, -math.inf):
        for at in (0, 301, 599):
            spoiled = mx.where(mx.arange(600) == at, mx.array(bad, dtype), _sample(dtype, 600))
            if math.isfinite(total([x, spoiled, x.T])):
                return math.inf
    return worst


def _update(extension: ModuleType, case: Case, step: int) -> list[Tensor]:
    """Lazily; nothing here holds the old tensors once their update is queued."""
    parameters, gradients, m, v, *extras = map(list, zip(*case.tensors, strict=True))
    has_extras = any(x is not None for column in extras for x in column)
    new_parameters, new_m, new_v, new_extras = extension.adam_update(
        parameters, gradients, m, v, mx.array(_LEARNING_RATE), mx.array(step, mx.uint64),
        beta1=_BETAS[0], beta2=_BETAS[1], **_SETTINGS,
        rounding=(case.is_stochastic,) * 3, extras=list(zip(*extras, strict=True)) if has_extras else [],
        is_fused=lambda *dtypes: True, wide_indices=case.wide_indices, name=str,
        gradient_scale=None if case.gradient_scale is None else mx.array(case.gradient_scale),
        is_applied=mx.array(False) if case.is_skipped else None,
    )  # fmt: skip
    new = zip(new_parameters, gradients, new_m, new_v, strict=True)
    if not has_extras:
        return [Tensor(*arrays) for arrays in new]
    return [Tensor(*arrays, *more) for arrays, more in zip(new, new_extras, strict=True)]


def _stock_update(
    extension: ModuleType, tensor: Tensor, step: int, gradient_scale: float
) -> list[mx.array]:
    """Parameter, m and v in float32, evaluated, and sharing no buffer with what they come from."""
    reference = _StockAdamW(_LEARNING_RATE, betas=list(_BETAS), **_SETTINGS)
    reference.state["step"] = mx.array(step, mx.uint64)
    parameter, m, v = tensor.values(extension)
    state = {"m": m, "v": v}
    gradient = tensor.gradient.astype(mx.float32) * gradient_scale
    new = reference.apply_single(gradient, parameter, state)
    expected = [new, state["m"], state["v"]]
    mx.eval(expected)
    return expected


def _error(extension: ModuleType, actual: Tensor, expected: list[mx.array]) -> float:
    triples = zip(actual.values(extension), expected, actual.tolerances(), strict=True)
    quotients = [mx.max(mx.abs(a - e) / mx.abs(e)) / tolerance for a, e, tolerance in triples]
    worst = _number(mx.max(mx.stack(quotients)))
    return worst if not math.isnan(worst) else math.inf


def _number(x: mx.array) -> float:
    """The value of a scalar array that is real."""
    value = x.item()
    assert not isinstance(value, complex)
    return value


def _sample(dtype: mx.Dtype, *shape: int, positive: bool = False) -> mx.array:
    """Values whose size is from 0.25 to 1, so that no sum of an update cancels."""
    x = mx.arange(math.prod(shape)) * 0.7
    size = mx.sin(x) * 0.375 + 0.625
    return (
        (size if positive else mx.where(mx.sin(x * 0.3) < 0, -size, size))
        .reshape(shape)
        .astype(dtype)
    )


def _tensor(extension: ModuleType, dtypes: Dtypes, gradient: mx.array) -> Tensor:
    """With a parameter of the gradient's shape; m has the gradient's sign, lest their sum be near 0."""
    parameter = _sample(dtypes[0], *gradient.shape)
    v = _sample(mx.float32, *gradient.shape, positive=True)
    m = gradient * v
    remainder = m_scale = v_scale = None
    if dtypes[2] == mx.int8:
        m, m_scale = extension.quantize_moment(m, False)
        v, v_scale = extension.quantize_moment(v, True)
    else:
        m, v = m.astype(dtypes[2]), v.astype(dtypes[2])
    if len(dtypes) > 3:
        remainder = (_sample(mx.float32, *gradient.shape) * 30000).astype(dtypes[3])
    tensor = Tensor(parameter, gradient, m, v, remainder, m_scale, v_scale)
    mx.eval(tensor)
    return tensor


def _alone(extension: ModuleType, dtypes: Dtypes) -> Case:
    """More than one thread's share on a CPU, and more than tensors that share a node have."""
    return Case("linear", [_tensor(extension, dtypes, _sample(dtypes[1], 70001))])


def _stochastic(extension: ModuleType, dtypes: Dtypes) -> Case:
    return _alone(extension, dtypes)._replace(kernel="linear, stochastic", is_stochastic=True)


def _group(extension: ModuleType, dtypes: Dtypes) -> Case:
    """Small tensors in one node, one of which begins between two vectors."""
    tensors = [_tensor(extension, dtypes, _sample(dtypes[1], size)) for size in (37, 301, 1025)]
    tensors.insert(1, _from_second_block(_tensor(extension, dtypes, _sample(dtypes[1], 600))))
    return Case("group", tensors, gradient_scale=0.75)


def _from_second_block(tensor: Tensor) -> Tensor:
    """Without its first element, or where there are codes without what shares a scale with it."""
    first = 1 if tensor.m_scale is None else 32
    parts = {
        name: x[1 if name.endswith("_scale") else first :]
        for name, x in tensor._asdict().items()
        if x is not None
    }
    mx.eval(parts)
    return Tensor(**parts)


def _column_major(extension: ModuleType, dtypes: Dtypes) -> Case:
    tensor = _tensor(extension, dtypes, _sample(dtypes[1], 150, 170).T)
    return Case("column-major", [tensor], gradient_scale=0.75)


def _strided(extension: ModuleType, dtypes: Dtypes) -> Case:
    return Case("strided", [_tensor(extension, dtypes, _sample(dtypes[1], 130, 2 * 70)[:, ::2])])


def _strided_wide(extension: ModuleType, dtypes: Dtypes) -> Case:
    return _strided(extension, dtypes)._replace(kernel="strided, 64-bit", wide_indices=True)
