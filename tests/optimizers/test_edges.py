"""What people do to optimizers beside training: change options, set state by hand, subclass, unfreeze, print."""

import threading
import warnings

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_map

import mlx_fused_adam as fused
from mlx_fused_adam import _backends
from support import training
from support.arrays import assert_same_bits, random

pytestmark = pytest.mark.usefixtures("device")

SETTINGS = dict(learning_rate=1e-2, bias_correction=True)


def tree(seed: int = 0, dtype=mx.float32):
    rng = np.random.default_rng(seed)
    return {"w": random(rng, (64, 70)).astype(dtype), "b": random(rng, (9,)).astype(dtype)}


def train(optimizer, parameters, seeds):
    dtype = parameters["w"].dtype
    return training.train(optimizer, parameters, [tree(seed, dtype) for seed in seeds])


# ---- Options ----


@pytest.mark.parametrize(("name", "value"), [
    ("state_dtype", "int8"), ("state_dtype", "int4"), ("state_dtype", "bfloat16"), ("stochastic_rounding", True),
    ("seed", 7), ("master_weights", True), ("max_grad_norm", 0.1), ("skip_nonfinite", True), ("decay_filter", ["b"]),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_an_option_that_is_assigned_counts_from_the_next_update(name, value, dtype):
    """As if the state of the optimizer before had been given to a new one with that option."""
    optimizer, reference = fused.AdamW(**SETTINGS), fused.AdamW(**SETTINGS, **{name: value})
    parameters = train(optimizer, tree(0, dtype), [1, 2])
    assert getattr(optimizer, name) in (None, False, 0) and getattr(reference, name) == value
    reference.state = training.copied(optimizer.state)
    setattr(optimizer, name, value)
    assert getattr(optimizer, name) == value
    found, expected = (train(o, parameters, [3, 4]) for o in (optimizer, reference))
    assert_same_bits(found, expected)
    assert_same_bits(optimizer.state, reference.state)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("state_dtype", "int5", "state_dtype must be"), ("max_grad_norm", -1, "max_grad_norm must be greater than 0"),
    ("skip_nonfinite", 1, "skip_nonfinite must be True or False"),
    ("decay_filter", "(", "decay_filter must be regular"), ("master_weight_bits", 16, "must be 32 or 24 but got 16"),
    ("shard_group", 1, "shard_group must be a group"),
])  # fmt: skip
def test_a_bad_option_that_is_assigned_is_an_error_and_changes_nothing(name, value, message):
    optimizer = fused.AdamW(
        **SETTINGS, state_dtype="bfloat16", max_grad_norm=1.0, skip_nonfinite=True, decay_filter="w"
    )
    before = getattr(optimizer, name)
    with pytest.raises((ValueError, TypeError), match=message):
        setattr(optimizer, name, value)
    assert getattr(optimizer, name) is before


def test_an_option_that_is_taken_back_leaves_the_state():
    optimizer = fused.Adam(**SETTINGS, max_grad_norm=1.0, skip_nonfinite=True)
    parameters = train(optimizer, tree(), [1])
    assert {"grad_norm", "skipped"} < set(optimizer.state)
    optimizer.max_grad_norm, optimizer.skip_nonfinite = None, False
    train(optimizer, parameters, [2])
    assert not {"grad_norm", "skipped"} & set(optimizer.state)


@pytest.mark.parametrize(
    "changes", [{"state_dtype": "int8"}, {"state_dtype": "float32"}, {"master_weights": True}], ids=str
)
def test_an_assigned_option_is_for_parameters_without_a_gradient_too(changes):
    """The next update converts the whole state, so that the one after it meets no form of before."""
    optimizer, reference = fused.AdamW(**SETTINGS), fused.AdamW(**SETTINGS)
    parameters = tree(0, mx.bfloat16)
    for o in (optimizer, reference):
        o.init(parameters)
        for name, value in changes.items():
            setattr(o, name, value)
    reference.init(parameters)
    for name in ("b", "w"):
        gradients = {name: parameters[name]}
        found, expected = (o.apply_gradients(gradients, parameters) for o in (optimizer, reference))
        assert_same_bits(found, expected)
        assert_same_bits(optimizer.state, reference.state)


def test_an_assigned_option_takes_gradients_of_the_first_layers():
    """A list that is shorter than the state's; mlx.optimizers takes it, too, unless its state was assigned."""
    parameters = [{"w": mx.ones((2, 3))}, {"w": mx.ones(3)}]
    optimizer, reference = fused.Adam(1e-2), optim.Adam(1e-2)
    for o in (optimizer, reference):
        o.init({"layers": parameters})
    optimizer.state_dtype = "float32"
    results = [o.apply_gradients({"layers": parameters[:1]}, {"layers": parameters}) for o in (optimizer, reference)]
    assert_same_bits(*results)
    assert_same_bits(optimizer.state, reference.state)


