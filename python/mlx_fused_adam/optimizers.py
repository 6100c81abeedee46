"""Drop-in Adam and AdamW: MLX's own classes with the update of all parameters handed to the fused operation at once.

Everything that is not the update (state tree, schedules, defaults, errors) is inherited from mlx.optimizers.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.optimizers as stock
from mlx.utils import tree_flatten, tree_map

from . import _ext
from .backends import backend_of

_FUSED_DTYPES = frozenset({mx.float32, mx.bfloat16, mx.float16})


class _Fused(stock.Optimizer):
    """Replaces how mlx.optimizers.Adam and AdamW apply gradients; comes before them in the bases."""

    betas: list[float]
    eps: float
    bias_correction: bool

    @property
    def backend(self) -> str:
        """What computes updates on the default device: ``"cpu"``, ``"metal"`` or ``"stock (<reason>)"``."""
        return backend_of(mx.default_device()).description

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """Update all parameters of the tree at once; arguments and result as in mlx.optimizers.

        Raises:
            ValueError: If a gradient's shape or dtype does not fit, naming the parameter's path.
        """
        if type(self).apply_single is not _Fused.apply_single:
            # A subclass has a rule of its own for single parameters: keep to it.
            return super().apply_gradients(gradients, parameters)
        if not self._initialized:
            self.init(gradients)
        for name, scheduler in self._schedulers.items():
            self.state[name] = scheduler(self.step)
        self.state["step"] = self.step + 1
        return self._apply_tree(gradients, parameters, self.state)

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        """Update one parameter and its ``state["m"]`` and ``state["v"]``; return the new parameter."""
        return self._apply_tree(gradient, parameter, {"": state} if not state else state)

    def _apply_tree(self, gradients: Any, parameters: Any, state: Any) -> Any:
        if not backend_of(mx.default_device()).is_fused:
            return tree_map(super().apply_single, gradients, parameters, state)
        leaves: list[tuple[mx.array, mx.array, dict]] = []

        def collect(gradient: mx.array, parameter: mx.array, leaf_state: dict) -> None:
            leaves.append((gradient, parameter, leaf_state))

        tree_map(collect, gradients, parameters, state)
        fused = [leaf for leaf in leaves if leaf[1].dtype in _FUSED_DTYPES]
        updated = iter(self._apply_fused(fused, lambda i: _path(gradients, leaves.index(fused[i]))))
        return tree_map(lambda _: next(updated), gradients)

    def _apply_fused(self, leaves: list, name: Any) -> list[mx.array]:
        beta1, beta2 = self.betas
        parameters, ms, vs = _ext.adam_update(
            [parameter for _, parameter, _ in leaves],
            [gradient for gradient, _, _ in leaves],
            [state["m"] for _, _, state in leaves],
            [state["v"] for _, _, state in leaves],
            self.learning_rate,
            self.step,
            beta1=beta1,
            beta2=beta2,
            eps=self.eps,
            weight_decay=getattr(self, "weight_decay", 0.0),
            bias_correction=self.bias_correction,
            name=name,
        )
        for (_, _, state), m, v in zip(leaves, ms, vs, strict=True):
            state["m"] = m
            state["v"] = v
        return parameters


class Adam(_Fused, stock.Adam):
    pass


class AdamW(_Fused, stock.AdamW):
    pass
