"""Containers of a saved state come back as they were; no state is lost or begun anew without an error."""

import collections
import copy
import enum
import json
import pickle

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

import mlx_fused_adam as fused
from support.arrays import assert_same_bits

pytestmark = pytest.mark.usefixtures("device")

W = mx.array([0.5, -1.0, 2.0, 0.25])


class Color(enum.Enum):
    RED = 1


def step(optimizer, parameters, scale=1.0):
    gradients = tree_map(lambda x: x * scale, parameters)
    return optimizer.apply_gradients(gradients, parameters)


def kinds(tree):
    """Containers and keys, with their types."""
    if isinstance(tree, dict):
        return {(type(k), k): kinds(x) for k, x in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree), [kinds(x) for x in tree]
    return None


def written(file, parameters):
    """The file's optimizer, and the parameters that it has reached."""
    optimizer = fused.Adam(1e-1)
    parameters = step(optimizer, step(optimizer, parameters), 0.5)
    fused.save_optimizer(file, optimizer)
    return optimizer, parameters


def as_version_1(file):
    arrays, metadata = mx.load(str(file), format="safetensors", return_metadata=True)
    mx.eval(arrays)
    del metadata["tree"]
    mx.save_safetensors(f"{file}.safetensors", arrays, metadata | {"format_version": "1"})
    (file.parent / f"{file.name}.safetensors").rename(file)


TREES = {
    "a dot in a key": {"a.w": W},
    "int keys": {0: W, 1: W * 2},
    "int keys inside": {"a": {3: W, 7: W * 2}},
    "digits": {"0": W, "1": W * 2},
    "digits inside": {"layers": {"0": {"w": W}, "1": {"w": W * 2}}},
    "digits with a gap": {"layers": {"1": W, "10": W * 2, "999999999999": W * 3}},
    "an empty key": {"": W, "a": {"": W}},
    "lists and tuples": {"a": [W, {"w": W}], "b": (W, [W])},
    "empty containers": {"a": [{}, {"w": W}, []], "b": {}, "c": W, "d": ({}, W)},
    "quotes and letters": {'a"b\\': W, "é\n": W},
    "names of moments": {"m": W, "v": {"m": W, "v": W}},
}
# With keys of one text, or that JSON does not have.
HARD_TREES = {
    "one path twice": {"a.b": W, "a": {"b": W * 2}, "a.b.m": W * 3},
    "one text twice": {"a": {0: W, "0": W * 2}},
}
OTHER_KEYS = {
    "tuples": {("a", 1): W, ("a", 2): W},
    "enum": {"a": {Color.RED: W}},
    "None": {None: W},
    "NumPy": {"a": {np.int64(3): W}},
}


@pytest.mark.parametrize("is_initialized", [False, True])
@pytest.mark.parametrize("name", [*TREES, *HARD_TREES, *OTHER_KEYS])
def test_training_goes_on_with_any_containers(name, is_initialized, tmp_path):
    file = tmp_path / "o"
    first, parameters = written(file, (TREES | HARD_TREES | OTHER_KEYS)[name])
    second = fused.Adam(1e-1)
    if is_initialized:
        second.init(parameters)
    fused.load_optimizer(file, second)
    if name not in OTHER_KEYS:
        assert kinds(second.state) == kinds(first.state)
    assert_same_bits(second.state, first.state)
    expected = step(first, parameters)
    assert_same_bits(step(second, parameters), expected)
    assert kinds(second.state) == kinds(first.state)
    assert_same_bits(second.state, first.state)


@pytest.mark.parametrize("name", TREES)
def test_the_order_of_keys_does_not_matter(name, tmp_path):
    def reverse(tree):
        if isinstance(tree, dict):
            return {k: reverse(x) for k, x in reversed(tree.items())}
        return type(tree)(map(reverse, tree)) if isinstance(tree, (list, tuple)) else tree

    first, parameters = written(tmp_path / "o", TREES[name])
    expected = step(first, parameters)
    for is_initialized in (False, True):
        second = fused.Adam(1e-1)
        if is_initialized:
            second.init(reverse(parameters))
        fused.load_optimizer(tmp_path / "o", second)
        found = step(second, reverse(parameters))
        for path, x in tree_flatten(expected):
            assert mx.array_equal(dict(tree_flatten(found))[path], x), path


