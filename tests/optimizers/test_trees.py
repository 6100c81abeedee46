"""The walk of gradients, parameters and states in C++ (csrc/tree.h): containers of every kind, missing parts, and
changes of states that are taken back."""

from collections import OrderedDict, UserDict, defaultdict
from types import MappingProxyType

import mlx.core as mx
import mlx.optimizers
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


def test_a_dict_that_changes_size_is_an_error():
    tree = dict(zip("abc", leaves(3), strict=True))

    class Popping(dict):
        def __getitem__(self, key):
            tree.popitem()
            return super().__getitem__(key)

    with pytest.raises(RuntimeError, match="changed size"):
        _ext.Walk(tree, Popping(tree), dict.fromkeys(tree, {}))


def test_lists_of_other_lengths_are_an_error():
    a, b = leaves(2)
    for results in ([1], [1, 2, 3]):
        with pytest.raises(ValueError, match="as many as the leaves"):
            _ext.Walk([a, b], [a, b], [{}, {}]).result(results)
    with pytest.raises(ValueError, match="as many as their changes"):
        _ext.Changes([{"m": 1}], [])


def test_results_are_for_the_tree_as_it_was():
    """A callback, as decay_filter, may have changed the gradients; a dict may name its items in another order."""
    gradients = dict(zip("abc", leaves(3), strict=True))
    found = _ext.Walk(gradients, gradients, gradients)
    del gradients["a"]
    assert found.result([0, 1, 2]) == {"a": 0, "b": 1, "c": 2}

    class Hiding(dict):
        def items(self):
            return list(super().items())[:1]

    a, b, c = leaves(3)
    tree = [Hiding(x=a, y=b), c]
    assert _ext.Walk(tree, tree, tree).result([0, 1]) == [{"x": 0}, 1]

    class Alternating(dict):
        calls = 0

        def items(self):
            self.calls += 1
            return list(super().items())[:: 1 if self.calls % 2 else -1]

    tree = Alternating(zip("ab", leaves(2), strict=True))
    found = _ext.Walk(tree, tree, tree)
    assert [x[0].item() for x in found.gradients] == [0.0, 1.0]
    assert found.result(["of a", "of b"]) == {"a": "of a", "b": "of b"}


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


def test_new_keys_go_with_the_changes():
    states = [{"m": 1}]
    changes = _ext.Changes(states, [{"m": 10, "seen": 1}])
    changes.apply()
    assert states == [{"m": 10, "seen": 1}]
    changes.undo()
    assert states == [{"m": 1}]


def test_states_that_are_one_dict_go_back():
    state = {"m": 0}
    changes = _ext.Changes([state, state], [{"m": 1}, {"m": 2}])
    changes.apply()
    assert state == {"m": 2}
    changes.undo()
    assert state == {"m": 0}


class Refusing(dict):
    """A dict that allows so many items to be set, and then refuses once or more."""

    def __init__(self, *arguments, allowed: int, refused: int = 1):
        super().__init__(*arguments)
        self.left = [True] * allowed + [False] * refused

    def __setitem__(self, key, value):
        if self.left and not self.left.pop(0):
            raise KeyboardInterrupt
        super().__setitem__(key, value)


@pytest.mark.parametrize("state", [(), 1, Refusing({"m": 7}, allowed=0)], ids=["tuple", "number", "raises"])
def test_all_states_change_or_none(state):
    states = [{"m": 1, "v": 2}, state, {"m": 3}]
    before = [dict(states[0]), state, dict(states[2])]
    changes = _ext.Changes(states, [{"m": 10, "v": 20}, {"m": 30}, {"m": 30}])
    with pytest.raises((TypeError, KeyboardInterrupt)):
        changes.apply()
    assert states == before
    changes.undo()
    assert states == before


def test_an_error_while_changes_are_undone_takes_back_none():
    states = [{"m": 1}, Refusing({"m": 2}, allowed=1), {"m": 3}]
    changes = _ext.Changes(states, [{"m": 10}, {"m": 20}, {"m": 30}])
    changes.apply()
    with pytest.raises(KeyboardInterrupt):
        changes.undo()
    assert states == [{"m": 10}, {"m": 20}, {"m": 30}]
    changes.undo()
    assert states == [{"m": 1}, {"m": 2}, {"m": 3}]


def test_a_state_that_cannot_go_back_does_not_keep_the_others():
    states = [{"m": 1}, Refusing({"m": 2, "v": 3}, allowed=1, refused=2)]
    changes = _ext.Changes(states, [{"m": 10}, {"m": 20, "v": 30}])
    with pytest.raises(KeyboardInterrupt):
        changes.apply()
    assert states == [{"m": 1}, {"m": 20, "v": 3}]


