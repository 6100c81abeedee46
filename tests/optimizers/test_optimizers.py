"""fused.Adam and AdamW stand in for those of mlx.optimizers: same signature, state tree, methods and errors."""

import inspect
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

import mlx_fused_adam as fused
from mlx_fused_adam import _clipping
from support.mlx_release import since_mlx

pytestmark = pytest.mark.usefixtures("device")

NAMES = ["Adam", "AdamW"]


def flat(tree) -> dict:
    return dict(tree_flatten(tree))


def assert_same_tree(actual, expected):
    actual, expected = flat(actual), flat(expected)
    assert list(actual) == list(expected)
    for path, x in expected.items():
        assert actual[path].dtype == x.dtype and actual[path].shape == x.shape, path
        np.testing.assert_allclose(np.array(actual[path]), np.array(x), rtol=1e-6, atol=1e-7, err_msg=path)


def both(name, *args, **kwargs):
    return getattr(fused, name)(*args, **kwargs), getattr(optim, name)(*args, **kwargs)


def compare(optimizers, parameters, gradients, steps=3):
    """Runs both optimizers on the same trees; compares structure, parameters and state at every step."""
    found, expected = parameters, parameters
    for _ in range(steps):
        found = optimizers[0].apply_gradients(gradients, found)
        expected = optimizers[1].apply_gradients(gradients, expected)
        assert tree_map(lambda _: 0, found) == tree_map(lambda _: 0, expected)
        assert_same_tree(found, expected)
        assert_same_tree(optimizers[0].state, optimizers[1].state)


@pytest.mark.parametrize("name", NAMES)
def test_subclass_with_the_same_signature(name):
    fused_class, mlx_class = getattr(fused, name), getattr(optim, name)
    assert issubclass(fused_class, mlx_class)

    def parameters(kind):
        found = inspect.signature(kind).parameters.values()
        return [(p.name, p.kind, list(p.default) if p.name == "betas" else p.default) for p in found]

    found = parameters(fused_class)
    assert found[: len(parameters(mlx_class))] == parameters(mlx_class)
    options = found[len(parameters(mlx_class)) :]
    assert all(kind == inspect.Parameter.KEYWORD_ONLY for _, kind, _ in options)
    expected = {
        "state_dtype": None,
        "stochastic_rounding": None,
        "seed": 0,
        "master_weights": False,
        "master_weight_bits": 32,
        "max_grad_norm": None,
        "skip_nonfinite": False,
        "shard_group": None,
    }
    if name == "AdamW":
        expected["decay_filter"] = None
    assert {name: default for name, _, default in options} == expected


@pytest.mark.parametrize("name", NAMES)
def test_trees_of_every_shape(name):
    x = lambda *shape: mx.full(shape, 0.5)  # noqa: E731
    parameters = {
        "list": [x(3), [x(2, 2)], {}],
        "tuple": (x(4), {"deep": (x(1),)}),
        "empty": {},
        "empty_list": [],
        "scalar": mx.array(0.5),
    }
    gradients = tree_map(lambda p: mx.ones_like(p) * 0.1, parameters)
    compare(both(name, 1e-2), parameters, gradients)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_for_some_parameters_only(name):
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    gradients = {"layers": [{"weight": mx.ones((4, 3))}]}
    optimizers = both(name, 0.1)
    results = [o.apply_gradients(gradients, model) for o in optimizers]
    assert_same_tree(*results)
    assert list(flat(results[0])) == ["layers.0.weight"]
    results = [o.apply_gradients({}, model) for o in both(name, 0.1)]
    assert results == [{}, {}]