@pytest.mark.parametrize("is_initialized", [False, True])
@pytest.mark.parametrize("name", TREES)
def test_a_file_of_version_1_moves_into_the_parameters_containers(name, is_initialized, tmp_path):
    if "999999999999" in str(TREES[name]):
        pytest.skip("mlx.utils would make a list as long")
    first, parameters = written(tmp_path / "o", TREES[name])
    as_version_1(tmp_path / "o")
    second = fused.Adam(1e-1)
    if is_initialized:
        second.init(parameters)
    fused.load_optimizer(tmp_path / "o", second)
    expected = step(first, parameters)
    assert_same_bits(step(second, parameters), expected)
    assert kinds(second.state).keys() == kinds(first.state).keys()


@pytest.mark.parametrize("name", TREES)
def test_the_version_is_1_where_its_readers_guess_right(name, tmp_path):
    optimizer, _ = written(tmp_path / "o", TREES[name])
    arrays, metadata = mx.load(str(tmp_path / "o"), format="safetensors", return_metadata=True)
    is_right = name in (
        "digits",  # beside step and learning_rate
        "lists and tuples",
        "empty containers",
        "quotes and letters",
        "names of moments",
    )
    assert metadata["format_version"] == ("1" if is_right else "2")
    if is_right:
        optimizer.init(TREES[name])
        guessed = fused.Adam(1e-1)
        guessed.state = tree_unflatten(list(arrays.items()))
        guessed.init(TREES[name])
        assert kinds(guessed.state) == kinds(optimizer.state)


def test_values_that_are_no_arrays_are_saved(tmp_path):
    class Counting(fused.Adam):
        def init_single(self, parameter, state):
            super().init_single(parameter, state)
            state["note"], state["times"], state["mean"] = "new", 3, np.ones(2)

    first = Counting(1e-1)
    first.init({"w": W})
    fused.save_optimizer(tmp_path / "o", first)
    second = Counting(1e-1)
    fused.load_optimizer(tmp_path / "o", second)
    second.init({"w": W})
    state = second.state["w"]
    assert (state["note"], state["times"]) == ("new", 3) and mx.array_equal(state["mean"], mx.ones(2))
    first.state["w"]["note"] = object()
    with pytest.raises(TypeError, match=r"state of w.note must be an array, a number or a string"):
        fused.save_optimizer(tmp_path / "o", first)


# ---- Parameters that are not the file's ----


def layers(n):
    return {"layers": [{"w": W, "b": W * 2} for _ in range(n)]}


def no_change(optimizer, attempt, message):
    before = tree_flatten(optimizer.state)
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            attempt()
        after = tree_flatten(optimizer.state)
        assert [k for k, _ in after] == [k for k, _ in before]
        assert all(a is b for (_, a), (_, b) in zip(after, before, strict=True))


FIRST_USES = {
    "update": step,
    "init": lambda optimizer, parameters: optimizer.init(parameters),
    "own rule": lambda optimizer, parameters: step(optimizer, parameters),
}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("is_initialized", [False, True])
@pytest.mark.parametrize("use", FIRST_USES)
def test_a_file_of_other_layers_is_an_error(use, is_initialized, version, tmp_path):
    class Own(fused.Adam):
        def apply_single(self, gradient, parameter, state):
            return super().apply_single(gradient, parameter, state)

    kind = Own if use == "own rule" else fused.Adam
    _, parameters = written(tmp_path / "o", layers(2))
    if version == 1:
        as_version_1(tmp_path / "o")
    for n, message in (
        (
            3,
            r"parameters must be those of .*/o but got layers\.2\.b and 1 more, which has no state there; to start",
        ),
        (
            1,
            r"parameters must be those of .*/o but got nothing at layers\.1\.b and 1 more, which has a state there",
        ),
    ):
        optimizer = kind(1e-1)
        if is_initialized:
            optimizer.init(parameters)
        fused.load_optimizer(tmp_path / "o", optimizer)
        no_change(optimizer, lambda o=optimizer, n=n: FIRST_USES[use](o, layers(n)), message)
        FIRST_USES[use](optimizer, parameters)
        assert optimizer.step.item() == (2 if use == "init" else 3)


def test_a_renamed_parameter_is_an_error(tmp_path):
    written(tmp_path / "o", {"a": {"w": W}})
    for other in ({"a": {"u": W}}, {"b": {"w": W}}, {"a": W}, {"a": [W]}):
        optimizer = fused.Adam(1e-1)
        fused.load_optimizer(tmp_path / "o", optimizer)
        no_change(optimizer, lambda o=optimizer, other=other: step(o, other), "parameters must be those of")