def test_an_optimizer_prints_what_it_is(monkeypatch, backend_name):
    monkeypatch.setattr(_backends, "_known", {})
    optimizer = fused.AdamW(1e-3, state_dtype="int8", decay_filter=["w"])
    text = (
        "AdamW(learning_rate=0.001, betas=[0.9, 0.999], eps=1e-08, bias_correction=False, state_dtype='int8', "
        "weight_decay=0.01, decay_filter=['w'])"
    )
    assert repr(optimizer) == text and _backends._known == {}  # no kernel was run for it
    assert optimizer.backend == backend_name and repr(optimizer) == f"{text} on {backend_name}"
    assert repr(fused.Adam(lambda step: 0.1)).startswith("Adam(learning_rate='schedule', betas=")


def test_an_optimizer_prints_itself_in_any_state():
    printed = []
    optimizer = fused.Adam(1e-2)
    step = mx.compile(lambda x: printed.append(repr(optimizer)) or x, inputs=optimizer.state)
    step(mx.ones(1))
    optimizer.learning_rate = mx.ones(2)
    printed.append(repr(optimizer))
    optimizer.state = None
    printed += [repr(optimizer), repr(object.__new__(fused.AdamW))]
    assert all("Adam object at" in x or "AdamW object at" in x for x in printed), printed


@pytest.mark.parametrize("call", ["init", "apply_gradients", "update", "MultiOptimizer"])
@pytest.mark.parametrize(
    ("options", "message"),
    [({"master_weights": True}, "has no effect"), ({"decay_filter": "lienar"}, "matches none")],
    ids=["effect", "filter"],
)
def test_a_warning_names_the_line_that_called(options, message, call):
    optimizer = fused.AdamW(**SETTINGS, **options)
    model = nn.Linear(4, 4)
    gradients = tree_map(mx.ones_like, model.parameters())
    with pytest.warns(UserWarning, match=message) as told:
        if call == "init":
            optimizer.init(gradients)
        elif call == "apply_gradients":
            optimizer.apply_gradients(gradients, model.parameters())
        elif call == "update":
            optimizer.update(model, gradients)
        else:
            fused.MultiOptimizer([optimizer]).update(model, gradients)
    assert [warning.filename for warning in told] == [__file__]


@pytest.mark.parametrize("options", [{"master_weights": True}, {"stochastic_rounding": True}], ids=str)
def test_an_option_without_an_effect_is_told_once(options):
    optimizer = fused.AdamW(**SETTINGS, **options)
    with pytest.warns(UserWarning, match=f"{next(iter(options))} has no effect: no parameter is bfloat16") as told:
        parameters = train(optimizer, tree(), [1])
        optimizer.init(parameters)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(fused.AdamW(**SETTINGS, **options), tree(0, mx.bfloat16), [1])
        if "stochastic_rounding" in options:  # which the state's dtype gives something to do
            train(fused.AdamW(**SETTINGS, **options, state_dtype="bfloat16"), tree(), [1])


# ---- State ----


def test_numbers_in_the_state_become_arrays(tmp_path):
    for kind in (float, np.float32, mx.array):
        optimizer, reference = fused.Adam(lambda step, kind=kind: kind(0.1)), fused.Adam(0.1)
        assert_same_bits(train(optimizer, tree(), [1]), train(reference, tree(), [1]))
        assert_same_bits(optimizer.state, reference.state)
        fused.save_optimizer(tmp_path / "o", optimizer)
    optimizer, reference = fused.Adam(**SETTINGS), fused.Adam(**SETTINGS)
    optimizer.state["step"], optimizer.state["learning_rate"] = 5, np.float64(0.02)
    reference.state["step"], reference.state["learning_rate"] = mx.array(5, mx.uint64), mx.array(0.02)
    fused.save_optimizer(tmp_path / "o", optimizer)
    assert_same_bits(train(optimizer, tree(), [1]), train(reference, tree(), [1]))
    assert_same_bits(optimizer.state, reference.state)


@pytest.mark.parametrize("state", [None, []], ids=str)
def test_a_state_that_is_no_dict_is_named(state):
    optimizer = fused.Adam(1e-2)
    optimizer.state = state
    with pytest.raises(TypeError, match="state must be a dict but got"):
        optimizer.apply_gradients(tree(), tree())


def test_leaves_of_other_dtypes_train_as_with_mlx():
    """A quantized model's integers are in the parameters; complex parameters have gradients."""
    parameters = {"w": mx.ones((4, 8)), "packed": mx.ones((4,), mx.uint32), "z": mx.ones((3,), mx.complex64)}
    gradients = {"w": mx.full((4, 8), 0.5), "z": mx.full((3,), 0.5 + 0.5j)}
    found, expected = [], []
    for optimizer, results in ((fused.AdamW(1e-2), found), (optim.AdamW(1e-2), expected)):
        optimizer.init(parameters)
        new = parameters
        for _ in range(3):
            new = new | optimizer.apply_gradients(gradients, new)
        results += [new, optimizer.state]
    for a, b in zip(found, expected, strict=True):
        assert_same_bits(a, b)