@pytest.mark.parametrize("name", NAMES)
def test_frozen_model_update(name):
    """As with LoRA: update() touches what has gradients and nothing else."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model.layers[0].freeze()
    before = {k: np.array(v) for k, v in flat(model.parameters()).items()}
    optimizer = getattr(fused, name)(0.1)
    gradients = nn.value_and_grad(model, lambda m: m(mx.ones((2, 3))).sum())(model)[1]
    optimizer.update(model, gradients)
    for path, x in flat(model.parameters()).items():
        assert np.array_equal(np.array(x), before[path]) == path.startswith("layers.0"), path


@pytest.mark.parametrize("name", NAMES)
def test_schedules_and_settable_learning_rate(name):
    schedule = optim.join_schedules([optim.linear_schedule(0.0, 0.1, 3), optim.cosine_decay(0.1, 5)], [3])
    parameters, gradients = {"w": mx.ones(5)}, {"w": mx.ones(5)}
    compare(both(name, schedule, bias_correction=True), parameters, gradients, steps=9)

    optimizers = both(name, 0.1)
    compare(optimizers, parameters, gradients)
    for value in (0.01, mx.array(0.02), 0):
        for optimizer in optimizers:
            optimizer.learning_rate = value
        compare(optimizers, parameters, gradients)


@pytest.mark.parametrize("name", NAMES)
def test_init_and_single(name):
    parameter, gradient = mx.full((3, 2), 2.0), mx.full((3, 2), 0.3)
    results = []
    for optimizer in both(name, 0.1, bias_correction=True):
        optimizer.init({"a": parameter})
        state = {}
        optimizer.init_single(parameter, state)
        optimizer.state["step"] = optimizer.step + 1
        new = optimizer.apply_single(gradient, parameter, state)
        results.append({"new": new, "state": state, "tree": optimizer.state})
    assert_same_tree(*results)


@pytest.mark.parametrize("name", NAMES)
def test_state_moves_between_fused_and_mlx_optimizers(name):
    """Saved by one, loaded by the other, in both directions."""
    optimizer, reference = both(name, 0.1, bias_correction=True)
    parameters, gradients = {"w": [mx.ones(4)]}, {"w": [mx.full((4,), 0.2)]}
    for first, second in ((optimizer, reference), (reference, optimizer)):
        parameters = first.apply_gradients(gradients, parameters)
        second.state = tree_unflatten(tree_flatten(first.state))
        expected = first.apply_gradients(gradients, parameters)
        assert_same_tree(second.apply_gradients(gradients, parameters), expected)
        assert_same_tree(second.state, first.state)


def test_multi_optimizer():
    def make(module):
        return optim.MultiOptimizer(
            [module.AdamW(0.1, weight_decay=0.5), module.Adam(0.01)],
            [lambda path, parameter: path.endswith("weight")],
        )

    parameters = nn.Linear(3, 4).parameters()
    gradients = tree_map(mx.ones_like, parameters)
    compare((make(fused), make(optim)), parameters, gradients)


def test_clipped_and_mixed_dtypes():
    """Gradients of another floating dtype; what comes back keeps each parameter's own."""
    parameters = {"a": mx.ones(4, mx.bfloat16), "b": mx.ones(4), "c": mx.ones(4, mx.float16)}
    gradients = {k: mx.full((4,), 3.0) for k in parameters}
    gradients, _ = optim.clip_grad_norm(gradients, 1.0)
    optimizer = fused.Adam(0.1)
    optimizer.init(parameters)
    new = optimizer.apply_gradients(gradients, parameters)
    for k, p in parameters.items():
        assert new[k].dtype == p.dtype
        moments = mx.bfloat16 if p.dtype == mx.float16 else p.dtype
        assert optimizer.state[k]["m"].dtype == optimizer.state[k]["v"].dtype == moments
        assert mx.all(new[k] < p).item()


def test_other_dtypes_fall_back():
    with mx.stream(mx.cpu):
        parameters = {"double": mx.ones(3, mx.float64), "single": mx.ones(3)}
        gradients = {k: mx.full((3,), 0.1, dtype=p.dtype) for k, p in parameters.items()}
        optimizer, reference = both("AdamW", 0.1)
        results = [o.apply_gradients(gradients, parameters) for o in (optimizer, reference)]
        assert results[0]["double"].dtype == mx.float64
        for k in parameters:
            np.testing.assert_allclose(np.array(results[0][k]), np.array(results[1][k]), rtol=1e-6)


def test_a_subclass_keeps_its_own_rule():
    class Signed(fused.Adam):
        def apply_single(self, gradient, parameter, state):
            return super().apply_single(mx.sign(gradient), parameter, state)

    parameters = {"w": mx.ones(4), "b": [mx.ones(2)]}
    gradients = tree_map(lambda p: p * 7, parameters)
    signs = tree_map(mx.sign, gradients)
    optimizer, reference = Signed(0.1), fused.Adam(0.1)
    new = optimizer.apply_gradients(gradients, parameters)
    assert_same_tree(new, reference.apply_gradients(signs, parameters))
    assert_same_tree(optimizer.state, reference.state)

    instance = fused.Adam(0.1)
    instance.apply_single = lambda gradient, parameter, state: parameter + gradient
    assert_same_tree(
        instance.apply_gradients(gradients, parameters),
        tree_map(lambda p, g: p + g, parameters, gradients),
    )


class Pair(NamedTuple):
    first: Any
    second: Any


def test_tuples_within_tuples():
    x = mx.ones(2)
    parameters = {"a": ((x,),), "b": (x, (x, [(x,)])), "c": Pair(Pair(x, x), (x,))}
    new = fused.Adam(0.1).apply_gradients(parameters, parameters)
    expected = optim.Adam(0.1).apply_gradients(parameters, parameters)
    kinds = lambda tree: tree_map(lambda _: 0, tree)  # noqa: E731
    assert repr(kinds(new)) == repr(kinds(expected))
    assert_same_tree(new, expected)


