"""Training loops for tests: the same steps eagerly and through mx.compile."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map


def copied(tree: Any) -> Any:
    """The same tree with containers of its own; the arrays are shared."""
    return tree_map(lambda x: x, tree)


def eager(optimizer: Any, parameters: Any) -> Callable[[Any], None]:
    """step(gradients), which replaces the arrays in the dict `parameters`."""

    def step(gradients: Any) -> None:
        parameters.update(optimizer.apply_gradients(gradients, parameters))

    return step


def compiled(optimizer: Any, parameters: Any) -> Callable[[Any], None]:
    """The same, compiled."""
    state = [parameters, optimizer.state]
    return mx.compile(eager(optimizer, parameters), inputs=state, outputs=state)


def train(optimizer: Any, parameters: Any, steps: Iterable[Any], is_compiled: bool = False) -> Any:
    """The parameters after a step with each of these gradients, evaluated one by one; `parameters` stay as they
    were.
    """
    if is_compiled:
        parameters = copied(parameters)
        optimizer.init(parameters)
        step = compiled(optimizer, parameters)
    for gradients in steps:
        if is_compiled:
            step(gradients)
        else:
            parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
    return parameters