def test_a_quantized_model_with_lora_can_be_initialized():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    nn.quantize(model)
    optimizer = fused.Adam(1e-2)
    optimizer.init(model.parameters())


def test_a_subclass_keeps_the_state_that_it_makes():
    class Own(fused.Adam):
        def init_single(self, parameter, state):
            state["m"] = mx.zeros(parameter.shape, mx.float32)
            state["average"] = [mx.array(parameter), mx.zeros((2, 3))]

        def apply_single(self, gradient, parameter, state):
            state["m"] = 0.9 * state["m"] + gradient
            return parameter - self.learning_rate * state["m"].astype(parameter.dtype)

    optimizer = Own(1e-2)
    parameters = tree(0, mx.bfloat16)
    optimizer.init(parameters)
    optimizer.apply_gradients(tree(1, mx.bfloat16), parameters)
    assert optimizer.state["w"]["m"].dtype == mx.float32 and "v" not in optimizer.state["w"]


@pytest.mark.parametrize("name", ["m", "v"])
def test_a_moment_that_a_subclass_makes_keeps_its_dtype(name):
    class Own(fused.Adam):
        def init_single(self, parameter, state):
            super().init_single(parameter, state)
            state[name] = mx.zeros(parameter.shape)

        def apply_single(self, gradient, parameter, state):
            return parameter - gradient

    optimizer = Own(1e-2)
    parameters = train(optimizer, tree(0, mx.bfloat16), [1])
    optimizer.seed = 3
    train(optimizer, parameters, [2])
    assert {k: x.dtype for k, x in optimizer.state["w"].items()} == {
        "m": mx.bfloat16,
        "v": mx.bfloat16,
        name: mx.float32,
    }


def test_a_rule_for_single_parameters_is_refused_where_it_would_need_paths():
    class Own(fused.AdamW):
        def apply_single(self, gradient, parameter, state):
            return super().apply_single(gradient, parameter, state)

    optimizer = Own(1e-2, decay_filter=lambda path, _: path == "w")
    with pytest.raises(
        ValueError, match="apply_single must be the package's own with .* decay_filter but got one of Own"
    ):
        optimizer.apply_gradients(tree(), tree())
    assert optimizer.step.item() == 0


@pytest.mark.parametrize(("before", "after"), [(mx.float32, mx.bfloat16), (mx.bfloat16, mx.float32)], ids=str)
@pytest.mark.filterwarnings("ignore:.*has no effect")
def test_parameters_of_another_dtype_need_init_with_master_weights(before, after):
    optimizer = fused.AdamW(1e-2, master_weights=True)
    train(optimizer, tree(0, before), [1])
    with pytest.raises(ValueError, match=r"\[AdamW\] state of . must hold .* remainder .* but got .* call init"):
        train(optimizer, tree(0, after), [2])
    optimizer.init(tree(0, after))
    train(optimizer, tree(0, after), [2])
    assert ("remainder" in optimizer.state["b"]) is (after == mx.bfloat16)


def test_a_subclass_may_have_its_own_init():
    class Own(fused.Adam):
        def init(self, parameters):
            super().init(parameters)
            self.state["best"] = mx.array(0.0)

    optimizer = Own(1e-2)
    train(optimizer, tree(), [1])
    assert optimizer.state["best"].item() == 0


def test_what_a_subclass_adds_stays_when_an_option_is_assigned():
    class Own(fused.Adam):
        def init_single(self, parameter, state):
            super().init_single(parameter, state)
            state["average"] = [mx.array(parameter)]

    optimizer, reference = Own(1e-2), fused.Adam(1e-2)
    for o in (optimizer, reference):
        parameters = train(o, tree(), [1])
        o.state_dtype = "int8"
        train(o, parameters, [2])
    for name, state in tree().items():
        assert_same_bits(optimizer.state[name].pop("average"), [state])
    assert_same_bits(optimizer.state, reference.state)


def test_a_subclass_of_adam_may_have_a_weight_decay_of_its_own():
    """As L2 regularization, which mlx.optimizers' Adam leaves to it."""
    results = []
    for kind in (fused.Adam, optim.Adam):

        class Regularized(kind):
            weight_decay = 0.5

            def apply_single(self, gradient, parameter, state):
                return super().apply_single(gradient + self.weight_decay * parameter, parameter, state)

        results.append(train(Regularized(1e-2), tree(), [1, 2]))
    assert_same_bits(*results)


