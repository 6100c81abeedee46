"""One step over all leaves: the fused operation takes all those that it can store, mlx.optimizers each of the
others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import mlx.core as mx

from . import _ext
from ._arguments import as_array
from ._backends import backend_of
from ._clipping import Clipping
from ._decay import DecayFilter
from ._options import FUSED_DTYPES, Options
from ._state import AUXILIARY, MOMENTS, is_quantized

# New parameters, and what is new in their states.
Results = tuple[list[mx.array], list[dict]]
# Updates one leaf as mlx.optimizers does: (gradient, parameter, state, is_decayed) -> parameter. Changes the state it
# is given.
FallBack = Callable[[mx.array, mx.array, dict, bool], mx.array]


class Leaves(NamedTuple):
    """Parallel lists. ``paths`` is called where paths are needed, which is rare."""

    gradients: list[mx.array]
    parameters: list[mx.array]
    states: list[dict]
    paths: Callable[[], list[str]]

    def part(self, places: list[int]) -> Leaves:
        """The leaves at these places."""
        return Leaves(
            [self.gradients[i] for i in places],
            [self.parameters[i] for i in places],
            [self.states[i] for i in places],
            lambda: [self.paths()[i] for i in places],
        )


class Step(NamedTuple):
    """One step of an optimizer: what C++ reads of it, and what Python needs beside that."""

    fused: Any  # _ext.AdamStep
    options: Options
    decay_filter: DecayFilter | None  # None: everything decays, or nothing does
    clipping: Clipping | None
    fall_back: FallBack

    def update(self, leaves: Leaves, is_fused: bool) -> Results:
        """Update every leaf, lazily; changes nothing that it is given.

        ``is_fused`` says whether all parameters are arrays of dtypes that kernels store.

        Raises:
            ValueError, TypeError: If something does not fit, naming its path.
        """
        if not is_fused:
            return self._update_mixed(leaves)
        try:
            return self._update_fused(leaves)
        except TypeError:
            # NumPy moments, or the error that names what is no array.
            return self._update_mixed(leaves)

    def _update_fused(self, leaves: Leaves, numbers: Sequence[int] = ()) -> Results:
        """Update leaves by the fused operation; ``numbers`` are their places among all leaves, if these are not all."""
        backend = backend_of()

        def name(i: int) -> str:
            return leaves.paths()[i]

        if self.options.has_auxiliary:
            self._check_auxiliaries(leaves, name)
        updated: Results = _ext.adam_update(
            leaves.parameters,
            leaves.gradients,
            leaves.states,
            self.fused,
            numbers=numbers,
            is_decayed=self._decayed(leaves),
            uses_kernel=backend.uses_kernel,
            stream=backend.place(None),
            name=name,
        )
        return updated

    def _update_mixed(self, leaves: Leaves) -> Results:
        """Update leaves not all of which the kernels take: NumPy arrays are converted, other dtypes fall back."""
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
        leaves = Leaves(*converted, lambda: paths)
        new: list[Any] = [None] * len(paths)
        places: dict[bool, list[int]] = {True: [], False: []}
        for i, parameter in enumerate(leaves.parameters):
            places[parameter.dtype in FUSED_DTYPES].append(i)
        for is_fused, part in places.items():
            if not part:
                continue
            some = leaves.part(part)
            updated = self._update_fused(some, part) if is_fused else self._fall_back(some)
            for i, result in zip(part, zip(*updated, strict=True), strict=True):
                new[i] = result
        return [parameter for parameter, _ in new], [state for _, state in new]

    def _fall_back(self, leaves: Leaves) -> Results:
        """Update leaves by mlx.optimizers."""
        parameters, states = [], []
        decayed = self._decayed(leaves) or [True] * len(leaves.parameters)
        for path, gradient, parameter, old, is_decayed in zip(leaves.paths(), *leaves[:3], decayed, strict=True):
            if is_quantized(old):
                raise ValueError(
                    f"[{self.options.op}] state of {path} must not be quantized for a parameter of "
                    f"{parameter.dtype} but is: call init(parameters) after a change of dtypes"
                )
            state = dict(old)
            if self.clipping is None:
                parameters.append(self.fall_back(gradient, parameter, state, is_decayed))
            else:
                scaled = self.clipping.scaled(gradient)
                new = self.fall_back(scaled, parameter, state, is_decayed)
                parameters.append(self.clipping.kept(new, parameter))
                state |= {name: self.clipping.kept(state[name], old[name]) for name in MOMENTS}
            states.append(state)
        return parameters, states

    def _decayed(self, leaves: Leaves) -> list[bool]:
        """Whether weight decay applies to each leaf; empty: to all."""
        known = self.decay_filter
        if known is None:
            return []
        named = zip(leaves.paths(), leaves.parameters, strict=True)
        return [known.decays(path, parameter) for path, parameter in named]

    def _check_auxiliaries(self, leaves: Leaves, name: Callable[[int], str]) -> None:
        options = self.options
        for i, (parameter, state) in enumerate(zip(leaves.parameters, leaves.states, strict=True)):
            if reason := options.why_not(parameter):
                raise ValueError(f"[{options.op}] parameter of {name(i)} {reason}")
            has_correction = options.has_correction(parameter)
            correction = state.get("remainder")
            if has_correction != (correction is not None):
                wanted, got = ("a", "none") if has_correction else ("no", f"one beside {parameter.dtype}")
                raise ValueError(
                    f"[{options.op}] state of {name(i)} must hold {wanted} remainder for master_weights but "
                    f"got {got}: call init(parameters) after a change of parameters' dtypes"
                )
            if isinstance(correction, mx.array) and correction.dtype != options.correction_dtype:
                raise ValueError(
                    f"[{options.op}] remainder of {name(i)} must be {options.correction_dtype} for "
                    f"master_weight_bits={options.master_weight_bits} but got {correction.dtype}: call "
                    "init(parameters) to convert it"
                )
