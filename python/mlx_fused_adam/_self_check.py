"""Compares small updates with mlx.optimizers, for one combination of dtypes and rounding on one device, before a user's
tensors are trusted to the kernels.

Every kernel that the combination can meet takes part, and no other, since a GPU compiles each: row-major tensors alone
and in groups, aligned and not, column-major and strided gradients, indices of 32 and 64 bits, more work than one
threadgroup or thread, a second step that finds its buffers free to be reused, clipped gradients, and a step that is not
applied. Which of them a step needs is known only once MLX has made its gradients. The kernel that sums the gradients'
squares is checked by itself, for each dtype of gradients. Used by _backends.py and the report.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import mlx.core as mx

from ._options import QUANTIZED_BITS
from ._reference import AdamW

# The dtypes of a parameter, its gradient, its m (with int8, v is uint8; uint8 is of 4 bits), and its remainder if there
# is one (int16, or int8 for 24 bits); or of the gradient alone, for the sum of its squares.
Dtypes = tuple[mx.Dtype, ...]

# Allowed error, relative to each element: a few roundings in float32, one in the 16-bit dtypes; of m and v in quantized
# state, by the dtype of m, half the distance of two levels.
TOLERANCE = {
    mx.float32: 1e-5,
    mx.bfloat16: 2**-8,
    mx.float16: 2**-10,
}
_QUANTIZED_TOLERANCE = {mx.int8: (0.1, 0.04), mx.uint8: (0.6, 0.25)}

# A master weight's: as float32, or one rounding to 24 bits.
_MASTER_TOLERANCE = {mx.int16: TOLERANCE[mx.float32], mx.int8: 2**-16 + TOLERANCE[mx.float32]}

# The same for a sum of squares, all of one sign.
_NORM_TOLERANCE = 1e-5

_BETAS = (0.9, 0.99)
_SETTINGS: dict[str, Any] = {"eps": 1e-6, "weight_decay": 0.1, "bias_correction": True}
_LEARNING_RATE = 0.01
_FIRST_STEP = 3

# Behind a kernel's name, by the request of rounding.
_SUFFIX = {"nearest": "", "parameter_and_v": ", stochastic", "all": ", stochastic m"}

_streams: dict[mx.DeviceType, mx.Stream] = {}


class Tensor(NamedTuple):
    """One parameter with its gradient and its state, before or after an update."""

    parameter: mx.array
    gradient: mx.array
    state: dict[str, mx.array]

    def values(self, extension: ModuleType) -> list[mx.array]:
        """Parameter, m and v in float32."""
        parameter = self.parameter.astype(mx.float32)
        if (remainder := self.state.get("remainder")) is not None:
            unit = 256 if remainder.dtype == mx.int8 else 1
            parameter = (parameter.view(mx.int32) + remainder.astype(mx.int32) * unit).view(mx.float32)
        moments = []
        columns = parameter.shape[-1] if self.state["m"].dtype == mx.uint8 else None
        for name in ("m", "v"):
            moment = self.state[name]
            if (scale := self.state.get(f"{name}_scale")) is not None:
                moment = extension.dequantize_moment(moment, scale, name == "v", columns)
            moments.append(moment.astype(mx.float32))
        return [parameter, *moments]

    def stored(self) -> list[mx.array]:
        """The arrays that an update writes."""
        return [self.parameter, *(x for _, x in sorted(self.state.items()))]

    def tolerances(self, rounding: str) -> list[float]:
        """The allowed errors of those values. Rounded stochastically, either neighbour will do: twice as much."""
        remainder = self.state.get("remainder")
        parameter = TOLERANCE[self.parameter.dtype] if remainder is None else _MASTER_TOLERANCE[remainder.dtype]
        state = self.state["m"].dtype
        tolerances = [parameter, *(_QUANTIZED_TOLERANCE.get(state) or (TOLERANCE[state],) * 2)]
        is_any = rounding != "nearest"
        rounded = [is_any, rounding == "all" or (is_any and state in QUANTIZED_BITS), is_any]
        return [
            tolerance * 2 if is_rounded and tolerance > TOLERANCE[mx.float32] else tolerance
            for tolerance, is_rounded in zip(tolerances, rounded, strict=True)
        ]


class Case(NamedTuple):
    """Tensors that are updated together, and the kernel that they are for."""

    kernel: str
    tensors: list[Tensor]
    wide_indices: bool = False
    gradient_scale: float | None = None
    is_skipped: bool = False
    rounding: str = "nearest"


def is_update(dtypes: Dtypes) -> bool:
    """Whether the dtypes are those of an update, not of a sum of squares."""
    return len(dtypes) > 1


def names(dtypes: Dtypes) -> str:
    """As in ``float32``, ``float32 with bfloat16 gradients and float32 moments``, or ``norms of float32 gradients``."""
    if not is_update(dtypes):
        return f"norms of {str(dtypes[0]).rpartition('.')[2]} gradients"
    parameter, gradient, state, *rest = (str(dtype).rpartition(".")[2] for dtype in dtypes)
    state = "int4" if state == "uint8" else state
    if parameter == gradient == state and not rest:
        return parameter
    with_remainder = " and remainder" if rest == ["int16"] else " and 8-bit remainder" if rest else ""
    return f"{parameter}{with_remainder} with {gradient} gradients and {state} moments"


def run(extension: ModuleType, kind: mx.DeviceType, dtypes: Dtypes, rounding: str = "nearest") -> str | None:
    """Return None if every kernel is right, else what is wrong."""
    try:
        for kernel, error in errors(extension, kind, dtypes, rounding):
            if not error <= 1:  # so that NaN fails too
                return f"self-check of the {kernel} kernel is off by {error:.1e} times what rounding explains"
    except Exception as error:  # a kernel that fails must fall back, not stop the user
        _streams.pop(kind, None)  # it may hold an error that is yet to be raised
        return f"self-check failed: {error}"
    return None


def errors(
    extension: ModuleType, kind: mx.DeviceType, dtypes: Dtypes, rounding: str = "nearest"
) -> Iterator[tuple[str, float]]:
    """Yield each kernel's name and its largest error as a multiple of the allowed one."""
    # On the user's stream, an error of earlier work would be raised here, mistaken for the check's, and lost.
    if kind not in _streams:
        _streams[kind] = mx.new_thread_unsafe_stream(kind)
        extension.note_idle_stream(_streams[kind])
    if not is_update(dtypes):
        with mx.stream(_streams[kind]):
            yield "norm", _error_of_norm(extension, dtypes[0])
        return
    for make in (_alone, _group, _column_major, _strided, _strided_wide):
        with mx.stream(_streams[kind]):
            case = make(extension, dtypes)._replace(rounding=rounding)
            kernel = case.kernel + _SUFFIX[rounding]
            error = _error_of(extension, case)
            skipped = make(extension, dtypes)._replace(rounding=rounding, is_skipped=True)
        yield kernel, error
        with mx.stream(_streams[kind]):
            error = _change_of(extension, skipped)
        yield f"{kernel}, skipped", error


