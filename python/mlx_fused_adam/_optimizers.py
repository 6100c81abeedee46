"""Drop-in Adam and AdamW: MLX's own classes, with the update of all parameters handed to the fused operation at once.

Everything but the update (state tree, schedules, defaults, errors) is inherited from mlx.optimizers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.optimizers as stock
from mlx.utils import tree_map

from . import _ext
from ._backends import backend_of
from ._operation import as_array
from ._tree import Walk

# What the kernels store; parameters of another dtype (float64, say) are left to mlx.optimizers.
_FUSED_DTYPES = frozenset({mx.float32, mx.bfloat16, mx.float16})


class _Fused(stock.Optimizer):
    """How gradients are applied; stands before mlx.optimizers.Adam or AdamW in the bases."""

    betas: list[float]
    eps: float
    bias_correction: bool
    weight_decay: float

    @property
    def backend(self) -> str:
        """What updates parameters on the default device: ``"cpu"``, ``"metal"`` or ``"stock (<reason>)"``.

        Parameters of other dtypes than float32, bfloat16 and float16 are left to stock in any case.
        """
        return backend_of().description

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """Update every parameter that has a gradient; arguments and result as in mlx.optimizers.

        Raises:
            ValueError: If a gradient's shape or dtype does not fit, naming the parameter's path.
        """
        if getattr(self.apply_single, "__func__", None) is not _Fused.apply_single:
            # A subclass or an instance brings a rule of its own for single parameters.
            return super().apply_gradients(gradients, parameters)
        was_initialized = self._initialized
        before = dict(self._state) if was_initialized else tree_map(lambda x: x, self._state)
        if not was_initialized:
            self.init(gradients)
        step = self.step
        for name, scheduler in self._schedulers.items():
            self.state[name] = scheduler(step)
        self.state["step"] = step + 1
        try:
            return self._apply_tree(gradients, parameters, self.state)
        except ValueError:
            # A refused update is no step, and leaves no moments of a wrong shape behind.
            self._state.clear()
            self._state.update(before)
            self._initialized = was_initialized
            raise

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """Update one parameter with ``state["m"]`` and ``state["v"]``; return the new parameter."""
        return self._apply_tree(gradient, parameter, state)

    def _apply_tree(self, gradients: Any, parameters: Any, states: Any) -> Any:
        apply_stock = super().apply_single
        if not backend_of().is_fused:
            return tree_map(apply_stock, gradients, parameters, states)
        walk = Walk(gradients, parameters, states)
        try:
            new = self._update(walk.gradients, walk.parameters, walk.states, walk.path)
        except ValueError:
            # Not asked before, since looking at every dtype would cost time in every step.
            fused = [i for i, p in enumerate(walk.parameters) if p.dtype in _FUSED_DTYPES]
            if len(fused) == len(walk.parameters):
                raise
            new = self._apply_mixed(walk, fused, apply_stock)
        walk.fill(new)
        return walk.result()

    def _apply_mixed(self, walk: Walk, fused: list[int], apply_stock: Callable) -> list[mx.array]:
        """Leaves whose indices are not in ``fused`` go to stock; on copies of their states, lest ours be refused."""
        leaves = list(zip(walk.gradients, walk.parameters, walk.states, strict=True))
        is_fused = set(fused)
        rest = {i: (g, w, dict(s)) for i, (g, w, s) in enumerate(leaves) if i not in is_fused}
        new = {i: apply_stock(*leaf) for i, leaf in rest.items()}
        columns = zip(*[leaves[i] for i in fused], strict=True) if fused else ((), (), ())
        updated = self._update(*columns, lambda i: walk.path(fused[i]))
        new.update(zip(fused, updated, strict=True))
        for i, (_, _, state) in rest.items():
            walk.states[i].update(state)
        return [new[i] for i in range(len(leaves))]

    def _update(
        self,
        gradients: Sequence[mx.array],
        parameters: Sequence[mx.array],
        states: Sequence[dict],
        name: Callable[[int], str],
    ) -> list[mx.array]:
        beta1, beta2 = self.betas
        new_parameters, new_m, new_v = _ext.adam_update(
            parameters,
            gradients,
            [state["m"] for state in states],
            [state["v"] for state in states],
            as_array(self.learning_rate),
            as_array(self.step),
            beta1=float(beta1),
            beta2=float(beta2),
            eps=float(self.eps),
            weight_decay=float(getattr(self, "weight_decay", 0.0)),
            bias_correction=bool(self.bias_correction),
            name=name,
        )
        for state, m, v in zip(states, new_m, new_v, strict=True):
            state["m"] = m
            state["v"] = v
        return new_parameters


class Adam(_Fused, stock.Adam):
    """``mlx.optimizers.Adam`` in one pass over memory.

    Arguments, defaults, state tree and methods are those of :class:`mlx.optimizers.Adam`; float32 results on the CPU
    are bit-identical to it. 16-bit parameters are updated in float32 arithmetic with one rounding at each store.

    Args:
        learning_rate (float or callable): The learning rate, or a schedule of the step.
        betas (list[float]): Decay rates of ``m`` and ``v``. Default: ``[0.9, 0.999]``.
        eps (float): Added to the denominator. Default: ``1e-8``.
        bias_correction (bool): Whether to divide ``m`` and ``v`` by what they lack in their first steps, having
            started from zero (Kingma & Ba 2015, section 3). Default: ``False``.

    Raises:
        ValueError: At construction, for betas outside [0, 1) or a negative eps.
    """


class AdamW(_Fused, stock.AdamW):
    """``mlx.optimizers.AdamW`` in one pass over memory; see :class:`Adam`.

    Args:
        learning_rate (float or callable): The learning rate, or a schedule of the step.
        betas (list[float]): Decay rates of ``m`` and ``v``. Default: ``[0.9, 0.999]``.
        eps (float): Added to the denominator. Default: ``1e-8``.
        weight_decay (float): Decoupled weight decay (Loshchilov & Hutter 2019). Default: ``0.01``.
        bias_correction (bool): Whether to divide ``m`` and ``v`` by what they lack in their first steps, having
            started from zero (Kingma & Ba 2015, section 3). Default: ``False``.

    Raises:
        ValueError: At construction, for betas outside [0, 1) or a negative eps.
    """
