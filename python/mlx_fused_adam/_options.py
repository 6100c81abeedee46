"""The options that go beyond mlx.optimizers: checked once, at construction; in words that a YAML file can say."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx

_STATE_DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16}
_LARGEST_SEED = 2**64 - 1


class Options(NamedTuple):
    """How state is stored and rounded."""

    state_dtype: mx.Dtype | None
    stochastic_rounding: bool | None
    seed: int

    def dtype_of_moments(self, parameter: mx.Dtype) -> mx.Dtype:
        """In which ``m`` and ``v`` of a parameter of this dtype are stored."""
        if self.state_dtype is not None:
            return self.state_dtype
        return mx.float32 if parameter == mx.float32 else mx.bfloat16

    @property
    def rounding(self) -> tuple[bool, bool, bool]:
        """Whether 16-bit parameters, ``m`` and ``v`` are rounded stochastically."""
        of_all = self.stochastic_rounding is True
        return of_all, of_all, self.stochastic_rounding is not False


def check_options(op: str, state_dtype: Any, stochastic_rounding: Any, seed: Any) -> Options:
    """The options, checked.

    Raises:
        ValueError: For a value that is none of those to choose from.
        TypeError: For one of another type.
    """
    if not (stochastic_rounding is None or isinstance(stochastic_rounding, bool)):
        raise TypeError(
            f"[{op}] stochastic_rounding must be None, True or False but got {stochastic_rounding!r}"
        )
    return Options(_as_state_dtype(op, state_dtype), stochastic_rounding, as_seed(op, seed))


def as_seed(op: str, seed: Any) -> int:
    """A seed of stochastic rounding."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"[{op}] seed must be an integer but got {seed!r}")
    if not 0 <= seed <= _LARGEST_SEED:
        raise ValueError(f"[{op}] seed must be from 0 to 2**64 - 1 but got {seed}")
    return seed


def _as_state_dtype(op: str, x: Any) -> mx.Dtype | None:
    if x is None:
        return None
    if not isinstance(x, (str, mx.Dtype)):
        raise TypeError(f"[{op}] state_dtype must be a string or a dtype but got {x!r}")
    name = str(x).removeprefix("mlx.core.")
    if name in _STATE_DTYPES:
        return _STATE_DTYPES[name]
    reason = ", since float16 cannot hold v: below 6e-8 it is 0" if name == "float16" else ""
    raise ValueError(
        f"[{op}] state_dtype must be None, 'float32' or 'bfloat16' but got {name!r}{reason}"
    )
