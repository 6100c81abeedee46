"""The walk of gradients, parameters and states in C++ (csrc/tree.h): containers of every kind, missing parts, and
changes of states that are taken back."""

from collections import OrderedDict, defaultdict
from types import MappingProxyType

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten

import mlx_fused_adam as fused
from mlx_fused_adam import _ext


class Pair(tuple):
    """A tuple with a type of its own."""


class Rows(list):
    """The same of a list."""


class Reversed(dict):
    """A dict that names its items the other way round."""

    def items(self):
        return reversed(super().items())


def leaves(count: int) -> list[mx.array]:
    return [mx.full((3,), float(i)) for i in range(count)]


def test_order_is_that_of_tree_flatten():
    a, b, c, d, e, f = leaves(6)
    ordered = OrderedDict(x=a, y=b)
    ordered.move_to_end("x")
    tree = {"list": [c, (d, {"deep": e})], "ordered": ordered, "own": Reversed(x=c, y=d), "one": f}
    found = _ext.Walk(tree, tree, tree)
    expected = [x for _, x in tree_flatten(tree)]
    for lists in (found.gradients, found.parameters, found.states):
        assert len(lists) == len(expected)
        assert all(x is y for x, y in zip(lists, expected, strict=True))
    numbered = found.result(list(range(len(expected))))
    assert numbered == {
        "list": [0, (1, {"deep": 2})],
        "ordered": {"y": 3, "x": 4},
        "own": {"y": 5, "x": 6},
        "one": 7,
    }
    assert list(numbered["ordered"]) == ["y", "x"]


def test_containers_keep_their_types():
    (a,) = leaves(1)
    tree = {"tuple": Pair([a]), "list": Rows([a, a]), "dict": defaultdict(list, w=a), "empty": [{}, ()]}
    found = _ext.Walk(tree, tree, tree).result([1, 2, 3, 4])
    assert found == {"tuple": (1,), "list": [2, 3], "dict": {"w": 4}, "empty": [{}, ()]}
    assert type(found["tuple"]) is Pair and type(found["list"]) is Rows and type(found["dict"]) is dict


def test_a_single_leaf_is_a_tree():
    (a,) = leaves(1)
    found = _ext.Walk(a, a, {})
    assert found.gradients[0] is a and found.states == [{}]
    assert found.result(["new"]) == "new"


def test_parameters_may_be_any_mapping():
    a, b = leaves(2)
    found = _ext.Walk({"x": a}, MappingProxyType({"x": b, "y": a}), {"x": {}})
    assert found.parameters[0] is b


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
def test_dtypes_that_kernels_store(dtype):
    a, b = mx.zeros((2,)), mx.zeros((2,), dtype)
    assert _ext.Walk([a, a], [a, b], [{}, {}]).is_fused


@pytest.mark.parametrize("other", [mx.zeros((2,), mx.complex64), mx.zeros((2,), mx.int32), 1.0, None])
def test_one_parameter_of_another_kind_among_many(other):
    a = mx.zeros((2,))
    assert not _ext.Walk([a, a, a], [a, other, a], [{}, {}, {}]).is_fused


@pytest.mark.parametrize(
    "parameters, states, error",
    [
        ({}, {"x": [{}]}, KeyError),
        ({"x": [0]}, {}, KeyError),
        ({"x": []}, {"x": [{}]}, IndexError),
        ({"x": 1}, {"x": [{}]}, TypeError),
    ],
)
def test_missing_parts_are_errors_of_python(parameters, states, error):
    with pytest.raises(error):
        _ext.Walk({"x": leaves(1)}, parameters, states)


def test_a_tree_within_itself_is_a_recursion_error():
    tree: dict = {}
    tree["self"] = [tree]
    with pytest.raises(RecursionError):
        _ext.Walk(tree, tree, tree)


def test_too_few_results_are_an_error():
    a, b = leaves(2)
    with pytest.raises(IndexError, match="must stay as they are"):
        _ext.Walk([a, b], [a, b], [{}, {}]).result([1])
    with pytest.raises(ValueError, match="as many as their changes"):
        _ext.Changes([{"m": 1}], [])


@pytest.mark.parametrize("bad", [None, 1.0, "w"])
@pytest.mark.parametrize("what", ["gradient", "parameter"])
def test_no_array_among_many_is_a_type_error_with_its_path(what, bad):
    optimizer = fused.Adam(0.1)
    parameters = {"layers": [mx.zeros((2,)) for _ in range(3)]}
    gradients = {"layers": [mx.ones((2,)) for _ in range(3)]}
    optimizer.init(parameters)
    {"gradient": gradients, "parameter": parameters}[what]["layers"][1] = bad
    with pytest.raises(TypeError, match=rf"{what} of layers\.1 "):
        optimizer.apply_gradients(gradients, parameters)


def test_changes_come_and_go_once():
    states = [{"m": 1, "v": 2, "own": 3}, {"m": 4}]
    changes = _ext.Changes(states, [{"v": 20, "m": 10}, {"m": 40}])
    assert states == [{"m": 1, "v": 2, "own": 3}, {"m": 4}]
    changes.undo()
    assert states == [{"m": 1, "v": 2, "own": 3}, {"m": 4}]
    for _ in range(2):
        changes.apply()
        assert states == [{"m": 10, "v": 20, "own": 3}, {"m": 40}]
    assert list(states[0]) == ["m", "v", "own"]
    for _ in range(2):
        changes.undo()
        assert states == [{"m": 1, "v": 2, "own": 3}, {"m": 4}]


def test_an_update_drops_what_it_would_take_back():
    """A kept old moment would cost its memory, and keep its buffer from being updated in place."""
    optimizer, parameters = fused.Adam(0.1), {"w": mx.zeros((1 << 16,))}
    optimizer.init(parameters)
    mx.eval(parameters, optimizer.state)
    before = mx.get_active_memory()
    for _ in range(3):
        parameters = optimizer.apply_gradients({"w": mx.ones((1 << 16,))}, parameters)
        mx.eval(parameters, optimizer.state)
    assert mx.get_active_memory() - before < (1 << 16)
