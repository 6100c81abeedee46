"""The options that Adam and AdamW have beyond mlx.optimizers: their defaults, and their check at construction.

Values may be strings and numbers, so that they can come from YAML.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx

from ._arguments import as_number

# Parameters of these dtypes are updated by the kernels; others (float64, say) fall back to mlx.optimizers.
FUSED_DTYPES = frozenset({mx.float32, mx.bfloat16, mx.float16})

_STATE_DTYPES = ("float32", "bfloat16", "int8", "int4")
# The dtype of m in a quantized state tells its bits: MLX has no 4-bit one, and two values share a byte.
QUANTIZED_BITS = {mx.int8: 8, mx.uint8: 4}
_LARGEST_SEED = 2**64 - 1

# Smaller parameters keep bfloat16 moments where quantized ones are asked for: they save next to nothing, and short rows
# little more.
_SMALLEST_QUANTIZED = 4096
_SHORTEST_QUANTIZED_ROW = 32


class ShardGroup:
    """The processes that parameters and gradients are sharded over. MLX's groups can be neither copied nor pickled."""

    def __init__(self, group: mx.distributed.Group) -> None:
        self.group = group

    def __str__(self) -> str:
        return f"rank {self.group.rank()} of {self.group.size()}"

    def __deepcopy__(self, _: Any) -> ShardGroup:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("[shard_group] optimizer cannot be pickled; use save_optimizer")


class Options:
    """How state is stored and rounded, and what happens to gradients that are too large or not finite.

    Raises:
        ValueError: For a value that is not among the choices, or that conflicts with another.
        TypeError: For a value of another type.
    """

    def __init__(
        self,
        op: str,
        state_dtype: str | mx.Dtype | None = None,
        stochastic_rounding: bool | None = None,
        seed: int = 0,
        master_weights: bool = False,
        master_weight_bits: int = 32,
        max_grad_norm: float | None = None,
        skip_nonfinite: bool = False,
        shard_group: mx.distributed.Group | ShardGroup | None = None,
    ) -> None:
        self.op = op  # the optimizer, for errors
        self.state_dtype = _as_state_dtype(op, state_dtype)
        if stochastic_rounding is not None:
            _check_bool(op, "stochastic_rounding", stochastic_rounding, "None, True or False")
        self.stochastic_rounding = stochastic_rounding
        self.seed = as_seed(op, seed)
        self.master_weights = _check_bool(op, "master_weights", master_weights)
        self.master_weight_bits = _as_master_weight_bits(op, master_weight_bits)
        self.max_grad_norm = _as_norm(op, max_grad_norm)
        self.skip_nonfinite = _check_bool(op, "skip_nonfinite", skip_nonfinite)
        self.shard_group = _as_group(op, shard_group)
        if self.is_quantized and stochastic_rounding is False:
            raise ValueError(
                f"[{op}] stochastic_rounding must be None or True with state_dtype={self.state_dtype!r} but got False: "
                "rounded to nearest, v would lose its small steps, and m would never fall to 0"
            )

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Options) and vars(self) == vars(other)

    def described(self) -> dict[str, Any]:
        """The options in JSON's types."""
        described = {name: x for name, x in vars(self).items() if name != "op"}
        if self.shard_group is not None:
            described["shard_group"] = str(self.shard_group)
        return described

    def value_of(self, name: str) -> Any:
        """An option as it was given."""
        value = getattr(self, name)
        return value.group if isinstance(value, ShardGroup) else value

    def replaced(self, given: dict[str, Any]) -> Options:
        """These options with other values, checked; names that are no options are ignored."""
        return Options(**vars(self) | {k: x for k, x in given.items() if k in vars(self) and k != "op"})

    @property
    def needs_norm(self) -> bool:
        """Whether a step needs the gradients' global norm: to clip, or to be skipped."""
        return self.max_grad_norm is not None or self.skip_nonfinite

    @property
    def recorded(self) -> list[str]:
        """The keys that the optimizer's state has beside step and learning rate."""
        names = {"grad_norm": self.max_grad_norm is not None, "skipped": self.skip_nonfinite}
        return [name for name, is_recorded in names.items() if is_recorded]

    @property
    def is_quantized(self) -> bool:
        """Whether ``m`` and ``v`` of large parameters have 8 or 4 bits."""
        return self.state_dtype in ("int8", "int4")

    def dtype_of_moments(self, parameter: mx.array) -> mx.Dtype:
        """The dtype of ``m`` for this parameter, and of ``v`` but for int8, where it is uint8; uint8 means 4 bits."""
        name = self.state_dtype or ("float32" if parameter.dtype == mx.float32 else "bfloat16")
        if self.is_quantized:
            is_large = parameter.size >= _SMALLEST_QUANTIZED
            if not (is_large and parameter.shape[-1] >= _SHORTEST_QUANTIZED_ROW):
                name = "bfloat16"
        name = "uint8" if name == "int4" else name
        dtype: mx.Dtype = getattr(mx, name)
        return dtype

    def has_correction(self, parameter: mx.array) -> bool:
        """Whether the state holds the low bits of this parameter's master weight (``remainder``)."""
        return self.master_weights and parameter.dtype == mx.bfloat16

    @property
    def correction_dtype(self) -> mx.Dtype:
        """The dtype of ``remainder``."""
        return mx.int8 if self.master_weight_bits == 24 else mx.int16

    @property
    def has_auxiliary(self) -> bool:
        """Whether a parameter's state may hold arrays beside ``m`` and ``v``."""
        return self.master_weights or self.is_quantized

    def why_not(self, parameter: mx.array) -> str | None:
        """The reason why the options cannot serve this parameter, or None."""
        if self.master_weights and parameter.dtype == mx.float16:
            return (
                "must be bfloat16 or float32 for master_weights but got float16, whose range is too small "
                "to be the upper half of a float32"
            )
        return None

    @property
    def rounding_request(self) -> str:
        """The results that are rounded stochastically: "nearest" for none, "parameter_and_v" or "all"; quantized
        ``m`` goes with ``v``.
        """
        return {None: "parameter_and_v", True: "all", False: "nearest"}[self.stochastic_rounding]


