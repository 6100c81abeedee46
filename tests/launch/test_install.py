"""install(): every mlx.optimizers.Adam and AdamW that is built afterwards is fused, wherever its name came from;
undoable.
"""

import copy
import enum
import functools
import inspect
import pickle

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.optimizers import Adam as ImportedAdam
from mlx.optimizers.optimizers import AdamW as ImportedAdamW

import mlx_fused_adam as fused
from mlx_fused_adam import _reference, _self_check
from support import training
from support.arrays import all_bits, assert_same_bits, random
from support.processes import output_of_python

pytestmark = pytest.mark.usefixtures("device")

IN_A_DICT = {"adam": optim.Adam, "adamw": optim.AdamW}
PARTIAL = functools.partial(optim.AdamW, 1e-3, weight_decay=0.1)


class Choice(enum.Enum):
    ADAM = optim.Adam
    ADAMW = optim.AdamW


class Subclass(optim.AdamW):
    pass


BUILDERS = {
    "mlx.optimizers.Adam": lambda: optim.Adam(1e-3),
    "mlx.optimizers.AdamW": lambda: optim.AdamW(1e-3),
    "mlx.optimizers.optimizers.Adam": lambda: optim.optimizers.Adam(1e-3),
    "mlx.optimizers.optimizers.AdamW": lambda: optim.optimizers.AdamW(1e-3),
    "an imported Adam": lambda: ImportedAdam(1e-3),
    "an imported AdamW": lambda: ImportedAdamW(1e-3),
    "a dict's Adam": lambda: IN_A_DICT["adam"](1e-3),
    "a dict's AdamW": lambda: IN_A_DICT["adamw"](1e-3),
    "an Enum's Adam": lambda: Choice.ADAM.value(1e-3),
    "an Enum's AdamW": lambda: Choice.ADAMW.value(1e-3),
    "a partial AdamW": PARTIAL,
}


def train(optimizer, steps=3):
    """The bits of parameters and state after some steps."""
    rng = np.random.default_rng(0)
    parameters, *gradients = ({name: random(rng, (5, 7)) for name in "ab"} for _ in range(steps + 1))
    parameters = training.train(optimizer, parameters, gradients)
    return all_bits([parameters, optimizer.state])


@pytest.mark.parametrize("where", BUILDERS)
def test_every_optimizer_built_afterwards_is_fused(where):
    build = BUILDERS[where]
    fused_class = fused.AdamW if where.endswith("AdamW") else fused.Adam
    before = build()
    with fused.install():
        during = build()
    after = build()
    assert type(during) is fused_class and isinstance(during, type(before))
    assert type(before) is type(after) is fused_class.__mro__[2], where
    assert type(before).__module__ == "mlx.optimizers.optimizers"


def test_results_are_those_of_the_fused_optimizer(device):
    with fused.install():
        installed = optim.AdamW(1e-2, weight_decay=0.1, bias_correction=True)
    assert installed.backend == fused.AdamW(1e-2).backend
    assert_same_bits(train(installed), train(fused.AdamW(1e-2, weight_decay=0.1, bias_correction=True)))


def test_relatives_stay_what_they_are():
    with fused.install(max_grad_norm=1.0):
        for kind in (Subclass, optim.Adamax, optim.SGD, _reference.Adam, _reference.AdamW):
            assert type(kind(1e-3)) is kind
        assert type(fused.Adam(1e-3)) is fused.Adam
        train(Subclass(1e-2))
        # A fused optimizer that is built by name has the options that it was given and no others.
        assert "grad_norm" not in fused.AdamW(1e-3).state


def test_options_are_defaults():
    options = {"bias_correction": True, "weight_decay": 0.5, "decay_filter": ["a"], "eps": 1e-5}
    with fused.install(max_grad_norm=1.0, state_dtype="bfloat16", **options) as installation:
        adam, adamw = optim.Adam(1e-3), optim.AdamW(1e-3)
        named = optim.AdamW(1e-3, weight_decay=0.1, max_grad_norm=2.0)
        by_place = optim.AdamW(1e-3, [0.8, 0.9], 1e-6)
    assert installation.built == {"Adam": 1, "AdamW": 3}
    for optimizer in (adam, adamw):
        assert optimizer.bias_correction is True
        assert (optimizer._options.max_grad_norm, optimizer._options.state_dtype) == (1, "bfloat16")
        assert (optimizer.betas, optimizer.eps) == ([0.9, 0.999], 1e-5)
    assert adamw.weight_decay == 0.5 and adamw.decayed({"a": mx.zeros(1), "b": mx.zeros(1)}) == ["a"]
    assert (named.weight_decay, named._options.max_grad_norm) == (0.1, 2.0)
    assert (by_place.betas, by_place.eps, by_place.weight_decay) == ([0.8, 0.9], 1e-6, 0.5)
    assert "grad_norm" not in optim.Adam(1e-3).state