class Counting(mlx.optimizers.Adam):
    """Adds a key to the state of whatever it updates."""

    def apply_single(self, gradient, parameter, state):
        state["seen"] = state.get("seen", 0) + 1
        return super().apply_single(gradient, parameter, state)


class CountingFused(fused.Adam, Counting):
    """The fused rule, and the one that counts for dtypes that fall back."""


def test_a_rule_that_adds_to_the_state():
    optimizer = CountingFused(0.1)
    parameters = {"a": mx.zeros((2,)), "c": mx.zeros((2,), mx.complex64)}
    optimizer.init(parameters)
    for step in (1, 2):
        optimizer.apply_gradients(parameters, parameters)
        assert optimizer.step.item() == step
        assert optimizer.state["c"]["seen"] == step and "seen" not in optimizer.state["a"]


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_a_state_may_be_any_mapping(name):
    gradients, parameters = {"a": mx.ones((2,)), "w": mx.full((2,), -1.0)}, {"a": mx.zeros((2,)), "w": mx.zeros((2,))}
    results = []
    for module in (fused, mlx.optimizers):
        optimizer = getattr(module, name)(0.1)
        optimizer.init(parameters)
        optimizer.state["w"] = UserDict(optimizer.state["w"])
        new = parameters
        for _ in range(2):
            new = optimizer.apply_gradients(gradients, new)
        assert type(optimizer.state["w"]) is UserDict
        results.append([new["a"], new["w"], optimizer.state["w"]["m"], optimizer.state["w"]["v"]])
    for ours, theirs in zip(*results, strict=True):
        assert ours.tolist() == theirs.tolist()


def test_an_update_whose_state_refuses_is_no_step():
    optimizer, parameters = fused.Adam(0.1), {"a": mx.zeros((2,)), "w": mx.zeros((2,))}
    optimizer.init(parameters)
    optimizer.apply_gradients(parameters, parameters)
    optimizer.state["w"] = Refusing(optimizer.state["w"], allowed=1)
    before = [dict(optimizer.state[name]) for name in "aw"]
    with pytest.raises(KeyboardInterrupt):
        optimizer.apply_gradients({"a": mx.ones((2,)), "w": mx.ones((2,))}, parameters)
    assert optimizer.step.item() == 1
    for name, old in zip("aw", before, strict=True):
        assert all(optimizer.state[name][key] is old[key] for key in ("m", "v")), name


def test_the_step_goes_back_though_a_state_refuses():
    class Failing(mlx.optimizers.SGD):
        def apply_single(self, gradient, parameter, state):
            raise ValueError("of the second part")

    first = fused.Adam(0.1)
    parts = fused.MultiOptimizer([first, Failing(0.1)], [lambda path, _: path == "a"])
    parameters = {"a": mx.zeros((2,)), "w": mx.zeros((2,))}
    parts.init(parameters)
    first.state["a"] = Refusing(first.state["a"], allowed=2)
    with pytest.raises((ValueError, KeyboardInterrupt)):
        parts.apply_gradients(parameters, parameters)
    assert first.step.item() == 0


def test_what_lacks_a_part_is_named_whatever_its_type():
    optimizer = fused.Adam(0.1)
    optimizer.init({"x": mx.zeros((2,))})
    both = {"x": mx.zeros((2,)), "y": mx.zeros((2,))}
    with pytest.raises(ValueError, match="state must have what the gradients have but got nothing at y"):
        optimizer.apply_gradients(both, MappingProxyType(both))
    with pytest.raises(ValueError, match="parameters must have what the gradients have but got nothing at x"):
        optimizer.apply_gradients({"x": mx.zeros((2,))}, [mx.zeros((2,))])


@pytest.mark.parametrize("name", ["m", "v"])
def test_a_moment_of_none_is_a_type_error_with_its_path(name):
    optimizer, parameters = fused.Adam(0.1), {"layer": {"w": mx.zeros((2,))}}
    optimizer.init(parameters)
    optimizer.state["layer"]["w"][name] = None
    with pytest.raises(TypeError, match=rf"{name} of layer\.w must be an array"):
        optimizer.apply_gradients(parameters, parameters)
    assert optimizer.step.item() == 0


def test_an_update_drops_what_it_would_take_back():
    """A kept old moment would cost its memory, and keep its buffer from being updated in place."""
    optimizer, parameters = fused.Adam(0.1), {"w": mx.zeros((1 << 16,))}
    optimizer.init(parameters)
    mx.eval(parameters, optimizer.state)
    before = mx.get_active_memory()
    for _ in range(3):
        parameters = optimizer.apply_gradients({"w": mx.ones((1 << 16,))}, parameters)
        mx.eval(parameters, optimizer.state)
    mx.synchronize()
    assert mx.get_active_memory() - before < (1 << 16)
