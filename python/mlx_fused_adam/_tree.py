"""Trees of gradients, parameters and states, as mlx.utils.tree_map takes them: dicts, lists and tuples."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mlx.utils import tree_flatten

from . import _ext


def walk(gradients: Any, parameters: Any, states: Any) -> _ext.Walk:
    """The leaves of gradients, parameters and states as parallel lists.

    Raises:
        ValueError: If a gradient has no parameter or state, naming its path.
    """
    try:
        return _ext.Walk(gradients, parameters, states)
    except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
        for what, tree in (("parameters", parameters), ("state", states)):
            if (path := _missing(gradients, tree)) is not None:
                raise ValueError(
                    f"[adam_update] {what} must have what the gradients have but got nothing at {path}"
                    + ("; after unfreezing, call init(model.trainable_parameters())" if what == "state" else "")
                ) from error
        raise


def paths_of(tree: Any) -> list[str]:
    """The path of each leaf, as in ``layers.0.weight``."""
    return [path or "the parameter" for path, _ in flattened(tree)]


def flattened(tree: Any) -> list[tuple[str, Any]]:
    """mlx.utils.tree_flatten, which returns a dict only where it is given one."""
    return tree_flatten(tree)  # type: ignore[return-value]  # its annotation does not tell the cases apart


def with_states(parameters: Any, states: Any, path: str = "") -> Iterator[tuple[str, Any, dict]]:
    """Path, parameter and state of every parameter that has a state which is not empty."""
    if isinstance(parameters, (dict, list, tuple)):
        for key, x in parameters.items() if isinstance(parameters, dict) else enumerate(parameters):
            yield from with_states(x, part_at(states, key), f"{path}.{key}" if path else str(key))
    elif hasattr(parameters, "dtype") and isinstance(states, dict) and states:
        yield path, parameters, states


def padded(tree: Any, states: Any) -> Any:
    """The tree with lists as long as those of the states, which mlx.optimizers' init requires; the rest is empty."""
    if isinstance(tree, dict):
        return {key: padded(x, part_at(states, key)) for key, x in tree.items()}
    if not isinstance(tree, (list, tuple)):
        return tree
    count = len(states) if isinstance(states, (list, tuple)) else 0
    items = [padded(x, part_at(states, i)) for i, x in enumerate(tree)] + [{}] * (count - len(tree))
    return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)


def part_at(tree: Any, key: Any) -> Any:
    """What a dict, list or tuple has at a key or index; None if it has nothing there."""
    if isinstance(tree, dict):
        return tree.get(key)
    is_index = isinstance(tree, (list, tuple)) and isinstance(key, int)
    return tree[key] if is_index and 0 <= key < len(tree) else None


def _missing(gradients: Any, tree: Any, path: str = "") -> str | None:
    """The path of the first leaf or container of the gradients that the tree lacks."""
    if isinstance(gradients, dict):
        items = list(gradients.items())
    elif isinstance(gradients, (list, tuple)):
        items = list(enumerate(gradients))
    else:
        return None
    for key, gradient in items:
        inner = f"{path}.{key}" if path else str(key)
        try:
            part = tree[key] if isinstance(tree, (Mapping, list, tuple)) else None
        except (KeyError, IndexError, TypeError):
            part = None
        if part is None:
            return inner
        if (found := _missing(gradient, part, inner)) is not None:
            return found
    return None