def _error_of(extension: ModuleType, case: Case) -> float:
    worst = 0.0
    for step in (_FIRST_STEP, _FIRST_STEP + 1):
        scale = 1.0 if case.gradient_scale is None else case.gradient_scale
        expected = [_reference_update(extension, tensor, step, scale) for tensor in case.tensors]
        case = case._replace(tensors=_update(extension, case, step))
        mx.eval(case.tensors)
        for tensor, values in zip(case.tensors, expected, strict=True):
            worst = max(worst, _error(extension, tensor, values, case.rounding))
    return worst


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
        return _number(extension.sum_of_squares(gradients, uses_kernel=lambda dtype: True))

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
    """Update lazily; nothing here holds the old tensors once their update is queued."""
    parameters, gradients, states = map(list, zip(*case.tensors, strict=True))
    one_step = extension.AdamStep(
        mx.array(_LEARNING_RATE),
        mx.array(step, mx.uint64),
        betas=_BETAS,
        **_SETTINGS,
        rounding=case.rounding,
        gradient_scale=None if case.gradient_scale is None else mx.array(case.gradient_scale),
        is_applied=mx.array(False) if case.is_skipped else None,
        wide_indices=case.wide_indices,
    )
    updated = extension.adam_update(parameters, gradients, states, one_step, uses_kernel=lambda *dtypes: True, name=str)
    return [Tensor(parameter, gradient, state) for gradient, parameter, state in zip(gradients, *updated, strict=True)]