def test_the_last_installation_counts_until_it_ends():
    outer = fused.install(max_grad_norm=1.0)
    inner = fused.install(max_grad_norm=2.0)
    assert optim.Adam(1e-3)._options.max_grad_norm == 2.0
    outer.undo()
    assert optim.Adam(1e-3)._options.max_grad_norm == 2.0
    inner.undo()
    inner.undo()
    assert type(optim.Adam(1e-3)) is optim.Adam


def test_it_can_be_begun_again():
    installation = fused.install()
    for _ in range(2):
        with installation:
            assert type(optim.Adam(1e-3)) is fused.Adam
        assert type(optim.Adam(1e-3)) is optim.Adam


def own_rule(self, *args):
    raise AssertionError("of the program's own")


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (optim.Adam, "apply_single"),
        (optim.Adam, "init_single"),
        (optim.Optimizer, "apply_gradients"),
        (optim.Optimizer, "init"),
    ],
)
def test_a_class_with_a_rule_of_someone_s_own_stays(monkeypatch, place, name):
    monkeypatch.setattr(place, name, own_rule)
    with fused.install() as installation:
        optimizer = optim.Adam(1e-3)
        assert type(optim.AdamW(1e-3)) is optim.AdamW  # which calls Adam's
    assert type(optimizer) is optim.Adam and getattr(type(optimizer), name) is own_rule
    assert installation.kept == {"Adam": 1, "AdamW": 1} and not installation.built
    monkeypatch.undo()
    with fused.install():
        assert type(optim.Adam(1e-3)) is fused.Adam and type(optim.AdamW(1e-3)) is fused.AdamW


def test_a_rule_that_was_there_before_this_package_stays():
    program = """
import mlx.optimizers as optim
optim.Adam.apply_single = lambda self, gradient, parameter, state: parameter
import mlx_fused_adam as fused
with fused.install() as installation:
    print(type(optim.Adam(0.1)) is optim.Adam, type(optim.AdamW(0.1)) is optim.AdamW, dict(installation.kept))
"""
    assert output_of_python("-c", program).strip() == "True True {'Adam': 1, 'AdamW': 1}"


def test_what_stays_is_counted():
    with fused.install() as installation:
        Subclass(1e-3), Subclass(1e-3), optim.Adamax(1e-3), _reference.AdamW(1e-3), fused.Adam(1e-3)
        optim.AdamW(1e-3)
    assert installation.kept == {"Subclass": 2, "Adamax": 1}
    assert installation.built == {"AdamW": 1}


def test_it_ends_with_its_block_whatever_happens():
    originals = optim.Adam.__init__, optim.AdamW.__init__
    with pytest.raises(KeyError), fused.install():
        raise KeyError
    assert (optim.Adam.__init__, optim.AdamW.__init__) == originals


def test_who_wraps_the_classes_too_is_left_in_place(monkeypatch):
    installation = fused.install()
    installed = optim.Adam.__init__
    calls = []

    def wrapper(self, *args, **kwargs):
        calls.append(args)
        installed(self, *args, **kwargs)

    monkeypatch.setattr(optim.Adam, "__init__", wrapper)
    assert type(optim.Adam(1e-3)) is fused.Adam
    installation.undo()
    assert type(optim.Adam(1e-3)) is optim.Adam and len(calls) == 3
    monkeypatch.setattr(optim.Adam, "__init__", installed.__wrapped__)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"max_gradnorm": 1.0}, TypeError, "unexpected keyword argument 'max_gradnorm'"),
        ({"learning_rate": 1e-3}, TypeError, "'learning_rate', which the code sets itself"),
        ({"state_dtype": "int2"}, ValueError, "int2"),
        ({"bias_correction": "false"}, TypeError, "must be True or False"),
        ({"decay_filter": ["("]}, ValueError, "decay_filter"),
    ],
)
def test_a_bad_option_is_an_error_at_once_and_installs_nothing(options, error, message):
    with pytest.raises(error, match=message):
        fused.install(**options)
    assert type(optim.AdamW(1e-3)) is optim.AdamW


def test_an_error_of_the_code_s_own_names_the_class():
    with fused.install() as installation:
        with pytest.raises(ValueError, match=r"Adam.*1\.5"):
            optim.Adam(1e-3, betas=[1.5, 0.9])
        with pytest.raises(TypeError):
            optim.AdamW()
    assert not installation.built


def test_pickles_and_copies_of_mlx_optimizers_stay_what_they_are():
    before = optim.AdamW(1e-2)
    train(before)
    pickled = pickle.dumps(before)
    expected = train(before)
    with fused.install(max_grad_norm=1.0):
        loaded = pickle.loads(pickled)
        copied = copy.deepcopy(loaded)
        again = pickle.loads(pickle.dumps(loaded))
        for optimizer in (loaded, copied, again):
            assert type(optimizer) is optim.AdamW
            assert_same_bits(train(optimizer), expected)


def test_pickles_of_replaced_optimizers_load_with_and_without():
    with fused.install(max_grad_norm=1.0):
        optimizer = optim.AdamW(1e-2)
        train(optimizer)
        pickled = pickle.dumps(optimizer)
        inside = pickle.loads(pickled)
    outside = pickle.loads(pickled)
    expected = train(optimizer)
    for loaded in (inside, outside):
        assert type(loaded) is fused.AdamW
        assert_same_bits(train(loaded), expected)


