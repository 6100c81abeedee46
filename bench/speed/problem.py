"""The tensors of one benchmark case, and the check of an Adam step on them.

`check_step` lets an implementation take one step and compares samples of every tensor with the update in float64
(reference.py), so no wrong step is timed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import mlx.core as mx
import numpy as np

from .reference import Settings, adam
from .shapes import ParameterShape

SETTINGS = Settings()
BETAS = [SETTINGS.beta1, SETTINGS.beta2]
START = 1000  # a problem's steps so far: at the first, 1 - beta2**step is rough in float32

SAMPLES = 1 << 21  # elements compared per case, shared among its tensors
FEWEST_SAMPLES = 4096  # per tensor; smaller tensors are compared whole

# The error allowed: a few roundings of a stored value, and a relative part of each computed quantity.
# mlx.optimizers computes in the storage dtype, with about eight roundings on the way and beta2 = 0.999 itself
# rounded to 1 in bfloat16; the 16-bit numbers allow for that. int8 is quantized state, whose neighbouring
# values are at most a part of 4 / 64 apart, for such m and v as Problem.random makes; uint8 is that of 4 bits.
RELATIVE_ERROR = {mx.float32: 1e-5, mx.bfloat16: 4e-2, mx.float16: 5e-3, mx.int8: 8e-2, mx.uint8: 1.0}
STORED_ERROR = {mx.float32: 2.0**-22, mx.bfloat16: 2.0**-7, mx.float16: 2.0**-10, mx.int8: 0.0, mx.uint8: 0.0}

Values = dict[str, np.ndarray]  # "parameter", "gradient", "m", "v", each a float64 vector


class Incorrect(Exception):
    """The result is not an Adam step; the message names tensor, quantity and error."""


class Checked(Protocol):
    """The part of an implementation that `check_step` needs."""

    tensors: list[ParameterShape]
    dtype: mx.Dtype
    state_dtype: mx.Dtype  # of m and v
    stored_bytes: int  # parameters and their state

    def step(self) -> object: ...
    def sample(self, path: str, indices: np.ndarray) -> Values: ...
    def expect(self, before: Values) -> Values: ...


@dataclass
class Problem:
    """Parameters, gradients, m and v, keyed by path, in one dtype; m and v also in others, on demand."""

    tensors: list[ParameterShape]
    dtype: mx.Dtype
    parameters: dict[str, mx.array]
    gradients: dict[str, mx.array]
    state: dict[str, Any]  # as mlx.optimizers keeps it
    _other_states: dict[mx.Dtype, dict[str, Any]] = field(default_factory=dict, repr=False)

    @classmethod
    def random(cls, tensors: list[ParameterShape], dtype: mx.Dtype, seed: int = 0) -> "Problem":
        """Values at which a wrong result shows even in bfloat16, and no subnormal number arises.

        With |gradient| in [0.3, 1] and v near 0.001 one step moves v by a third or more and
        parameters by several of bfloat16's spacings, while beta2's share of gradient**2 stays above
        float16's smallest normal number.
        """
        keys = iter(mx.random.split(mx.random.key(seed), 4 * len(tensors)))

        def uniform(shape: tuple[int, ...], low: float, high: float) -> mx.array:
            x = mx.random.uniform(low, high, shape, dtype, key=next(keys))
            mx.eval(x)
            return x

        def gradient(tensor: ParameterShape) -> mx.array:
            order = tensor.memory_order
            *outer, inner = (tensor.shape[axis] for axis in order)
            x = uniform((*outer, inner * tensor.spread), -0.7, 0.7)
            x = x + mx.where(x < 0, mx.array(-0.3, dtype), mx.array(0.3, dtype))
            if tensor.spread > 1:
                x = x[..., :: tensor.spread]
            x = x.transpose([order.index(axis) for axis in range(len(order))])
            for axis in tensor.flipped:
                x = x[(*[slice(None)] * axis, slice(None, None, -1))]
            mx.eval(x)
            return x

        state: dict[str, Any] = {
            t.path: {"m": uniform(t.shape, -0.1, 0.1), "v": uniform(t.shape, 5e-4, 2e-3)} for t in tensors
        }
        state["step"] = mx.array(START, mx.uint64)
        state["learning_rate"] = mx.array(SETTINGS.learning_rate)
        parameters = {t.path: uniform(t.shape, -0.05, 0.05) for t in tensors}
        return cls(tensors, dtype, parameters, {t.path: gradient(t) for t in tensors}, state)

    def state_in(self, dtype: mx.Dtype) -> dict[str, Any]:
        """The state with m and v in this dtype: one tree for each dtype."""
        if dtype == self.dtype:
            return self.state
        if dtype not in self._other_states:
            state = {path: {k: self.state[path][k].astype(dtype) for k in "mv"} for path in self.parameters}
            state |= {name: self.state[name] + 0 for name in ("step", "learning_rate")}
            mx.eval(state)
            self._other_states[dtype] = state
        return self._other_states[dtype]

    def restore(self) -> None:
        """Undo what a wrong step did to the shared arrays."""
        fresh = Problem.random(self.tensors, self.dtype)
        self.parameters.update(fresh.parameters)
        for dtype in (self.dtype, *self._other_states):
            self.state_in(dtype).update(fresh.state_in(dtype))

    @property
    def size(self) -> int:
        return sum(tensor.size for tensor in self.tensors)

    @property
    def gradient_bytes(self) -> int:
        return self.size * self.dtype.size


def adam_step(before: Values, step: int | None) -> Values:
    """One update in float64; `step` counts from 1 and asks for bias correction."""
    settings = replace(SETTINGS, bias_correction=step is not None)
    arrays = (before[name] for name in ("parameter", "gradient", "m", "v"))
    return dict(zip(("parameter", "m", "v"), adam(*arrays, step or 1, settings), strict=True))


def sampled_indices(tensor: ParameterShape, most: int, seed: int = 0) -> np.ndarray:
    """All of a small tensor; both ends of a large one, where tails go wrong, and random places."""
    if tensor.size <= most:
        return np.arange(tensor.size)
    end = most // 8
    inner = np.random.default_rng(seed).integers(end, tensor.size - end, most - 2 * end)
    return np.concatenate([np.arange(end), np.sort(inner), np.arange(tensor.size - end, tensor.size)])


def check_step(implementation: Checked, around_step: Callable[[Callable], object]) -> float:
    """Take one step through `around_step`; return the worst error over its tolerance.

    Raises Incorrect where that is above 1.
    """
    tensors = implementation.tensors
    most = max(FEWEST_SAMPLES, SAMPLES // max(1, len(tensors)))
    indices = {tensor.path: sampled_indices(tensor, most) for tensor in tensors}
    before = {path: implementation.sample(path, where) for path, where in indices.items()}
    expected = {path: implementation.expect(values) for path, values in before.items()}
    around_step(implementation.step)
    worst = 0.0
    for path, where in indices.items():
        after = implementation.sample(path, where)
        scale = implementation.expect(_magnitudes(before[path]))
        for quantity, right in expected[path].items():
            dtype = implementation.dtype if quantity == "parameter" else implementation.state_dtype
            error = _error(before[path][quantity], right, after[quantity], scale[quantity], dtype)
            if not error <= 1:  # so that NaN fails too
                raise Incorrect(f"{quantity} of {path} is off by {error:.3g} times the tolerance")
            worst = max(worst, error)
    return worst


def _magnitudes(before: Values) -> Values:
    """Values whose step measures the terms of the real one before they cancel."""
    absolute = {name: np.abs(x) for name, x in before.items()}
    return absolute | {"parameter": np.zeros_like(absolute["parameter"])}


def _error(old: np.ndarray, right: np.ndarray, got: np.ndarray, scale: np.ndarray, dtype: mx.Dtype) -> float:
    """The largest error as a multiple of what rounding explains."""
    stored = STORED_ERROR[dtype] * np.maximum(np.abs(old), np.abs(right))
    allowed = RELATIVE_ERROR[dtype] * np.abs(scale) + stored
    return float(np.max(np.abs(got - right) / allowed, initial=0.0))
