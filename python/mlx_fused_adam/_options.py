"""The options that go beyond mlx.optimizers: checked once, at construction; in words that a YAML file can say."""

from __future__ import annotations

from typing import Any, NamedTuple

import mlx.core as mx

# What the kernels store; parameters of another dtype (float64, say) are left to mlx.optimizers.
FUSED_DTYPES = frozenset({mx.float32, mx.bfloat16, mx.float16})

_STATE_DTYPES = ("float32", "bfloat16", "int8")
_LARGEST_SEED = 2**64 - 1
# In the order in which check_options takes them.
DESCRIBED = ("state_dtype", "stochastic_rounding", "seed", "master_weights")

# Smaller parameters keep bfloat16 moments where int8 is asked for: they save next to nothing, and short rows little more.
_SMALLEST_CODED = 4096
_SHORTEST_CODED_ROW = 32


class Options(NamedTuple):
    """How state is stored and rounded."""

    op: str  # the optimizer, for errors
    state_dtype: str | None  # a name, since MLX's dtypes cannot be pickled
    stochastic_rounding: bool | None
    seed: int
    master_weights: bool

    def described(self) -> dict[str, Any]:
        """The options in what JSON can say, as ``check_options`` takes them."""
        return {name: getattr(self, name) for name in DESCRIBED}

    @property
    def has_codes(self) -> bool:
        """Whether ``m`` and ``v`` of large parameters are codes of 8 bits."""
        return self.state_dtype == "int8"

    def dtype_of_moments(self, parameter: mx.array) -> mx.Dtype:
        """In which ``m`` and ``v`` of this parameter are stored; int8 stands for codes, of which those of ``v`` are uint8."""
        if self.has_codes:
            is_large = parameter.size >= _SMALLEST_CODED
            return (
                mx.int8 if is_large and parameter.shape[-1] >= _SHORTEST_CODED_ROW else mx.bfloat16
            )
        if self.state_dtype is not None:
            return getattr(mx, self.state_dtype)
        return mx.float32 if parameter.dtype == mx.float32 else mx.bfloat16

    def has_remainder(self, parameter: mx.array) -> bool:
        """Whether the state holds what rounding took away from this parameter."""
        return self.master_weights and parameter.dtype == mx.bfloat16

    @property
    def has_extras(self) -> bool:
        """Whether a state may hold more than ``m`` and ``v``."""
        return self.master_weights or self.has_codes

    def why_not(self, parameter: mx.array) -> str | None:
        """What keeps the options from serving this parameter, if anything."""
        if self.master_weights and parameter.dtype == mx.float16:
            return (
                "must be bfloat16 or float32 for master_weights but got float16, whose range is too small "
                "to be the upper half of a float32"
            )
        return None

    @property
    def rounding(self) -> tuple[bool, bool, bool]:
        """Whether 16-bit parameters, ``m`` and ``v`` are rounded stochastically; codes of ``m`` go with ``v``."""
        of_all = self.stochastic_rounding is True
        return of_all, of_all, self.stochastic_rounding is not False


def check_options(
    op: str, state_dtype: Any, stochastic_rounding: Any, seed: Any, master_weights: Any
) -> Options:
    """The options, checked.

    Raises:
        ValueError: For a value that is none of those to choose from, or goes ill with another.
        TypeError: For one of another type.
    """
    if not (stochastic_rounding is None or isinstance(stochastic_rounding, bool)):
        raise TypeError(
            f"[{op}] stochastic_rounding must be None, True or False but got {stochastic_rounding!r}"
        )
    if not isinstance(master_weights, bool):
        raise TypeError(f"[{op}] master_weights must be True or False but got {master_weights!r}")
    dtype = _as_state_dtype(op, state_dtype)
    options = Options(op, dtype, stochastic_rounding, as_seed(op, seed), master_weights)
    if options.has_codes and stochastic_rounding is False:
        raise ValueError(
            f"[{op}] stochastic_rounding must be None or True with state_dtype='int8' but got False: "
            "rounded to nearest, v would lose its small steps, and m would never fall to 0"
        )
    return options


def as_seed(op: str, seed: Any) -> int:
    """A seed of stochastic rounding."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"[{op}] seed must be an integer but got {seed!r}")
    if not 0 <= seed <= _LARGEST_SEED:
        raise ValueError(f"[{op}] seed must be from 0 to 2**64 - 1 but got {seed}")
    return seed


def _as_state_dtype(op: str, x: Any) -> str | None:
    if x is None:
        return None
    if not isinstance(x, (str, mx.Dtype)):
        raise TypeError(f"[{op}] state_dtype must be a string or a dtype but got {x!r}")
    name = str(x).removeprefix("mlx.core.")
    if name in _STATE_DTYPES:
        return name
    reason = ", since float16 cannot hold v: below 6e-8 it is 0" if name == "float16" else ""
    raise ValueError(
        f"[{op}] state_dtype must be None, 'float32', 'bfloat16' or 'int8' but got {name!r}{reason}"
    )
