"""Containers of a saved state: describe them in JSON, rebuild them, and fit a loaded state to its parameters.

mlx.utils.tree_unflatten guesses containers from names: digits become lists, dots become levels. A file of
save_optimizer therefore describes its tree; a state from any other file moves into the containers of its parameters,
by path, at its first use.
"""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any, NamedTuple

import mlx.core as mx

from ._state import map_states
from ._tree import flattened, part_at

_VALUES = (bool, int, float, str, type(None))


def described(tree: Any) -> tuple[Any, dict[str, mx.array]]:
    """The tree in JSON's types, with a name in each array's place, and the arrays by name.

    Keys other than strings and integers are described by their text.

    Raises:
        TypeError: If a leaf is neither an array nor a number, a string or None, naming its path.
    """
    arrays: dict[str, mx.array] = {}

    def describe(x: Any, prefix: str) -> Any:
        if isinstance(x, dict):
            return {"dict": [[_key(k), describe(item, f"{prefix}.{k}")] for k, item in x.items()]}
        if isinstance(x, (list, tuple)):
            kind = "list" if isinstance(x, list) else "tuple"
            return {kind: [describe(item, f"{prefix}.{i}") for i, item in enumerate(x)]}
        if isinstance(x, _VALUES):
            return {"value": x}
        path = prefix[1:]  # as mlx.utils.tree_flatten names it
        if not isinstance(x, mx.array) and not hasattr(x, "__array__"):
            raise TypeError(f"[save_optimizer] state of {path} must be an array, a number or a string but got {x!r}")
        while path in arrays:  # as {"a.b": …} beside {"a": {"b": …}}
            path += "'"
        arrays[path] = x if isinstance(x, mx.array) else mx.array(x)
        return path

    return describe(tree, ""), arrays


def rebuilt(description: Any, arrays: dict[str, mx.array]) -> Any:
    """The tree that ``described`` was given.

    Raises:
        ValueError, TypeError, KeyError: If the description is damaged, or names other arrays.
    """
    unused = dict(arrays)

    def rebuild(x: Any) -> Any:
        if isinstance(x, str):
            return unused.pop(x)
        ((kind, inner),) = x.items()
        if kind == "dict":
            return {k: rebuild(item) for k, item in inner}
        if kind == "value":
            return inner
        items = [rebuild(item) for item in inner]
        return {"list": list, "tuple": tuple}[kind](items)

    tree = rebuild(description)
    if unused:
        raise ValueError(f"no place for {min(unused)}")
    return tree


def can_be_guessed(tree: Any) -> bool:
    """Whether mlx.utils.tree_unflatten rebuilds the tree from its names, but for empty containers and tuples."""
    if isinstance(tree, dict):
        filled = [k for k, x in tree.items() if _has_leaf(x)]
        if not all(isinstance(k, str) and k and "." not in k for k in filled):
            return False
        if filled and all(_is_integer(k) for k in filled):
            return False
        return all(map(can_be_guessed, tree.values()))
    if isinstance(tree, (list, tuple)):
        return all(map(can_be_guessed, tree))
    return isinstance(tree, mx.array)


class Fit(NamedTuple):
    """A state in the containers of parameters, and the paths at which one has nothing of the other."""

    state: dict[str, Any]
    lacking: list[str]  # parameters without a state
    unused: list[str]  # states without a parameter


def fitted(state: dict[str, Any], parameters: Any, takes: Callable[[Any], bool]) -> Fit:
    """Find each parameter's state, by its keys or else by its dotted path; what no parameter takes stays as it is.

    ``takes`` tells whether a part of the state can be a parameter's.
    """
    by_path: dict[str, list[dict]] = {}
    map_states(lambda path, x: by_path.setdefault(path, []).append(x), state)
    lacking: list[str] = []
    taken: set[int] = set()

    def take(part: Any, parameter: Any, path: str) -> Any:
        inner = f"{path}." if path else ""
        if isinstance(parameter, dict):
            items = {k: take(part_at(part, k), x, f"{inner}{k}") for k, x in parameter.items()}
            return {k: x for k, x in items.items() if x is not None}
        if isinstance(parameter, (list, tuple)):
            found = [take(part_at(part, i), x, f"{inner}{i}") for i, x in enumerate(parameter)]
            new = [{} if x is None else x for x in found]
            kind = type(parameter)
            return kind(*new) if hasattr(kind, "_fields") else kind(new)
        if not takes(part):
            same_path = by_path.get(path, [])
            if len(same_path) != 1:
                lacking.append(path)
                return None
            part = same_path[0]
        taken.update(map(id, _leaves(part)))
        return part

    new = take(state, parameters, "")
    others = {k: x for k, x in state.items() if not all(id(a) in taken for a in _leaves(x))}
    states = [(path, x) for path, found in by_path.items() for x in found]
    unused = [path for path, x in states if id(x["m"]) not in taken]
    # What a subclass keeps in a parameter's place; beside the parameters, it may keep what it likes.
    known = taken | {id(a) for _, x in states for a in _leaves(x)}
    mixed = {k: x for k, x in others.items() if k in new}
    unused += [path for path, x in flattened(mixed) if id(x) not in known]
    return Fit(others | new, lacking, unused)


def is_one_state(part: Any) -> bool:
    """Whether a part of a state can be one parameter's: a dict that is not empty, with no parameter's state inside."""
    return isinstance(part, dict) and bool(part) and not any(map(_holds_states, part.values()))


def fit_loaded(
    op: str, file: str, state: dict[str, Any], trained: Any, parameters: Any, makes_empty_states: bool
) -> dict[str, Any]:
    """The state that ``file`` held, in the containers of the parameters that its first use trains.

    A state of one of ``parameters`` that is not trained is kept: it is frozen, or has no gradient in this step.

    Raises:
        ValueError: If a trained parameter has no state, or a state no parameter, naming its path.
    """

    def takes(part: Any) -> bool:
        return is_one_state(part) or (makes_empty_states and part == {})

    fit = fitted(state, trained, takes)
    if fit.lacking:
        raise ValueError(
            f"[{op}] parameters must be those of {file} but got {_named(fit.lacking)}, which has no state there; to "
            "start from zero, call init with the file's parameters first, and then with all"
        )
    if fit.unused and parameters is not trained:
        fit = fitted(state, parameters, takes)
    if fit.unused:
        raise ValueError(
            f"[{op}] parameters must be those of {file} but got nothing at {_named(fit.unused)}, which has a state "
            "there; if it is frozen now, call init with all parameters of the file first"
        )
    return fit.state


def _named(paths: list[str]) -> str:
    first, *others = sorted(paths)
    return (first or "the root") + (f" and {len(others)} more" if others else "")


def _key(key: Any) -> str | int:
    if isinstance(key, (str, int)):
        return key
    return int(key) if isinstance(key, Integral) else str(key)


def _leaves(tree: Any) -> list[Any]:
    if isinstance(tree, dict):
        tree = list(tree.values())
    if isinstance(tree, (list, tuple)):
        return [leaf for x in tree for leaf in _leaves(x)]
    return [tree]


def _has_leaf(tree: Any) -> bool:
    return bool(_leaves(tree))


def _holds_states(tree: Any) -> bool:
    found: list[str] = []
    map_states(lambda path, _: found.append(path), tree)
    return bool(found)


def _is_integer(text: str) -> bool:
    try:
        int(text)
    except ValueError:
        return False
    return True
