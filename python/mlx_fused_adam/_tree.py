"""Walks a tree of gradients beside its parameters and states once, leaving holes for the results.

Same trees as mlx.utils.tree_map takes (dicts, lists, tuples); a step of an optimizer over hundreds of small tensors
would otherwise spend most of its time in two passes of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
from mlx.utils import tree_flatten


class Leaf(NamedTuple):
    """One gradient with what belongs to it, and the place of its result: ``container[key]``."""

    container: Any
    key: Any
    gradient: mx.array
    parameter: mx.array
    state: dict


class Walk:
    """``leaves`` in the order of mlx.utils.tree_flatten; ``result()`` once their places are filled."""

    def __init__(self, gradients: Any, parameters: Any, states: Any) -> None:
        self.leaves: list[Leaf] = []
        self._tuples: list[tuple[Any, Any, type]] = []
        self._gradients = gradients
        # A root above the tree, so that a tree which is a single leaf has a place too.
        self._root = self._walk_dict({"": gradients}, {"": parameters}, {"": states})

    def result(self) -> Any:
        """The tree of results, in containers of the gradients' types."""
        for container, key, kind in reversed(self._tuples):
            items = container[key]
            container[key] = kind(*items) if hasattr(kind, "_fields") else kind(items)
        return self._root[""]

    def path(self, leaf: int) -> str:
        """The path of a leaf, as in ``layers.0.weight``."""
        return tree_flatten(self._gradients)[leaf][0] or "the parameter"

    def _walk_dict(self, gradients: dict, parameters: Any, states: Any) -> dict:
        result = dict.fromkeys(gradients)
        for key, gradient in gradients.items():
            self._place(result, key, gradient, parameters[key], states[key])
        return result

    def _walk_sequence(self, gradients: Sequence, parameters: Any, states: Any) -> list:
        result = [None] * len(gradients)
        for i, gradient in enumerate(gradients):
            self._place(result, i, gradient, parameters[i], states[i])
        return result

    def _place(self, result: Any, key: Any, gradient: Any, parameter: Any, state: Any) -> None:
        if isinstance(gradient, dict):
            result[key] = self._walk_dict(gradient, parameter, state)
        elif isinstance(gradient, (list, tuple)):
            result[key] = self._walk_sequence(gradient, parameter, state)
            if type(gradient) is not list:
                self._tuples.append((result, key, type(gradient)))
        else:
            self.leaves.append(Leaf(result, key, gradient, parameter, state))