def as_seed(op: str, seed: Any) -> int:
    """Check a seed of stochastic rounding."""
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise TypeError(f"[{op}] seed must be an integer but got {seed!r}")
    if not 0 <= seed <= _LARGEST_SEED:
        raise ValueError(f"[{op}] seed must be from 0 to 2**64 - 1 but got {seed}")
    return seed


def _check_bool(op: str, name: str, x: Any, choices: str = "True or False") -> bool:
    if not isinstance(x, bool):
        raise TypeError(f"[{op}] {name} must be {choices} but got {x!r}")
    return x


def _as_master_weight_bits(op: str, x: Any) -> int:
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError(f"[{op}] master_weight_bits must be 32 or 24 but got {x!r}")
    if x not in (32, 24):
        raise ValueError(f"[{op}] master_weight_bits must be 32 or 24 but got {x}")
    return x


def _as_norm(op: str, x: Any) -> float | None:
    if x is None:
        return None
    if isinstance(x, bool):
        raise TypeError(f"[{op}] max_grad_norm must be a number but got {x!r}")
    norm = as_number(op, "max_grad_norm", x)
    if not norm > 0:
        raise ValueError(f"[{op}] max_grad_norm must be greater than 0 but got {norm!r}")
    return norm


def _as_group(op: str, x: Any) -> ShardGroup | None:
    if x is None or isinstance(x, ShardGroup):
        return x
    if not isinstance(x, mx.distributed.Group):
        raise TypeError(
            f"[{op}] shard_group must be a group of mx.distributed (mx.distributed.init() gives one) but got {x!r}"
        )
    return ShardGroup(x)


def _as_state_dtype(op: str, x: Any) -> str | None:
    if x is None:
        return None
    if not isinstance(x, (str, mx.Dtype)):
        raise TypeError(f"[{op}] state_dtype must be a string or a dtype but got {x!r}")
    name = str(x).removeprefix("mlx.core.")  # dtypes cannot be pickled
    if name in _STATE_DTYPES:
        return name
    reason = ", since float16 cannot hold v: below 6e-8 it is 0" if name == "float16" else ""
    choices = "None, 'float32', 'bfloat16', 'int8' or 'int4'"
    raise ValueError(f"[{op}] state_dtype must be {choices} but got {name!r}{reason}")