def test_a_file_of_other_shapes_is_an_error_at_the_first_use(tmp_path):
    written(tmp_path / "o", {"a": {"w": W}})
    optimizer = fused.Adam(1e-1)
    fused.load_optimizer(tmp_path / "o", optimizer)
    no_change(
        optimizer,
        lambda: step(optimizer, {"a": {"w": mx.ones(5)}}),
        r"m of a.w must have the parameter's shape",
    )


def test_a_first_use_that_fails_is_none(tmp_path):
    written(tmp_path / "o", {"a.w": W})
    as_version_1(tmp_path / "o")
    optimizer = fused.Adam(1e-1)
    fused.load_optimizer(tmp_path / "o", optimizer)
    no_change(optimizer, lambda: optimizer.init({"a.w": mx.ones(5)}), r"m of a.w must have the parameter's shape")
    no_change(optimizer, lambda: step(optimizer, {"a.w": W, "b": W}), "got b, which has no state there")
    optimizer.init({"a.w": W})


def test_another_file_may_be_loaded_after_one_that_does_not_fit(tmp_path):
    written(tmp_path / "wrong", layers(3))
    first, parameters = written(tmp_path / "o", layers(2))
    second = fused.Adam(1e-1)
    fused.load_optimizer(tmp_path / "wrong", second)
    with pytest.raises(ValueError, match="got nothing at layers.2.b"):
        second.init(parameters)
    fused.load_optimizer(tmp_path / "o", second)
    assert_same_bits(step(second, parameters), step(first, parameters))
    assert_same_bits(second.state, first.state)


def test_parameters_may_be_unfrozen_after_the_first_use(tmp_path):
    _, parameters = written(tmp_path / "o", layers(1))
    optimizer = fused.Adam(1e-1)
    fused.load_optimizer(tmp_path / "o", optimizer)
    optimizer.init(parameters)
    more = {"layers": [*parameters["layers"], layers(1)["layers"][0]]}
    optimizer.init(more)
    step(optimizer, more)
    assert optimizer.state["layers"][1]["w"]["m"].shape == (4,)


def test_parameters_without_a_gradient_keep_the_state_of_the_file(tmp_path):
    """Frozen ones, or those of the other half of a GAN: the model has them."""
    first, parameters = written(tmp_path / "o", {"g": [{"w": W}, {"w": W}], "d.x": {"w": W * 2}})
    for version in (2, 1):
        if version == 1:
            as_version_1(tmp_path / "o")
        second = fused.Adam(1e-1)
        fused.load_optimizer(tmp_path / "o", second)
        second.apply_gradients({"g": [{}, {"w": W}]}, parameters)
        whole = copy.deepcopy(first)
        whole.apply_gradients({"g": [{}, {"w": W}]}, parameters)
        assert_same_bits(second.state, whole.state)
        expected = whole.apply_gradients({"d.x": {"w": W}}, parameters)
        assert_same_bits(second.apply_gradients({"d.x": {"w": W}}, parameters), expected)


def test_a_partly_frozen_model_goes_on(tmp_path):
    def model():
        mx.random.seed(0)
        made = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.0), nn.Linear(4, 4), nn.Linear(4, 2))
        made.freeze()
        made.layers[2].unfreeze()
        return made

    def train(made, optimizer, steps):
        for i in steps:
            x = mx.full((3, 4), float(i))
            _, gradients = nn.value_and_grad(made, lambda x: made(x).square().sum())(x)
            optimizer.update(made, gradients)
        return made.parameters()

    whole, optimizer = model(), fused.AdamW(1e-2)
    train(whole, optimizer, [1, 2])
    fused.save_optimizer(tmp_path / "o", optimizer)
    for is_initialized in (False, True):
        resumed, other = model(), fused.AdamW(1e-2)
        resumed.update(whole.parameters())
        if is_initialized:
            other.init(resumed.trainable_parameters())
        fused.load_optimizer(tmp_path / "o", other)
        reference = model()
        reference.update(whole.parameters())
        expected = train(reference, copy.deepcopy(optimizer), [3])
        assert_same_bits(train(resumed, other, [3]), expected)
    # More layers frozen than in the saved run.
    resumed, other = model(), fused.AdamW(1e-2)
    fused.load_optimizer(tmp_path / "o", other)
    resumed.layers[2].freeze(keys=["bias"])
    train(resumed, other, [3])
    assert "m" in other.state["layers"][2]["bias"]