@pytest.mark.parametrize("kind", [optim.Adam, optim.AdamW])
def test_signatures_and_docstrings_do_not_change(kind):
    before = inspect.signature(kind), kind.__init__.__doc__, kind.__doc__
    with fused.install():
        assert (inspect.signature(kind), kind.__init__.__doc__, kind.__doc__) == before


def test_updates_are_counted_when_they_are_run(device, extension):
    def count():
        mx.synchronize()
        return sum(extension.updated_tensors())

    parameters = {name: mx.ones((3, 5)) for name in "abc"}
    gradients = {name: mx.ones((3, 5)) for name in "abc"}
    optimizer = fused.Adam(1e-2)
    optimizer.init(parameters)
    assert optimizer.backend  # checked before, and a check is no update
    start = count()
    optimizer.apply_gradients(gradients, parameters)
    assert count() == start, "built, not run"
    mx.eval(optimizer.apply_gradients(gradients, parameters), optimizer.state)
    # The first step's moments are among what the second one needs.
    assert count() == start + 6

    state = [parameters, optimizer.state]

    @functools.partial(mx.compile, inputs=state, outputs=state)
    def step():
        parameters.update(optimizer.apply_gradients(gradients, parameters))

    start = count()
    for i in range(1, 5):
        step()
        mx.eval(state)
        assert count() == start + 3 * i


def test_a_self_check_is_no_update(device, extension, monkeypatch):
    # Its stream is this extension's, not that of another which the suite has loaded.
    monkeypatch.setattr(_self_check, "_streams", {})
    before = extension.updated_tensors()
    kind = mx.default_device().type
    assert _self_check.run(extension, kind, (mx.float32,) * 3) is None
    mx.synchronize()
    assert extension.updated_tensors() == before


def test_a_self_check_compares_with_mlx_under_install(device, extension):
    with fused.install(state_dtype="bfloat16", max_grad_norm=1e-3):
        assert _self_check.run(extension, mx.default_device().type, (mx.float32,) * 3) is None


def test_what_is_active_can_be_told_and_ended_without_its_handle(capfd):
    assert fused.installed() is None
    first = fused.install(max_grad_norm=1.0, eps=1e-6)
    fused.install(max_grad_norm=2.0)  # its handle is lost
    assert fused.installed() == {"max_grad_norm": 2.0, "eps": 1e-6}
    optimizer, another = optim.Adam(0.1), optim.Adam(0.1)
    assert type(optimizer) is type(another) is fused.Adam and optimizer.eps == 1e-6
    optimizer.update(model := nn.Linear(2, 2), {"weight": mx.ones((2, 2)), "bias": mx.ones(2)})
    mx.eval(model.parameters(), optimizer.state)
    assert "grad_norm" in optimizer.state
    assert repr(first) == "<install(max_grad_norm=1.0, eps=1e-06), active>"
    fused.uninstall()
    assert fused.installed() is None and type(optim.Adam(0.1)) is optim.Adam
    assert repr(first).endswith("ended>")
    first.undo()
    fused.uninstall()
    # Once, whatever was built.
    said = capfd.readouterr().err.splitlines()
    assert said == [
        "mlx-fused-adam: mlx.optimizers.Adam is built as mlx_fused_adam.Adam from here on, "
        "by <install(max_grad_norm=2.0), active>"
    ]


def test_an_option_that_nothing_took_is_told():
    with fused.install(weight_decay=0.1, eps=1e-6) as installation:
        assert installation.unused == []
        optim.Adam(0.1)
        assert installation.unused == ["weight_decay"]
        optim.AdamW(0.1)
        assert installation.unused == []


def test_a_module_of_mlx_that_was_reloaded_is_found_by_the_next_install():
    program = """
import importlib, mlx.core as mx, mlx.optimizers as optim, mlx.optimizers.optimizers as module, mlx_fused_adam as fused
fused.install()
importlib.reload(module)
importlib.reload(optim)
fused.uninstall()
fused.install()
print(type(optim.Adam(0.1)).__module__)
"""
    assert output_of_python("-c", program).strip() == "mlx_fused_adam._optimizers"


def test_parts_of_a_multi_optimizer_are_clipped_once_by_the_norm_of_all():
    parameters = {"a": mx.zeros(1), "b": mx.zeros(1)}
    gradients = {"a": mx.array([3.0]), "b": mx.array([4.0])}
    with fused.install(max_grad_norm=1.0):
        optimizer = optim.MultiOptimizer([optim.Adam(0.1), optim.SGD(1.0)], [lambda path, _: path == "a"])
    assert type(optimizer) is fused.MultiOptimizer and type(optimizer.optimizers[0]) is fused.Adam
    new = optimizer.apply_gradients(gradients, parameters)
    assert optimizer.state["grad_norm"].item() == 5
    np.testing.assert_allclose(np.array(new["b"]), -0.8, rtol=1e-6)
    assert type(optim.MultiOptimizer([optim.SGD(0.1)])) is optim.MultiOptimizer