def test_stock_state_keeps_tuples_as_they_are():
    x = mx.ones(2)
    parameters = {"a": ((x,),), "b": Pair(Pair(x, x), [x])}
    optimizer, reference = both("Adam", 0.1)
    for o in (optimizer, reference):
        o.apply_gradients(parameters, parameters)
    kinds = lambda tree: tree_map(lambda _: 0, tree)  # noqa: E731
    found = fused.stock_state(optimizer)
    assert repr(kinds({k: found[k] for k in "ab"})) == repr(kinds({k: reference.state[k] for k in "ab"}))


def test_a_rejected_step_in_a_mixed_tree_leaves_no_trace():
    """Neither half of the tree moves when the other is rejected, nor do step and schedule."""
    with mx.stream(mx.cpu):
        optimizer = fused.Adam(lambda step: 1 / (1 + step))
        parameters = {"single": mx.ones(3), "double": mx.ones(3, mx.float64)}
        optimizer.init(parameters)
        before = {k: np.array(v) for k, v in flat(optimizer.state).items()}
        for wrong in ("single", "double"):
            gradients = {k: mx.ones(2 if k == wrong else 3, p.dtype) for k, p in parameters.items()}
            with pytest.raises(ValueError):
                new = optimizer.apply_gradients(gradients, parameters)
                mx.eval(new, optimizer.state)
            for k, v in flat(optimizer.state).items():
                np.testing.assert_array_equal(np.array(v), before[k], err_msg=f"{wrong}: {k}")


@pytest.mark.parametrize("step", [5, mx.array(5), mx.array(5.0)], ids=str)
def test_kinds_of_step(step):
    optimizer = fused.Adam(0.1, bias_correction=True)
    optimizer.init({"w": mx.ones(3)})
    optimizer.state["step"] = step
    new = optimizer.apply_gradients({"w": mx.ones(3)}, {"w": mx.ones(3)})
    np.testing.assert_allclose(
        np.array(new["w"]),
        1 - 0.1 * (0.1 / (1 - 0.9**6)) / (0.001 / (1 - 0.999**6)) ** 0.5,
        rtol=1e-4,
    )


OUT_OF_RANGE = [
    ({"betas": [1.0, 0.9]}, "Adam beta1 should be in", "beta1 must be in"),
    ({"betas": [0.9, -0.1]}, "Adam beta2 should be in", "beta2 must be in"),
    ({"eps": -1.0}, "Adam epsilon should be >=0", "eps must be at least 0"),
]


@since_mlx("0.32.2", "mlx.optimizers checks the ranges of its arguments")
@pytest.mark.parametrize(("arguments", "message"), [case[:2] for case in OUT_OF_RANGE])
def test_constructor_errors_are_those_of_mlx(arguments, message):
    for name in NAMES:
        for optimizer in (getattr(optim, name), getattr(fused, name)):
            with pytest.raises(ValueError, match=message):
                optimizer(0.1, **arguments)


@pytest.mark.parametrize(("arguments", "_", "message"), OUT_OF_RANGE)
@pytest.mark.parametrize("name", NAMES)
def test_what_mlx_does_not_check_is_rejected_at_construction(name, arguments, _, message, monkeypatch):
    """With an mlx.optimizers that takes any argument, as that of an older mlx does."""

    def unchecked(self, learning_rate, betas, eps, *_):
        optim.Optimizer.__init__(self)
        self.learning_rate, self.betas, self.eps = learning_rate, betas, eps

    monkeypatch.setattr(getattr(optim, name), "__init__", unchecked)
    getattr(fused, name)(0.1)
    with pytest.raises(ValueError, match=rf"\[{name}\] {message}"):
        getattr(fused, name)(0.1, **arguments)


@pytest.mark.parametrize("wrong", [(3,), (4, 3), (1, 4), ()], ids=str)
def test_a_gradient_of_another_shape_names_the_path(wrong):
    parameters = {"model": [{"bias": mx.ones(2)}, {"weight": mx.ones((3, 4))}]}
    gradients = {"model": [{"bias": mx.ones(2)}, {"weight": mx.ones(wrong)}]}
    optimizer = fused.AdamW(0.1)
    optimizer.init(parameters)
    before = {k: np.array(v) for k, v in flat(optimizer.state).items()}
    with pytest.raises(ValueError, match=r"\[adam_update\] gradient of model\.1\.weight must have"):
        optimizer.apply_gradients(gradients, parameters)
    for k, v in flat(optimizer.state).items():
        np.testing.assert_array_equal(np.array(v), before[k], err_msg=f"state {k} after an error")


@pytest.mark.parametrize("option", [{"bias_correction": 1}, {"weight_decay": "0.1"}, {"eps": 0}])
def test_options_as_yaml_may_say_them(option):
    plain = {k: bool(v) if k == "bias_correction" else float(v) for k, v in option.items()}
    parameters, gradients = {"w": mx.ones(3)}, {"w": mx.ones(3)}
    new = fused.AdamW(0.1, **option).apply_gradients(gradients, parameters)
    assert_same_tree(new, fused.AdamW(0.1, **plain).apply_gradients(gradients, parameters))