def _reference_update(extension: ModuleType, tensor: Tensor, step: int, gradient_scale: float) -> list[mx.array]:
    """Parameter, m and v in float32, evaluated, and sharing no buffer with what they come from."""
    reference = AdamW(_LEARNING_RATE, betas=list(_BETAS), **_SETTINGS)
    reference.state["step"] = mx.array(step, mx.uint64)
    parameter, m, v = tensor.values(extension)
    state = {"m": m, "v": v}
    gradient = tensor.gradient.astype(mx.float32) * gradient_scale
    new = reference.apply_single(gradient, parameter, state)
    expected = [new, state["m"], state["v"]]
    mx.eval(expected)
    return expected


def _error(extension: ModuleType, actual: Tensor, expected: list[mx.array], rounding: str) -> float:
    triples = zip(actual.values(extension), expected, actual.tolerances(rounding), strict=True)
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
    return (size if positive else mx.where(mx.sin(x * 0.3) < 0, -size, size)).reshape(shape).astype(dtype)


def _tensor(extension: ModuleType, dtypes: Dtypes, gradient: mx.array) -> Tensor:
    """With a parameter of the gradient's shape; m has the gradient's sign, lest their sum be near 0."""
    parameter = _sample(dtypes[0], *gradient.shape)
    v = _sample(mx.float32, *gradient.shape, positive=True)
    moments = {"m": gradient * v, "v": v}
    state: dict[str, mx.array] = {}
    for name, moment in moments.items():
        if bits := QUANTIZED_BITS.get(dtypes[2]):
            quantized = extension.quantize_moment(moment, name == "v", bits)
            state[name], state[f"{name}_scale"] = quantized
        else:
            state[name] = moment.astype(dtypes[2])
    if len(dtypes) > 3:
        largest = 30000 if dtypes[3] == mx.int16 else 120
        state["remainder"] = (_sample(mx.float32, *gradient.shape) * largest).astype(dtypes[3])
    tensor = Tensor(parameter, gradient, state)
    mx.eval(tensor)
    return tensor


def _alone(extension: ModuleType, dtypes: Dtypes) -> Case:
    """More than one thread's share on a CPU, and more than tensors that share a node have."""
    return Case("linear", [_tensor(extension, dtypes, _sample(dtypes[1], 70001))])


def _group(extension: ModuleType, dtypes: Dtypes) -> Case:
    """Small tensors in one node, one of which begins between two vectors."""
    tensors = [_tensor(extension, dtypes, _sample(dtypes[1], size)) for size in (37, 301, 1025)]
    tensors.insert(1, _from_second_block(_tensor(extension, dtypes, _sample(dtypes[1], 600))))
    return Case("group", tensors, gradient_scale=0.75)


def _from_second_block(tensor: Tensor) -> Tensor:
    """Drop the first element, or with quantized state the elements that share a scale with it."""
    first = 32 if "m_scale" in tensor.state else 1
    starts = dict.fromkeys(("m_scale", "v_scale"), 1)
    if tensor.state["m"].dtype == mx.uint8:
        starts |= dict.fromkeys(("m", "v"), first // 2)
    state = {name: x[starts.get(name, first) :] for name, x in tensor.state.items()}
    tensor = Tensor(tensor.parameter[first:], tensor.gradient[first:], state)
    mx.eval(tensor)
    return tensor


def _column_major(extension: ModuleType, dtypes: Dtypes) -> Case:
    tensor = _tensor(extension, dtypes, _sample(dtypes[1], 150, 170).T)
    return Case("column-major", [tensor], gradient_scale=0.75)


def _strided(extension: ModuleType, dtypes: Dtypes) -> Case:
    return Case("strided", [_tensor(extension, dtypes, _sample(dtypes[1], 130, 2 * 70)[:, ::2])])


def _strided_wide(extension: ModuleType, dtypes: Dtypes) -> Case:
    return _strided(extension, dtypes)._replace(kernel="strided, 64-bit", wide_indices=True)