def test_parts_of_a_multi_optimizer_go_on(tmp_path):
    def make():
        parts = [fused.AdamW(1e-2), fused.Adam(1e-3), fused.Adam(1e-4)]
        filters = [lambda path, _: "w" in path, lambda path, _: "nothing" in path]
        return parts, optim.MultiOptimizer(parts, filters)

    parts, whole = make()
    parameters = step(whole, layers(2))
    others, resumed = make()
    for i, (part, other) in enumerate(zip(parts, others, strict=True)):
        fused.save_optimizer(tmp_path / str(i), part)
        fused.load_optimizer(tmp_path / str(i), other)
    expected = step(whole, parameters)
    assert_same_bits(step(resumed, parameters), expected)
    assert_same_bits(resumed.state, whole.state)


def test_a_file_of_an_optimizer_that_has_seen_nothing_fits_any(tmp_path):
    fused.save_optimizer(tmp_path / "o", fused.Adam(1e-1))
    optimizer = fused.Adam(1e-1)
    fused.load_optimizer(tmp_path / "o", optimizer)
    assert_same_bits(step(optimizer, layers(2)), step(fused.Adam(1e-1), layers(2)))


def test_a_state_that_is_set_after_the_load_is_the_users(tmp_path):
    written(tmp_path / "o", layers(2))
    optimizer = fused.Adam(1e-1)
    fused.load_optimizer(tmp_path / "o", optimizer)
    optimizer.state = {k: optimizer.state[k] for k in ("step", "learning_rate")}
    optimizer.init(layers(3))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_knows_of_the_load(how, tmp_path):
    written(tmp_path / "o", layers(2))
    optimizer = fused.Adam(1e-1)
    fused.load_optimizer(tmp_path / "o", optimizer)
    copied = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    no_change(copied, lambda: step(copied, layers(3)), "got layers.2.b and 1 more, which has no state there")


def test_a_subclass_keeps_what_it_has_beside_the_parameters(tmp_path):
    class Averaging(fused.Adam):
        def init(self, parameters):
            super().init(parameters)
            self.state.setdefault("average", tree_map(mx.zeros_like, parameters))

    first = Averaging(1e-1)
    parameters = step(first, layers(1))
    first.state["average"] = parameters
    fused.save_optimizer(tmp_path / "o", first)
    second = Averaging(1e-1)
    fused.load_optimizer(tmp_path / "o", second)
    step(second, parameters)
    assert_same_bits(second.state["average"], parameters)


def test_a_step_compiled_after_the_load(tmp_path):
    first, parameters = written(tmp_path / "o", {"a.b": W, "c": [W, {}]})
    second = fused.Adam(1e-1)
    fused.load_optimizer(tmp_path / "o", second)
    found = tree_map(lambda x: x, parameters)

    @lambda f: mx.compile(f, inputs=[found, second.state], outputs=[found, second.state])
    def compiled(gradients):
        found.update(second.apply_gradients(gradients, found))

    compiled(parameters)
    assert_same_bits(found, step(first, parameters))
    assert_same_bits(second.state, first.state)


def test_the_structure_is_plain_json(tmp_path):
    written(tmp_path / "o", {"a.b": W, "c": [{}, (W,)]})
    _, metadata = mx.load(str(tmp_path / "o"), format="safetensors", return_metadata=True)
    states = {"dict": [["m", "a.b.m"], ["v", "a.b.v"]]}
    inner = {"tuple": [{"dict": [["m", "c.1.0.m"], ["v", "c.1.0.v"]]}]}
    assert json.loads(metadata["tree"]) == {"dict": [
        ["step", "step"], ["learning_rate", "learning_rate"], ["a.b", states],
        ["c", {"list": [{"dict": []}, inner]}],
    ]}  # fmt: skip


def test_ordered_dicts_go_on(tmp_path):
    first, parameters = written(tmp_path / "o", collections.OrderedDict(b=W, a=W))
    second = fused.Adam(1e-1)
    fused.load_optimizer(tmp_path / "o", second)
    assert_same_bits(step(second, parameters), step(first, parameters))