@pytest.mark.parametrize("kind", [np.float32, np.float64, mx.array, str])
def test_hyperparameters_may_be_assigned_as_any_number(kind):
    parameters, gradients = {"w": mx.ones(3)}, {"w": mx.ones(3)}
    optimizer = fused.AdamW(0.1)
    optimizer.weight_decay, optimizer.eps, optimizer.betas = kind(0.5), kind(1.0), [kind(0.5)] * 2
    new = optimizer.apply_gradients(gradients, parameters)
    expected = fused.AdamW(0.1, [0.5, 0.5], 1.0, 0.5).apply_gradients(gradients, parameters)
    assert_same_tree(new, expected)


def test_a_schedule_may_return_a_number():
    parameters, gradients = {"w": mx.ones(3)}, {"w": mx.ones(3)}
    optimizer = fused.Adam(lambda step: 0.1)
    new = optimizer.apply_gradients(gradients, parameters)
    assert optimizer.learning_rate.dtype == mx.float32
    assert_same_tree(new, fused.Adam(0.1).apply_gradients(gradients, parameters))


@pytest.mark.parametrize("dtype", [mx.int32, mx.complex64, mx.bool_], ids=str)
def test_a_gradient_of_another_kind_names_the_path(dtype):
    with pytest.raises(ValueError, match=r"gradient of a\.w must be float32, bfloat16 or float16"):
        fused.Adam(0.1).apply_gradients({"a": {"w": mx.ones(3, dtype)}}, {"a": {"w": mx.ones(3)}})


HUGE = 10**400
BAD_ARGUMENTS = [
    ({"m": mx.zeros(4)}, r"m of the tensor must have the parameter's shape \(3\) but got \(4\)"),
    ({"v": mx.zeros((3, 1))}, "v of the tensor must have the parameter's shape"),
    ({"parameter": mx.ones(3, mx.int32)}, "parameter of the tensor must be float32"),
    ({"v": mx.zeros(3, mx.bfloat16)}, "m and v of the tensor must share one dtype"),
    ({"learning_rate": mx.ones(2)}, r"learning_rate must be a scalar but got shape \(2\)"),
    ({"learning_rate": mx.array(1j)}, "learning_rate must be real but got complex64"),
    ({"learning_rate": 1j}, "learning_rate must be real but got 1j"),
    ({"learning_rate": np.complex64(1j)}, "learning_rate must be real but got"),
    ({"learning_rate": HUGE}, r"learning_rate must be finite but got 10000\d*\.\.\.0"),
    ({"learning_rate": 1e39}, "learning_rate must be finite but got 1e\\+39"),
    ({"learning_rate": float("nan")}, "learning_rate must be finite but got nan"),
    ({"learning_rate": "fast"}, "learning_rate must be a number but got 'fast'"),
    ({"learning_rate": None}, "learning_rate must be a number but got None"),
    ({"bias_correction": True}, "step must be given with bias_correction"),
    ({"bias_correction": True, "step": mx.ones(3)}, "step must be a scalar"),
    ({"step": 0}, r"step must be from 1 to 2\*\*63 - 1 but got 0"),
    ({"step": -1}, "step must be from 1 .* but got -1"),
    ({"step": 2**63}, "step must be from 1 .* but got 9223372036854775808"),
    ({"step": float("nan")}, "step must be from 1 .* but got nan"),
    ({"step": 1j}, "step must be from 1 .* but got 1j"),
    ({"step": "first"}, r"step must be a number but got 'first' \(str\)"),
    ({"betas": (1.0, 0.9)}, r"beta1 must be in \[0, 1\) but got 1"),
    ({"betas": (0.9, float("nan"))}, r"beta2 must be in \[0, 1\) but got nan"),
    ({"betas": (0.9,)}, r"betas must be two numbers but got \(0.9,\)"),
    ({"betas": (0.9, 0.99, 0.999)}, "betas must be two numbers but got"),
    ({"betas": 0.9}, "betas must be two numbers but got 0.9"),
    ({"betas": "99"}, "betas must be two numbers but got '99'"),
    ({"betas": (0.9, None)}, "beta2 must be a number but got None"),
    ({"eps": -1e-8}, "eps must be at least 0 but got -1e-08"),
    ({"eps": "small"}, "eps must be a number but got 'small'"),
    ({"eps": None}, "eps must be a number but got None"),
    ({"weight_decay": float("nan")}, "weight_decay must be finite but got nan"),
    ({"weight_decay": [0.1]}, r"weight_decay must be a number but got \[0.1\] \(list\)"),
    ({"seed": 1}, "step must be given for stochastic rounding but got None"),
    ({"seed": -1, "step": 1}, r"seed must be from 0 to 2\*\*64 - 1 but got -1"),
    (
        {"seed": 2**64, "step": 1},
        r"seed must be from 0 to 2\*\*64 - 1 but got 18446744073709551616",
    ),
    ({"seed": 0.5, "step": 1}, "seed must be an integer but got 0.5"),
    ({"seed": True, "step": 1}, "seed must be an integer but got True"),
    ({"stream": "cpu"}, "stream must be a stream or a device but got 'cpu'"),
    ({"stream": 1}, "stream must be a stream or a device but got 1"),
    ({"gradient": None}, "gradient of the tensor must be an array but got None"),
    ({"gradient": np.ones(3)}, r"gradient of the tensor must be an array but got .* \(ndarray\)"),
    ({"parameter": [1.0]}, r"parameter of the tensor must be an array but got \[1.0\] \(list\)"),
    ({"m": 3.0}, r"m of the tensor must be an array but got 3.0 \(float\)"),
]


