"""save_optimizer and load_optimizer of a MultiOptimizer: one file for all parts, those of mlx.optimizers among them."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_fused_adam as fused
from support.arrays import all_bits, assert_same_bits, random
from support.training import copied, train

pytestmark = pytest.mark.usefixtures("device")

BOTH = dict(max_grad_norm=2.0, skip_nonfinite=True)


def in_embed(path: str, _: mx.array) -> bool:
    return path == "embed"


def in_layers(path: str, _: mx.array) -> bool:
    return path.startswith("layers")


def decaying(step: mx.array) -> mx.array:
    return 0.1 / (step.astype(mx.float32) + 1)


def tree(rng: np.random.Generator) -> Any:
    layers = [{"weight": random(rng, (8, 12))}, {"weight": random(rng, (8, 12))}]
    return {"embed": random(rng, (70, 96)), "layers": layers, "head": random(rng, (5,))}


def make(other: Any = None, **options: Any) -> fused.MultiOptimizer:
    other = optim.Muon(1e-2) if other is None else other
    parts = [fused.AdamW(decaying, state_dtype="int8", weight_decay=0.1), other, fused.Adam(1e-2, seed=3)]
    return fused.MultiOptimizer(parts, [in_embed, in_layers], **BOTH | options)


def steps(rng: np.random.Generator) -> list[Any]:
    bad = tree(rng) | {"head": mx.full((5,), math.nan)}
    return [tree(rng), bad, tree(rng), tree(rng)]


def rejected(path: Any, message: str, optimizer: Any, **arguments: Any) -> None:
    """Raises, and leaves the optimizer and all its parts as they were."""
    before, shown = all_bits(optimizer.state), repr(optimizer)
    with pytest.raises(ValueError, match=message):
        fused.load_optimizer(path, optimizer, **arguments)
    assert_same_bits(all_bits(optimizer.state), before)
    assert repr(optimizer) == shown


OTHERS = {
    "Muon": lambda: optim.Muon(1e-2),
    "Lion": lambda: optim.Lion(decaying),
    "SGD": lambda: optim.SGD(1e-2, momentum=0.9),
    "Adafactor": lambda: optim.Adafactor(beta_1=0.9),
    "MLX's AdamW": lambda: optim.AdamW(decaying),
    "parts of parts": lambda: optim.MultiOptimizer(
        [fused.Adam(decaying, state_dtype="bfloat16"), optim.Lion(1e-2)], [lambda path, _: "0" in path]
    ),
}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("is_initialized", [False, True], ids=["fresh", "initialized"])
def test_a_resumed_run_ends_with_the_same_bits(other, is_initialized, tmp_path):
    rng = np.random.default_rng(0)
    start, gradients = tree(rng), steps(rng)
    optimizer = make(OTHERS[other]())
    parameters = train(optimizer, start, gradients[:2])
    fused.save_optimizer(tmp_path / "o", optimizer)
    resumed = make(OTHERS[other]())
    if is_initialized:
        resumed.init(start)
    captured = resumed.state
    fused.load_optimizer(tmp_path / "o", resumed)
    assert resumed.state is captured
    assert_same_bits(resumed.state, optimizer.state)
    assert resumed.state["skipped"].item() == 1
    found, expected = (train(o, parameters, gradients[2:]) for o in (resumed, optimizer))
    assert_same_bits(found, expected)
    assert_same_bits(resumed.state, optimizer.state)


def test_a_compiled_step_goes_on_with_a_loaded_state(tmp_path):
    rng = np.random.default_rng(1)
    start, gradients = tree(rng), steps(rng)
    optimizer = make()
    parameters = train(optimizer, start, gradients[:2])
    fused.save_optimizer(tmp_path / "o", optimizer)
    expected = train(optimizer, parameters, gradients[2:], is_compiled=True)
    resumed = make()
    resumed.init(start)
    held = copied(start)
    state = [held, resumed.state]

    def update(g: Any) -> None:
        held.update(resumed.apply_gradients(g, held))

    step = mx.compile(update, inputs=state, outputs=state)
    step(gradients[3])
    fused.load_optimizer(tmp_path / "o", resumed)
    resumed.init(start)
    held.update(parameters)
    for g in gradients[2:]:
        step(g)
    assert_same_bits(held, expected)
    assert_same_bits(resumed.state, optimizer.state)


def test_what_differs_is_named_with_its_part(tmp_path):
    rng = np.random.default_rng(2)
    parameters, gradients = tree(rng), steps(rng)
    optimizer = make()
    train(optimizer, parameters, gradients[:2])
    fused.save_optimizer(tmp_path / "o", optimizer)
    two = fused.MultiOptimizer([fused.AdamW(1e-2), optim.Lion(1e-2)], [in_embed], **BOTH)
    for other, message in (
        (make(max_grad_norm=3.0), r"max_grad_norm \(file: 2.0, optimizer: 3.0\); pass hyper"),
        (make(optim.Muon(1e-2, momentum=0.8)), r"momentum \(file: 0.95, optimizer: 0.8\).*\(part 1, Muon\)"),
        (make(optim.Muon(decaying)), r"learning_rate \(file: 0.01, optimizer: 'schedule'\).*\(part 1, Muon\)"),
        (
            make(optim.Lion(1e-2)),
            r"the state of Lion \(not fused\) but got that of Muon \(not fused\) \(part 1, Lion\)",
        ),
        (make(fused.Adam(1e-2)), r"the state of Adam but got that of Muon \(not fused\)"),
        (two, "the state of 2 parts but got that of 3"),
        (fused.Adam(1e-2), "the state of Adam but got that of MultiOptimizer"),
    ):
        rejected(tmp_path / "o", message, other)
    for other in (make(optim.Lion(1e-2)), two, fused.Adam(1e-2)):
        rejected(tmp_path / "o", "the state of", other, hyperparameters="optimizer")
    fused.save_optimizer(tmp_path / "one", fused.Adam(1e-2))
    rejected(tmp_path / "one", "the state of MultiOptimizer but got that of Adam", make())


def test_hyperparameters_of_the_file_or_the_optimizer(tmp_path):
    rng = np.random.default_rng(3)
    start, gradients = tree(rng), steps(rng)
    optimizer = make(optim.Muon(2e-2, momentum=0.8, nesterov=False), max_grad_norm=None)
    parameters = train(optimizer, start, gradients[:2])
    fused.save_optimizer(tmp_path / "o", optimizer)
    taken = make()
    fused.load_optimizer(tmp_path / "o", taken, hyperparameters="file")
    assert taken.max_grad_norm is None and taken.state.keys() == {"states", "skipped"}
    assert (taken.optimizers[1].momentum, taken.optimizers[1].nesterov) == (0.8, False)
    found, expected = (train(o, parameters, gradients[2:]) for o in (taken, optimizer))
    assert_same_bits(found, expected)
    kept = make()
    fused.load_optimizer(tmp_path / "o", kept, hyperparameters="optimizer")
    assert kept.max_grad_norm == 2.0 and kept.state["grad_norm"].item() == 0
    assert kept.optimizers[1].momentum == 0.95
    assert kept.optimizers[1].learning_rate.item() == kept.optimizers[2].learning_rate.item() == np.float32(1e-2)
    # Without hyper-parameters that differ but the learning rates, which belong to the states.
    changed = make(optim.Muon(5e-2, momentum=0.8, nesterov=False), max_grad_norm=None)
    fused.load_optimizer(tmp_path / "o", changed)
    assert changed.optimizers[1].learning_rate.item() == np.float32(2e-2)


def test_parameters_that_do_not_fit_are_named(tmp_path):
    """At load, or where there is nothing to compare, at the first use; in fused parts and others."""
    rng = np.random.default_rng(4)
    start, gradients = tree(rng), steps(rng)
    optimizer = make()
    train(optimizer, start, gradients[:1])
    fused.save_optimizer(tmp_path / "o", optimizer)
    more = copied(start) | {"layers": [*start["layers"], {"weight": mx.ones((8, 12))}]}
    fewer = copied(start) | {"layers": start["layers"][:1]}
    larger = copied(start) | {"layers": [start["layers"][0], {"weight": mx.ones((9, 12))}]}
    without_head = {k: x for k, x in start.items() if k != "head"}
    for parameters, at_load, at_use in (
        (more, r"layers.2.weight.v but got none \(part 1", r"\[Muon\] .* no state there for layers.2.weight.v"),
        (fewer, "layers.1.weight.v but got one that", r"\[Muon\] .* takes the state there of layers.1.weight.v"),
        (larger, r"layers.1.weight.v of shape \(9, 12\) but got shape \(8, 12\)", None),
        (start | {"head2": mx.ones(3)}, "head2", r"\[Adam\] parameters must be those of .* got head2"),
        (without_head, None, r"\[Adam\] parameters must be those of .* nothing at head"),
    ):
        if at_load is not None:
            new = make()
            new.init(parameters)
            rejected(tmp_path / "o", at_load, new)
        for use in (lambda o, p: o.init(p), lambda o, p: o.apply_gradients(p, p)) if at_use else ():
            new = make()
            fused.load_optimizer(tmp_path / "o", new)
            before = all_bits(new.state)
            for _ in range(2):  # still known the second time
                with pytest.raises(ValueError, match=at_use):
                    use(new, parameters)
                assert_same_bits(all_bits(new.state), before)
            use(new, start)
    # The head is frozen, the layers have no gradients: their states are kept.
    new = make()
    fused.load_optimizer(tmp_path / "o", new)
    some = {"embed": start["embed"], "layers": [start["layers"][0]]}
    new.apply_gradients(some, start)
    assert_same_bits(new.state["states"][2]["head"], optimizer.state["states"][2]["head"])
    assert_same_bits(new.state["states"][1]["layers"][1], optimizer.state["states"][1]["layers"][1])


def test_a_state_that_mlx_saved(tmp_path):
    """By the equal MultiOptimizer of MLX's."""
    rng = np.random.default_rng(5)
    start, gradients = tree(rng), [tree(rng) for _ in range(3)]
    theirs = optim.MultiOptimizer([optim.AdamW(1e-2), optim.Lion(decaying), optim.Adam(1e-3)], [in_embed, in_layers])
    parameters = train(theirs, start, gradients[:2])
    mx.save_safetensors(str(tmp_path / "o.safetensors"), dict(tree_flatten(theirs.state)))
    ours = fused.MultiOptimizer([fused.AdamW(1.0), optim.Lion(decaying), fused.Adam(1.0)], [in_embed, in_layers])
    fused.load_optimizer(tmp_path / "o.safetensors", ours)
    found, expected = (train(o, parameters, gradients[2:]) for o in (ours, theirs))
    np.testing.assert_allclose(np.array(found["head"]), np.array(expected["head"]), rtol=1e-6)
    assert ours.step.item() == 3
    two = fused.MultiOptimizer([fused.AdamW(1.0), optim.Lion(decaying)], [in_embed])
    rejected(tmp_path / "o.safetensors", "must hold the state of 2 parts but got that of part 2", two)
    four = fused.MultiOptimizer([*two.optimizers, fused.Adam(1.0), fused.Adam(1.0)], [in_embed, in_layers, in_embed])
    rejected(tmp_path / "o.safetensors", r"without step and learning_rate \(part 3, Adam\)|something else", four)
    mx.save_safetensors(str(tmp_path / "one.safetensors"), dict(tree_flatten(theirs.state["states"][0])))
    rejected(tmp_path / "one.safetensors", "got step, which is of no MultiOptimizer's part", ours)


def test_parameters_may_be_named_like_hyperparameters(tmp_path):
    parameters = {"eps": mx.ones(3), "momentum": {"weight_decay": mx.ones(2)}, "seed": mx.ones(2)}

    def make() -> fused.MultiOptimizer:
        return fused.MultiOptimizer(
            [fused.AdamW(1e-2), optim.SGD(1e-2, momentum=0.9)], [lambda path, _: path != "seed"]
        )

    optimizer, new = make(), make()
    optimizer.apply_gradients(parameters, parameters)
    fused.save_optimizer(tmp_path / "o", optimizer)
    fused.load_optimizer(tmp_path / "o", new)
    assert_same_bits(new.state, optimizer.state)
