"""One step over all leaves: those that are updated alike go to the fused operation together, other dtypes to mlx.optimizers."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from . import _ext
from ._arguments import as_array, as_scalar
from ._backends import backend_of
from ._clipping import Clipping
from ._decay import DecayFilter
from ._options import FUSED_DTYPES, Options
from ._state import AUXILIARY, MOMENTS, is_quantized

# New parameters, and what is new in their states.
Results = tuple[Sequence[mx.array], Sequence[dict]]
# mlx.optimizers' update of one leaf, which changes the state that it is given.
StockUpdate = Callable[[mx.array, mx.array, dict], mx.array]


class Leaves(NamedTuple):
    """Parallel lists. ``paths`` is called where paths are needed, which is rare."""

    gradients: Sequence[mx.array]
    parameters: Sequence[mx.array]
    states: Sequence[dict]
    paths: Callable[[], list[str]]
    numbers: Sequence[int] = ()  # in the random bits; empty: their places in the lists

    def part(self, places: list[int]) -> Leaves:
        """Those at these places."""
        return Leaves(
            [self.gradients[i] for i in places],
            [self.parameters[i] for i in places],
            [self.states[i] for i in places],
            lambda: [self.paths()[i] for i in places],
            [self.numbers[i] for i in places] if self.numbers else places,
        )

    def in_parts(
        self, keys: Sequence[Hashable], update: Callable[[Any, Leaves], Results]
    ) -> Results:
        """The results of ``update(key, part)`` for the leaves that share a key, in the order of the leaves."""
        new: list[Any] = [None] * len(keys)
        for key in dict.fromkeys(keys):
            places = [i for i, other in enumerate(keys) if other == key]
            updated = update(key, self.part(places))
            for i, result in zip(places, zip(*updated, strict=True), strict=True):
                new[i] = result
        return [parameter for parameter, _ in new], [state for _, state in new]


class Step(NamedTuple):
    """The hyper-parameters of one step."""

    learning_rate: Any
    step: Any
    betas: Sequence[float]
    eps: float
    weight_decay: float
    bias_correction: bool
    options: Options
    decay_filter: DecayFilter | None
    guard: Clipping | None
    stock: StockUpdate  # with and ...
    stock_without_decay: StockUpdate  # ... without weight decay

    def update(self, leaves: Leaves) -> Results:
        """Update every leaf, lazily; changes nothing that it is given.

        Raises:
            ValueError, TypeError: If something does not fit, naming its path.
        """
        try:
            is_mixed = any(p.dtype not in FUSED_DTYPES for p in leaves.parameters)
        except AttributeError:  # not even an array; named below
            is_mixed = True
        if is_mixed:
            return self._update_mixed(leaves)
        try:
            return self._update_fused(leaves)
        except TypeError:
            # NumPy moments, or the error that names what is no array.
            return self._update_mixed(leaves)

    def _update_mixed(self, leaves: Leaves) -> Results:
        """Where not all leaves are what the kernels take: NumPy arrays are converted, other dtypes go to stock."""
        converted: tuple[list, list, list] = ([], [], [])
        paths = leaves.paths()
        for path, gradient, parameter, state in zip(paths, *leaves[:3], strict=True):
            converted[1].append(as_array("parameter", parameter, path))
            converted[0].append(as_array("gradient", gradient, path))
            stored = {
                name: as_array(name, state[name], path)
                for name in (*MOMENTS, *AUXILIARY)
                if name in MOMENTS or name in state
            }
            converted[2].append({**state, **stored})
        leaves = Leaves(*converted, lambda: paths, leaves.numbers)
        are_fused = [parameter.dtype in FUSED_DTYPES for parameter in leaves.parameters]
        return leaves.in_parts(
            are_fused,
            lambda fused, part: self._update_fused(part) if fused else self._update_by_stock(part),
        )

    def _update_by_stock(self, leaves: Leaves) -> Results:
        parameters, states = [], []
        for path, gradient, parameter, old in zip(leaves.paths(), *leaves[:3], strict=True):
            if is_quantized(old):
                raise ValueError(
                    f"[{self.options.op}] state of {path} must not be in codes for a parameter of "
                    f"{parameter.dtype} but is: call init(parameters) after a change of dtypes"
                )
            state = dict(old)
            is_decayed = self.decay_filter is None or self.decay_filter.decays(path, parameter)
            stock = self.stock if is_decayed else self.stock_without_decay
            if self.guard is None:
                parameters.append(stock(gradient, parameter, state))
            else:
                new = stock(self.guard.scaled(gradient), parameter, state)
                parameters.append(self.guard.kept(new, parameter))
                state |= {name: self.guard.kept(state[name], old[name]) for name in MOMENTS}
            states.append(state)
        return parameters, states

    def _update_fused(self, leaves: Leaves) -> Results:
        known = self.decay_filter
        if known is None or self.weight_decay == 0:
            return self._update_alike(leaves, self.weight_decay)
        named = zip(leaves.paths(), leaves.parameters, strict=True)
        return leaves.in_parts(
            [known.decays(path, parameter) for path, parameter in named],
            lambda decays, part: self._update_alike(part, self.weight_decay if decays else 0.0),
        )

    def _update_alike(self, leaves: Leaves, weight_decay: float) -> Results:
        beta1, beta2 = self.betas
        backend = backend_of()

        def name(i: int) -> str:
            return leaves.paths()[i]

        new_parameters, new_m, new_v, new_extras = _ext.adam_update(
            leaves.parameters,
            leaves.gradients,
            [state["m"] for state in leaves.states],
            [state["v"] for state in leaves.states],
            as_scalar("learning_rate", self.learning_rate),
            as_scalar("step", self.step),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(self.eps),
            weight_decay=weight_decay,
            bias_correction=bool(self.bias_correction),
            rounding=self.options.rounding,
            seed=self.options.seed,
            numbers=leaves.numbers,
            is_fused=backend.is_fused,
            stream=backend.place(None),
            name=name,
            extras=self._extras(leaves, name) if self.options.has_auxiliary else [],
            gradient_scale=self.guard and self.guard.gradient_scale,
            is_applied=self.guard and self.guard.is_applied,
        )
        new = [{"m": m, "v": v} for m, v in zip(new_m, new_v, strict=True)]
        for state, stored in zip(new, new_extras, strict=bool(new_extras)):
            state |= {key: x for key, x in zip(AUXILIARY, stored, strict=True) if x is not None}
        return new_parameters, new

    def _extras(
        self, leaves: Leaves, name: Callable[[int], str]
    ) -> list[tuple[mx.array | None, mx.array | None, mx.array | None]]:
        """What states hold beside ``m`` and ``v``."""
        options = self.options
        for i, (parameter, state) in enumerate(zip(leaves.parameters, leaves.states, strict=True)):
            if reason := options.why_not(parameter):
                raise ValueError(f"[{options.op}] parameter of {name(i)} {reason}")
            if options.has_correction(parameter) and "remainder" not in state:
                raise ValueError(
                    f"[{options.op}] state of {name(i)} must hold a remainder for master_weights but "
                    "got none: call init(parameters) after a change of parameters' dtypes"
                )
        remainder, m_scale, v_scale = AUXILIARY
        return [(x.get(remainder), x.get(m_scale), x.get(v_scale)) for x in leaves.states]
