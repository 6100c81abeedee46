"""What the gradients of a step say about it: their global norm, by which they are clipped, and whether it is finite.

One reduction over all gradients (csrc/op/grad_norm.h); everything else is arithmetic of scalars on the device, so nothing waits
for the host. Clipping: Pascanu et al. 2013, with the constants of mlx.optimizers.clip_grad_norm.
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

# What the state holds beside step and learning rate, and how it begins.
_FRESH: dict[str, Callable[[], mx.array]] = {
    "grad_norm": lambda: mx.array(0.0, mx.float32),
    "skipped": lambda: mx.array(0, mx.uint64),
}
GUARD_STATE = frozenset(_FRESH)


class Guard(NamedTuple):
    """Lazy scalars of one step."""

    norm: mx.array  # of all gradients, before clipping
    gradient_scale: mx.array | None
    is_applied: mx.array | None  # a bool; None: in any case

    def kept(self, new: mx.array, old: mx.array) -> mx.array:
        """What a step makes of ``old``: itself, if the step is not applied."""
        return new if self.is_applied is None else mx.where(self.is_applied, new, old)

    def scaled(self, gradient: mx.array) -> mx.array:
        """The gradient as an operation of MLX clips it, in its own dtype."""
        if self.gradient_scale is None:
            return gradient
        scaled = gradient * self.gradient_scale
        return (
            scaled.astype(gradient.dtype) if mx.issubdtype(gradient.dtype, mx.floating) else scaled
        )

    def record(
        self, state: dict[str, Any], before: dict[str, Any], counters: Iterable[str]
    ) -> None:
        """Write the norm and the count of skipped steps into a state whose ``counters`` have moved on already."""
        if self.gradient_scale is not None:
            state["grad_norm"] = self.norm
        if self.is_applied is not None:
            skipped = state.get("skipped", 0)
            state["skipped"] = self.kept(skipped, skipped + 1)
            for name in counters:
                if name in before:
                    state[name] = self.kept(state[name], before[name])


def guard_of(
    gradients: Sequence[mx.array], options: Options, paths: Callable[[], list[str]]
) -> Guard | None:
    """The guard that the options ask for, if any.

    Raises:
        TypeError: If something among the gradients is no array, naming its path.
    """
    if not options.has_guard:
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
        quotient = mx.divide(
            options.max_grad_norm, mx.add(norm, _NORM_EPS, stream=stream), stream=stream
        )
        scale = mx.minimum(quotient, 1.0, stream=stream)
    if options.skip_nonfinite:
        is_applied = mx.isfinite(total, stream=stream)
    return Guard(norm, scale, is_applied)


def fit_guard_state(state: dict[str, Any], options: Options) -> None:
    """Gives a state what the options record there, and takes away what they do not."""
    for name, fresh in _FRESH.items():
        if name in options.guard_state:
            state.setdefault(name, fresh())
        elif isinstance(state.get(name), mx.array):
            del state[name]


def check_names(parameters: Any, options: Options) -> None:
    """Refuses parameters that would stand in the state where the guard's own record does.

    Raises:
        ValueError: Naming the parameter.
    """
    if isinstance(parameters, dict):
        for name in options.guard_state:
            if name in parameters:
                raise ValueError(
                    f"[{options.op}] parameters must not be named {name!r} with the option that records it in "
                    "the state but got one"
                )
