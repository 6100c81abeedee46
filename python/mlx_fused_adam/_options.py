"""The options that go beyond mlx.optimizers: checked once, at construction; in words that a YAML file can say."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import mlx.core as mx

from ._arguments import as_number

# What the kernels store; parameters of another dtype (float64, say) are left to mlx.optimizers.
FUSED_DTYPES = frozenset({mx.float32, mx.bfloat16, mx.float16})

_STATE_DTYPES = ("float32", "bfloat16", "int8")
_LARGEST_SEED = 2**64 - 1

# Smaller parameters keep bfloat16 moments where int8 is asked for: they save next to nothing, and short rows little more.
_SMALLEST_CODED = 4096
_SHORTEST_CODED_ROW = 32


class ShardGroup:
    """The processes that parameters and gradients are sharded over. MLX's groups can be neither copied nor pickled."""

    def __init__(self, group: mx.distributed.Group) -> None:
        self.group = group

    def __str__(self) -> str:
        return f"rank {self.group.rank()} of {self.group.size()}"

    def __deepcopy__(self, _: Any) -> ShardGroup:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("[shard_group] optimizer must be saved by save_optimizer but got pickled")


class Options(NamedTuple):
    """How state is stored and rounded, and what is done about gradients that are too large or not finite."""

    op: str  # the optimizer, for errors
    state_dtype: str | None = None  # a name, since MLX's dtypes cannot be pickled
    stochastic_rounding: bool | None = None
    seed: int = 0
    master_weights: bool = False
    max_grad_norm: float | None = None
    skip_nonfinite: bool = False
    shard_group: ShardGroup | None = None

    def described(self) -> dict[str, Any]:
        """The options in what JSON can say."""
        group = self.shard_group
        described = {**self._asdict(), "shard_group": None if group is None else str(group)}
        del described["op"]
        return described

    def as_described(self, found: Mapping[str, Any]) -> Options:
        """These options with others' in their place, as ``described`` gives them; the group of processes stays."""
        asked = {name: x for name, x in self._asdict().items() if name not in ("op", "shard_group")}
        asked |= {name: x for name, x in found.items() if name in asked}
        group = self.shard_group
        return check_options(self.op, **asked, shard_group=group and group.group)

    @property
    def has_guard(self) -> bool:
        """Whether the gradients as a whole decide about a step."""
        return self.max_grad_norm is not None or self.skip_nonfinite

    @property
    def guard_state(self) -> list[str]:
        """What is recorded in the optimizer's state, beside step and learning rate."""
        names = {"grad_norm": self.max_grad_norm is not None, "skipped": self.skip_nonfinite}
        return [name for name, is_recorded in names.items() if is_recorded]

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
            dtype: mx.Dtype = getattr(mx, self.state_dtype)
            return dtype
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
    op: str,
    *,
    state_dtype: Any = None,
    stochastic_rounding: Any = None,
    seed: Any = 0,
    master_weights: Any = False,
    max_grad_norm: Any = None,
    skip_nonfinite: Any = False,
    shard_group: Any = None,
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
    for name, x in (("master_weights", master_weights), ("skip_nonfinite", skip_nonfinite)):
        if not isinstance(x, bool):
            raise TypeError(f"[{op}] {name} must be True or False but got {x!r}")
    options = Options(
        op,
        _as_state_dtype(op, state_dtype),
        stochastic_rounding,
        as_seed(op, seed),
        master_weights,
        _as_norm(op, max_grad_norm),
        skip_nonfinite,
        _as_group(op, shard_group),
    )
    if options.has_codes and stochastic_rounding is False:
        raise ValueError(
            f"[{op}] stochastic_rounding must be None or True with state_dtype='int8' but got False: "
            "rounded to nearest, v would lose its small steps, and m would never fall to 0"
        )
    return options


def refuse_unknown(op: str, unknown: Iterable[str], known: Iterable[str]) -> None:
    """Refuses options that there are not, and says which may have been meant.

    Raises:
        TypeError: If there is any.
    """
    known = list(known)
    for name in unknown:
        if name in ("weight_decay", "decay_filter"):
            raise TypeError(
                f"[{op}] {name} must be given to AdamW but got it for {op}, which decays nothing"
            )
        meant = difflib.get_close_matches(name, known, n=1)
        hint = f"; did you mean {meant[0]!r}?" if meant else f"; there are {', '.join(known)}"
        raise TypeError(f"[{op}] option must be one of {op}'s but got {name!r}{hint}")


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
    if x is None:
        return None
    if not isinstance(x, mx.distributed.Group):
        raise TypeError(
            f"[{op}] shard_group must be a group of mx.distributed (mx.distributed.init() gives one) but got {x!r}"
        )
    return ShardGroup(x)


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