def test_a_parameter_that_is_unfrozen_later_needs_init_and_is_told_so():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model.layers[0].freeze()
    optimizer = fused.Adam(1e-2)
    optimizer.init(model.trainable_parameters())
    model.unfreeze()
    gradients = model.trainable_parameters()
    with pytest.raises(ValueError, match=r"layers.0.*call init\(model.trainable_parameters\(\)\)"):
        optimizer.update(model, gradients)
    optimizer.init(model.trainable_parameters())
    model.about = {"name": "a module's own dicts and lists are no parameters", "sizes": [4, mx.float32]}
    optimizer.update(model, gradients)
    optimizer.state_dtype = "bfloat16"
    optimizer.update(model, gradients)


def test_a_first_update_in_another_thread():
    """A schedule's value is evaluated where it is made, since another thread could not."""
    if mx.default_device() != mx.cpu:
        pytest.skip("streams of the CPU belong to threads")
    optimizer = fused.Adam(optim.linear_schedule(0.1, 0.2, 10), skip_nonfinite=True)
    errors = []

    def run():
        try:
            with mx.stream(mx.new_stream(mx.cpu)):
                mx.eval(optimizer.apply_gradients({"w": mx.ones(3)}, {"w": mx.ones(3)}), optimizer.state)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert errors == [] and optimizer.step.item() == 1


# ---- Hyper-parameters ----


def test_hyper_parameters_may_be_arrays():
    arrays = fused.AdamW(mx.array(0.1), [mx.array(0.5), mx.array(0.75)], mx.array(0.25), mx.array(0.5))
    assert_same_bits(train(arrays, tree(), [1, 2]), train(fused.AdamW(0.1, [0.5, 0.75], 0.25, 0.5), tree(), [1, 2]))


@pytest.mark.parametrize("value", ["false", None, 0.0], ids=repr)
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_bias_correction_is_true_or_false(name, value):
    with pytest.raises(TypeError, match="bias_correction must be True or False"):
        getattr(fused, name)(0.1, bias_correction=value)


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_weight_decay_may_follow_a_schedule(is_compiled, tmp_path):
    """Bit for bit as with MLX's AdamW, whose weight decay is set before each step."""

    def schedule(step):
        return 0.1 * (step.astype(mx.float32) + 1)

    optimizer = fused.AdamW(1e-2, weight_decay=schedule)
    reference = optim.AdamW(1e-2)
    found = expected = tree()
    if is_compiled:
        found = training.copied(found)
        step = training.compiled(optimizer, found)
    for seed in range(1, 5):
        reference.weight_decay = schedule(reference.step)
        expected = reference.apply_gradients(tree(seed), expected)
        if is_compiled:
            step(tree(seed))
        else:
            found = optimizer.apply_gradients(tree(seed), found)
        mx.eval(found, expected)
        assert_same_bits(found, expected)
        assert optimizer.weight_decay is optimizer.state["weight_decay"]
    assert "weight_decay" not in fused.stock_state(optimizer)
    fused.save_optimizer(tmp_path / "o", optimizer)
    resumed = fused.AdamW(1e-2, weight_decay=schedule)
    fused.load_optimizer(tmp_path / "o", resumed)
    assert_same_bits(resumed.state, optimizer.state)
    with pytest.raises(ValueError, match=r"weight_decay \(file: 'schedule', optimizer: 0.01\)"):
        fused.load_optimizer(tmp_path / "o", fused.AdamW(1e-2))
    optimizer.weight_decay = 0.5
    assert optimizer.weight_decay == 0.5 and "weight_decay" not in optimizer.state


def test_a_skipped_step_leaves_the_schedule_of_weight_decay():
    optimizer = fused.AdamW(1e-2, weight_decay=lambda step: 0.1 * (step + 1), skip_nonfinite=True)
    parameters = train(optimizer, tree(), [1, 2])
    before = optimizer.state["weight_decay"].item()
    optimizer.apply_gradients({k: x * mx.nan for k, x in tree().items()}, parameters)
    assert optimizer.state["weight_decay"].item() == before


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_a_subclass_may_compute_its_weight_decay_from_the_state(is_compiled):
    class Scaled(fused.AdamW):
        @property
        def weight_decay(self):
            return self.learning_rate * 10

        @weight_decay.setter
        def weight_decay(self, x):
            pass

    optimizer, reference = Scaled(1e-2), fused.AdamW(1e-2, weight_decay=mx.array(1e-2) * 10)
    found, expected = training.copied(tree()), train(reference, tree(), [1, 2])
    if is_compiled:
        optimizer.init(found)
        step = training.compiled(optimizer, found)
        for seed in (1, 2):
            step(tree(seed))
    else:
        found = train(optimizer, found, [1, 2])
    assert_same_bits(found, expected)
