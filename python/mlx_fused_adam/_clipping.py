"""Clip factor and skip flag of one step, as lazy scalars: from the global norm of all gradients.

One reduction over all gradients (csrc/op/grad_norm.h); the rest is scalar arithmetic on the device, without a host
sync. Clipping: Pascanu et al. 2013, with the constants of mlx.optimizers.clip_grad_norm.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from . import _ext
from ._arguments import as_array
from ._backends import backend_of
from ._options import Options

# As in mlx.optimizers.clip_grad_norm: keeps the quotient finite where all gradients are zero.
_NORM_EPS = 1e-6

# The keys that a state has beside step and learning rate, and their dtypes. They begin at zero.
_RECORDED_DTYPES = {"grad_norm": mx.float32, "skipped": mx.uint64}
RECORDED: frozenset[str] = frozenset(_RECORDED_DTYPES)


class Clipping(NamedTuple):
    """Lazy scalars of one step."""

    norm: mx.array  # of all gradients, before clipping
    gradient_scale: mx.array | None  # None: not clipped
    is_applied: mx.array | None  # a bool; None: always applied

    def kept(self, new: mx.array, old: mx.array) -> mx.array:
        """``new``, or ``old`` if the step is skipped."""
        return new if self.is_applied is None else mx.where(self.is_applied, new, old)

    def scaled(self, gradient: mx.array) -> mx.array:
        """The gradient clipped by MLX's operations, in its own dtype."""
        if self.gradient_scale is None:
            return gradient
        scaled = gradient * self.gradient_scale
        is_floating = mx.issubdtype(gradient.dtype, mx.floating)
        return scaled.astype(gradient.dtype) if is_floating else scaled

    def record(self, state: dict[str, Any]) -> None:
        """Write the norm and the number of skipped steps into a state."""
        if self.gradient_scale is not None:
            state["grad_norm"] = self.norm
        if self.is_applied is not None:
            skipped = state.get("skipped", 0)
            state["skipped"] = self.kept(skipped, skipped + 1)

    def keep_counters(self, state: dict[str, Any], before: dict[str, Any], counters: Iterable[str]) -> None:
        """Return a state's ``counters``, which have advanced already, to those before if the step is skipped."""
        if self.is_applied is not None:
            for name in counters:
                if name in before:
                    state[name] = self.kept(state[name], before[name])


def clipping_of(gradients: Sequence[mx.array], options: Options, paths: Callable[[], list[str]]) -> Clipping | None:
    """The clipping that the options ask for, or None.

    Raises:
        TypeError: If a gradient is no array, naming its path.
    """
    if not options.needs_norm:
        return None
    backend = backend_of()
    stream = backend.place(None)
    try:
        total = _ext.sum_of_squares(gradients, uses_kernel=backend.uses_norm_kernel, stream=stream)
    except TypeError:
        for path, gradient in zip(paths(), gradients, strict=True):
            as_array("gradient", gradient, path)
        raise
    if options.shard_group is not None:
        total = mx.distributed.all_sum(total, group=options.shard_group.group)
    norm = mx.sqrt(total, stream=stream)
    scale = is_applied = None
    if options.max_grad_norm is not None:
        denominator = mx.add(norm, _NORM_EPS, stream=stream)
        quotient = mx.divide(options.max_grad_norm, denominator, stream=stream)
        scale = mx.minimum(quotient, 1.0, stream=stream)
    if options.skip_nonfinite:
        is_applied = mx.isfinite(total, stream=stream)
    return Clipping(norm, scale, is_applied)


def fit_recorded(state: dict[str, Any], options: Options) -> None:
    """Add the keys that the options record to a state, and remove those that they do not."""
    for name, dtype in _RECORDED_DTYPES.items():
        if name in options.recorded:
            state.setdefault(name, mx.array(0, dtype))
        elif isinstance(state.get(name), mx.array):
            del state[name]


def check_names(parameters: Any, options: Options) -> None:
    """Reject parameters that have the name of a recorded key.

    Raises:
        ValueError: Naming the parameter.
    """
    if isinstance(parameters, dict):
        for name in options.recorded:
            if name in parameters:
                raise ValueError(
                    f"[{options.op}] parameters must not be named {name!r} with the option that records it in "
                    "the state but got one"
                )