@pytest.mark.parametrize(("change", "message"), BAD_ARGUMENTS, ids=lambda x: str(x)[:60])
def test_the_operation_rejects_what_does_not_fit(change, message):
    arguments = {k: mx.ones(3) for k in ("parameter", "gradient", "m", "v")}
    with pytest.raises((ValueError, TypeError), match=r"\[adam_update\] " + message):
        fused.adam_update(**{**arguments, "learning_rate": 0.1, **change})


BAD_OPTIONS = [
    ({"weight_decay": float("nan")}, "weight_decay must be finite but got nan"),
    ({"weight_decay": None}, "weight_decay must be a number but got None"),
    ({"eps": None}, "eps must be a number but got None"),
    ({"state_dtype": "float16"}, "state_dtype must be .* but got 'float16', since float16 cannot"),
    ({"state_dtype": mx.float16}, "state_dtype must be .* but got 'float16', since float16 cannot"),
    ({"state_dtype": "int5"}, "state_dtype must be None, 'float32', 'bfloat16', 'int8' or 'int4' but got 'int5'"),
    ({"state_dtype": mx.uint8}, "state_dtype must be .* but got 'uint8'"),
    ({"state_dtype": 16}, "state_dtype must be a string or a dtype but got 16"),
    ({"stochastic_rounding": "yes"}, "stochastic_rounding must be None, True or False but got"),
    ({"stochastic_rounding": 1}, "stochastic_rounding must be None, True or False but got 1"),
    ({"state_dtype": "int8", "stochastic_rounding": False},
     "stochastic_rounding must be None or True with state_dtype='int8' but got False"),
    ({"state_dtype": "int4", "stochastic_rounding": False},
     "stochastic_rounding must be None or True with state_dtype='int4' but got False"),
    ({"master_weights": None}, "master_weights must be True or False but got None"),
    ({"master_weights": "yes"}, "master_weights must be True or False but got 'yes'"),
    ({"seed": -1}, r"seed must be from 0 to 2\*\*64 - 1 but got -1"),
    ({"seed": 2**64}, r"seed must be from 0 to 2\*\*64 - 1 but got 18446744073709551616"),
    ({"seed": 1.5}, "seed must be an integer but got 1.5"),
    ({"seed": True}, "seed must be an integer but got True"),
    ({"seed": "1"}, "seed must be an integer but got '1'"),
    ({"max_grad_norm": 0}, "max_grad_norm must be greater than 0 but got 0"),
    ({"max_grad_norm": -1.0}, "max_grad_norm must be greater than 0 but got -1"),
    ({"max_grad_norm": float("inf")}, "max_grad_norm must be finite but got inf"),
    ({"max_grad_norm": float("nan")}, "max_grad_norm must be finite but got nan"),
    ({"max_grad_norm": "much"}, "max_grad_norm must be a number but got 'much'"),
    ({"max_grad_norm": True}, "max_grad_norm must be a number but got True"),
    ({"max_grad_norm": [1.0]}, r"max_grad_norm must be a number but got \[1.0\]"),
    ({"max_grad_norm": 1j}, "max_grad_norm must be real but got 1j"),
    ({"skip_nonfinite": None}, "skip_nonfinite must be True or False but got None"),
    ({"skip_nonfinite": 1}, "skip_nonfinite must be True or False but got 1"),
    ({"skip_nonfinite": "true"}, "skip_nonfinite must be True or False but got 'true'"),
    ({"shard_group": 2, "skip_nonfinite": True}, "shard_group must be a group of mx.distributed"),
    ({"decay_filter": 3}, "decay_filter must be a callable or regular expressions but got 3"),
    ({"decay_filter": ["a", 7]}, "decay_filter must be a callable or regular expressions but got"),
    ({"decay_filter": []}, "decay_filter must have a regular expression but got none"),
    ({"decay_filter": "("}, r"decay_filter must be regular expressions but got '\('"),
    ({"betas": [0.9]}, r"betas must be two numbers but got \[0.9\]"),
    ({"betas": None}, "betas must be two numbers but got None"),
    ({"betas": [0.9, "high"]}, "beta2 must be a number but got 'high'"),
    ({"learning_rate": 1j}, "learning_rate must be real but got 1j"),
    ({"learning_rate": HUGE}, "learning_rate must be finite but got 1000"),
    ({"learning_rate": None}, "learning_rate must be a number but got None"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS, ids=lambda x: str(x)[:40])
def test_the_constructor_rejects_what_does_not_fit(options, message):
    with pytest.raises((ValueError, TypeError), match=r"\[AdamW\] " + message):
        fused.AdamW(**{"learning_rate": 0.1, **options})


UNKNOWN = [("Adam", "weight_decay"), ("Adam", "decay_filter"), ("Adam", "max_gradnorm")]
UNKNOWN += [("AdamW", "max_gradnorm"), ("AdamW", "skip_non_finite"), ("AdamW", "lr")]


@pytest.mark.parametrize(("kind", "name"), UNKNOWN)
def test_an_unknown_option_is_python_s_own_error(kind, name):
    with pytest.raises(TypeError, match=rf"{kind}.__init__\(\) got an unexpected keyword argument '{name}'"):
        getattr(fused, kind)(0.1, **{name: 0.1})


def test_options_may_be_what_yaml_says():
    """Which reads 1e-3 as a string."""
    optimizer = fused.AdamW(
        learning_rate="1e-3", betas=["0.9", 0.95], eps="1e-6", weight_decay="1e-1", max_grad_norm="1e0",
        state_dtype="bfloat16", seed=3, skip_nonfinite=True, decay_filter=["w"],
    )  # fmt: skip
    reference = fused.AdamW(
        1e-3, [0.9, 0.95], 1e-6, 0.1, max_grad_norm=1.0, state_dtype=mx.bfloat16, seed=3, skip_nonfinite=True
    )  # fmt: skip
    parameters = {"w": mx.array([1.0, 2.0])}
    new = [o.apply_gradients(parameters, parameters)["w"] for o in (optimizer, reference)]
    assert mx.array_equal(*new)
    assert fused.AdamW(0.1, max_grad_norm=None)._options == fused.AdamW(0.1)._options


def _grown_answer(path, x):
    return "yes"


# Options, what is wrong with the first update, and what it is told.
BAD_USES = {
    "float16 with master weights": (
        {"master_weights": True}, lambda p: {"w": p["w"].astype(mx.float16)},
        "parameter of w must be bfloat16 or float32 for master_weights but got float16"),
    "an answer that is no bool": (
        {"decay_filter": _grown_answer}, lambda p: p, "decay_filter must return True or False but got 'yes' for w"),
    "a parameter named as a record": (
        {"max_grad_norm": 1.0}, lambda p: {"grad_norm": p["w"]}, "parameters must not be named 'grad_norm'"),
    "a parameter named as the count": (
        {"skip_nonfinite": True}, lambda p: {"skipped": p["w"]}, "parameters must not be named 'skipped'"),
    "a gradient that is no array": (
        {"max_grad_norm": 1.0, "skip_nonfinite": True}, lambda p: {"w": "no"},
        "gradient of w must be an array but got 'no'"),
    "a gradient of another shape": (
        {"max_grad_norm": 1.0, "skip_nonfinite": True}, lambda p: {"w": mx.ones(5)}, "gradient of w must have"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_USES)
def test_what_an_option_rejects_changes_nothing(case, device):
    """Neither before the first step nor after one; the optimizer goes on as one that was never asked."""
    options, spoil, message = BAD_USES[case]
    good = {"w": mx.array([[1.0, 2.0], [3.0, 4.0]])}
    bad = spoil(good)
    is_gradient = any(not isinstance(x, mx.array) or x.shape != (2, 2) for x in bad.values())
    optimizer, reference = fused.AdamW(0.1, **options), fused.AdamW(0.1, **options)
    # Whether these options accept any step.
    is_usable = "decay_filter" not in options
    for _ in range(2):
        before = tree_map(lambda x: x, optimizer.state)
        with pytest.raises((ValueError, TypeError), match=message):
            optimizer.apply_gradients(bad, good if is_gradient else bad)
        assert_same_tree(optimizer.state, before)
        if is_usable:
            new, expected = (o.apply_gradients(good, good) for o in (optimizer, reference))
            assert_same_tree(new, expected)
            assert_same_tree(optimizer.state, reference.state)


@pytest.mark.parametrize("option", ["max_grad_norm", "skip_nonfinite"])
def test_init_rejects_parameters_named_as_a_record(option):
    name = {"max_grad_norm": "grad_norm", "skip_nonfinite": "skipped"}[option]
    optimizer = fused.AdamW(0.1, **{option: True if option == "skip_nonfinite" else 1.0})
    with pytest.raises(ValueError, match=f"parameters must not be named '{name}'"):
        optimizer.init({name: mx.ones(3)})
    optimizer.init({"w": mx.ones(3)})
    fused.AdamW(0.1).init({name: mx.ones(3)})


def test_numpy_parameters_without_a_state_are_taken(device):
    parameters = {"a": np.full(3, 0.5, np.float32), "b": mx.full((3,), 0.5)}
    gradients = {k: mx.full((3,), 0.1) for k in parameters}
    optimizers = [module.AdamW(0.1) for module in (fused, optim)]
    results = [tree_map(mx.array, x.apply_gradients(gradients, parameters)) for x in optimizers]
    assert_same_tree(*results)
    assert_same_tree(*(x.state for x in optimizers))


def test_numpy_parameters_and_moments_are_taken(device):
    parameters = {"a": np.full(3, 0.5, np.float32), "b": mx.full((3,), 0.5)}
    gradients = {k: mx.full((3,), 0.1) for k in parameters}
    states = []
    for module in (fused, optim):
        optimizer = module.AdamW(0.1)
        moments = {"m": np.full(3, 0.2, np.float32), "v": np.full(3, 0.3, np.float32)}
        optimizer.state.update({k: dict(moments) for k in parameters})
        new = optimizer.apply_gradients(gradients, parameters)
        optimizer.state["b"].update(moments)  # NumPy arrays amid a run
        new = optimizer.apply_gradients(gradients, new)
        # MLX hands a NumPy parameter back as one.
        states.append(tree_map(mx.array, {"new": new, "state": optimizer.state}))
    assert_same_tree(*states)
    x = np.linspace(0.1, 0.5, 3, dtype=np.float32)
    for y in (x, x[::-1]):
        actual = fused.adam_update(y, mx.ones(3), y, y, 0.1)
        expected = fused.adam_update(*map(mx.array, (y.copy(), np.ones(3), y.copy(), y.copy())), 0.1)
        for a, e in zip(actual, expected, strict=True):
            np.testing.assert_array_equal(np.array(a), np.array(e))


@pytest.mark.parametrize("fresh", [True, False], ids=["first step", "later step"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda g: g["a"].update(w=None), "gradient of a.w must be an array but got None"),
        (lambda g: g["a"].update(w=np.ones(3)), "gradient of a.w must be an array but got array"),
        (lambda g: g["a"].update(w="no"), "gradient of a.w must be an array but got 'no'"),
        (lambda g: g.update(a=mx.ones(3)), "of a must be an array but got|must have what"),
        (lambda g: g["a"].update(w={"x": mx.ones(3)}), "parameters must have .* nothing at a.w.x"),
        (lambda g: g.update(nope=mx.ones(3)), "parameters must have .* nothing at nope"),
        (lambda g: g["l"].append(mx.ones(3)), "parameters must have .* nothing at l.1"),
        (lambda g: g["a"].update(w=mx.ones(4)), "gradient of a.w must have the parameter's shape"),
    ],
    ids=["None", "numpy", "text", "leaf for a dict", "dict for a leaf", "key", "index", "shape"],
)
def test_a_rejected_step_is_rolled_back(fresh, spoil, message):
    """Whatever is wrong: step, schedule and state stay, and the optimizer can go on."""
    schedule = optim.exponential_decay(0.1, 0.5)
    optimizer, reference = fused.AdamW(schedule), fused.AdamW(schedule)
    parameters = {"a": {"w": mx.ones(3)}, "l": [mx.ones(3)]}
    gradients = tree_map(lambda p: p * 0.2, parameters)
    if not fresh:
        for o in (optimizer, reference):
            o.apply_gradients(gradients, parameters)
    before = tree_map(lambda x: x, optimizer.state)
    bad = tree_map(lambda x: x, gradients)
    spoil(bad)
    with pytest.raises((ValueError, TypeError), match=message):
        optimizer.apply_gradients(bad, parameters)
    assert_same_tree(optimizer.state, before)
    new = optimizer.apply_gradients(gradients, parameters)
    assert_same_tree(new, reference.apply_gradients(gradients, parameters))
    assert_same_tree(optimizer.state, reference.state)


class Doubled(fused.Adam):
    """A subclass with a rule of its own, which goes from leaf to leaf."""

    def apply_single(self, gradient, parameter, state):
        return super().apply_single(gradient * 2, parameter, state)


@pytest.mark.parametrize("fresh", [True, False], ids=["first step", "later step"])
def test_a_rejected_step_of_a_subclass_is_rolled_back(fresh):
    optimizer, reference = Doubled(0.1), Doubled(0.1)
    parameters = {"a": mx.ones(2), "b": mx.ones(3)}
    if not fresh:
        for o in (optimizer, reference):
            o.apply_gradients(parameters, parameters)
    before = tree_map(lambda x: x, optimizer.state)
    with pytest.raises(ValueError, match="must have the parameter's shape"):
        optimizer.apply_gradients({"a": mx.ones(2), "b": mx.ones(4)}, parameters)
    assert_same_tree(optimizer.state, before)
    new = optimizer.apply_gradients(parameters, parameters)
    assert_same_tree(new, reference.apply_gradients(parameters, parameters))


@pytest.mark.parametrize("fresh", [True, False], ids=["first step", "later step"])
def test_an_error_after_the_moments_were_written_takes_them_back(fresh, monkeypatch):
    optimizer = fused.AdamW(optim.exponential_decay(0.1, 0.5), max_grad_norm=1.0, skip_nonfinite=True)
    parameters = {"a": mx.ones(3), "b": [mx.ones(2)]}
    if not fresh:
        optimizer.apply_gradients(parameters, parameters)
    before = flat(optimizer.state)

    def interrupted(clipping, state):
        assert fresh or state["a"]["m"] is not before["a.m"], "the moments are not written yet"
        raise KeyboardInterrupt

    monkeypatch.setattr(_clipping.Clipping, "record", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.apply_gradients(parameters, parameters)
    after = flat(optimizer.state)
    assert after.keys() == before.keys() and all(after[k] is x for k, x in before.items())


def test_the_state_of_a_subclass_is_that_of_its_parameters():
    """Whatever dtype the gradients of its first step have."""
    optimizer = Doubled(0.1)
    optimizer.apply_gradients({"w": mx.ones(2)}, {"w": mx.ones(2, mx.bfloat16)})
    assert optimizer.state["w"]["m"].dtype == mx.bfloat16
    assert fused.stock_state(optimizer)["w"]["m"].dtype == mx.bfloat16


@pytest.mark.parametrize("wrong", [None, "no"])
def test_what_is_no_array_is_named_by_its_path_to_a_subclass_too(wrong):
    parameters = {"a": {"w": mx.ones(2)}}
    with pytest.raises(TypeError, match="gradient of a.w must be an array but got"):
        Doubled(0.1).apply_gradients({"a": {"w": wrong}}, parameters)


class Needy(tuple):
    """Cannot be made of a list of its items."""

    def __new__(cls, a, b):
        return tuple.__new__(cls, (a, b))


def test_a_tree_that_cannot_be_rebuilt_leaves_the_moments_alone():
    optimizer = fused.Adam(0.1)
    optimizer.init({"l": [mx.ones(2), mx.ones(3)]})
    before = tree_map(lambda x: x, optimizer.state)
    parameters = {"l": Needy(mx.ones(2), mx.ones(3))}
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        optimizer.apply_gradients(parameters, parameters)
    assert_same_tree(optimizer.state, before)


def test_an_interrupted_schedule_is_rolled_back():
    def interrupt(step):
        if step.item() > 0:
            raise KeyboardInterrupt
        return mx.array(0.1)

    optimizer = fused.Adam(interrupt)
    optimizer.apply_gradients({"w": mx.ones(3)}, {"w": mx.ones(3)})
    with pytest.raises(KeyboardInterrupt):
        optimizer.apply_gradients({"w": mx.ones(3)}, {"w": mx.ones(3)})
    assert optimizer.step.item() == 1


def test_float16_parameters_learn_from_small_gradients():
    """float16 moments lose v below gradients of 0.005, and the weight jumps by learning_rate * m / eps."""
    parameters, gradients = {"w": mx.ones(8, mx.float16)}, {"w": mx.full(8, 1e-3, mx.float16)}
    exact = {"w": mx.ones(8)}
    optimizer, reference = fused.Adam(1e-3), optim.Adam(1e-3)
    for _ in range(20):
        parameters = optimizer.apply_gradients(gradients, parameters)
        exact = reference.apply_gradients({"w": gradients["w"].astype(mx.float32)}, exact)
    assert parameters["w"].dtype == mx.float16
    np.testing.assert_allclose(np.array(parameters["w"].astype(mx.float32)), np.array(exact["w"]), atol=5e-3)


def test_float16_moments_that_were_loaded_become_bfloat16():
    reference = optim.Adam(0.1)
    parameters = {"w": mx.ones(4, mx.float16)}
    gradients = {"w": mx.full((4,), 0.5, mx.float16)}
    reference.apply_gradients(gradients, parameters)
    assert reference.state["w"]["v"].dtype == mx.float16
    optimizer = fused.Adam(0.1)
    optimizer.state = reference.state
    optimizer.apply_gradients(gradients, parameters)
    assert optimizer.state["w"]["m"].dtype == optimizer.state["w"]["v"].dtype == mx.bfloat16
    np.testing.assert_allclose(np.array(optimizer.state["w"]["m"].astype(mx.float32)), 0.05 + 0.9 * 0.05, rtol=1e-2)


@pytest.mark.parametrize("learning_rate", [1, 0.1, np.float32(0.1), np.float64(0.1), mx.array([0.1])])
def test_kinds_of_learning_rate(learning_rate):
    x = mx.ones(3)
    actual = fused.adam_update(x, x, x, x, learning_rate)[0]
    value = float(np.array(learning_rate).reshape(()))
    np.testing.assert_allclose(np.array(actual), 1 - value, rtol=1e-5)
