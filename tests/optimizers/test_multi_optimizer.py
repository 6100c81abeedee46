"""MultiOptimizer: one norm, one decision and one step over parts that are fused, MLX's own, or anybody's.

The reference is the plain composition in MLX's operations: clip by the fused norm, MLX's own MultiOptimizer, then
mx.where over parameters and every state.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_map, tree_map_with_path

import mlx_fused_adam as fused
from mlx_fused_adam import _multi_optimizer
from support.arrays import address, all_bits, assert_same_bits, random
from support.training import copied, train

pytestmark = pytest.mark.usefixtures("device")

BOTH = dict(max_grad_norm=2.0, skip_nonfinite=True)
RECORDS = ("grad_norm", "skipped")
SHAPES = {"embed": (70, 40), "layers": [{"weight": (33, 48), "bias": (48,)}], "head": (5, 9)}


def in_layers(path: str, _: mx.array) -> bool:
    return path.startswith("layers") and path.endswith("weight")


def in_embed(path: str, _: mx.array) -> bool:
    return path == "embed"


FILTERS = [in_embed, in_layers]
ONE_OF_EACH = {0: "embed", 1: "layers.0.weight", 2: "head"}  # a parameter of each part, by part


def decaying(step: mx.array) -> mx.array:
    return 0.1 / (step.astype(mx.float32) + 1)


def tree(rng: np.random.Generator, dtype: mx.Dtype = mx.float32) -> Any:
    return {
        "embed": random(rng, SHAPES["embed"], dtype),
        "layers": [{k: random(rng, shape, dtype) for k, shape in SHAPES["layers"][0].items()}],
        "head": random(rng, SHAPES["head"], dtype),
    }


def spoilt(gradients: Any, path: str, value: float = math.nan) -> Any:
    """The gradients with one bad element at the end of one of them."""
    x = dict(tree_flatten(gradients))[path]
    bad = mx.where(mx.arange(x.size).reshape(x.shape) == x.size - 1, value, x)
    return tree_map_with_path(lambda name, old: bad if name == path else old, gradients)


def four_steps(rng: np.random.Generator, bad: str = "head", dtype: mx.Dtype = mx.float32) -> list[Any]:
    """A large gradient, a bad one, a small one, a large one."""
    good = [tree(rng, dtype) for _ in range(3)]
    return [good[0], spoilt(good[1], bad), tree_map(lambda x: x * 1e-3, good[1]), good[2]]


def norm_of(gradients: Any, parameters: Any) -> mx.array:
    """The norm as a single optimizer sums it."""
    optimizer = fused.Adam(0.0, max_grad_norm=1.0)
    optimizer.apply_gradients(gradients, parameters)
    return optimizer.state["grad_norm"]


class Plain:
    """The composition in MLX's operations, with an optimizer's methods."""

    def __init__(self, optimizer: Any, max_grad_norm: float | None = None, skip_nonfinite: bool = False) -> None:
        self.optimizer, self.max_grad_norm, self.skip_nonfinite = optimizer, max_grad_norm, skip_nonfinite
        self.init = optimizer.init

    @property
    def state(self) -> Any:
        return self.optimizer.state

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        norm = norm_of(gradients, parameters)
        if self.max_grad_norm is not None:
            scale = mx.minimum(self.max_grad_norm / (norm + 1e-6), 1.0)
            gradients = tree_map(lambda g: (g * scale).astype(g.dtype), gradients)
        if not self.skip_nonfinite:
            return self.optimizer.apply_gradients(gradients, parameters)
        self.optimizer.init(parameters)
        before = copied(self.optimizer.state)
        new = self.optimizer.apply_gradients(gradients, parameters)
        is_applied = mx.isfinite(norm)

        def keep(tree: Any, old: Any) -> Any:
            return tree_map(lambda x, y: mx.where(is_applied, x, y), tree, old)

        for state, kept in zip(
            self.optimizer.state["states"], keep(self.optimizer.state, before)["states"], strict=True
        ):
            state.update(kept)
        return keep(new, parameters)


Maker = Callable[[Any], list[optim.Optimizer]]

# Parts by the module that Adam and AdamW come from; the others are MLX's own.
PARTS: dict[str, Maker] = {
    "Adam, AdamW, Adam": lambda m: [
        m.Adam(decaying, bias_correction=True), m.AdamW(1e-2, weight_decay=0.1), m.Adam(1e-3)
    ],
    "AdamW, Muon, Lion": lambda m: [m.AdamW(1e-2), optim.Muon(decaying), optim.Lion(1e-3, weight_decay=0.1)],
    "SGD, Adafactor, AdamW": lambda m: [
        optim.SGD(decaying, momentum=0.9), optim.Adafactor(), m.AdamW(decaying, bias_correction=True)
    ],
    "Lion, Muon, SGD": lambda m: [optim.Lion(1e-3), optim.Muon(1e-2), optim.SGD(0.1)],
}  # fmt: skip


@pytest.mark.cpu_only
@pytest.mark.parametrize("options", [{"max_grad_norm": 2.0}, {"skip_nonfinite": True}, BOTH, {}], ids=str)
@pytest.mark.parametrize("parts", PARTS)
def test_equals_the_plain_composition(parts, options):
    rng = np.random.default_rng(0)
    parameters, steps = tree(rng), four_steps(rng)
    if "skip_nonfinite" not in options:
        del steps[1]
    optimizer = fused.MultiOptimizer(PARTS[parts](fused), FILTERS, **options)
    reference = Plain(optim.MultiOptimizer(PARTS[parts](optim), FILTERS), **options)
    found, expected = (train(o, parameters, steps) for o in (optimizer, reference))
    assert_same_bits(found, expected)
    assert_same_bits(all_bits(optimizer.state, RECORDS), reference.state)
    if "skip_nonfinite" in options:
        assert optimizer.state["skipped"].item() == 1
        assert [s["step"].item() for s in optimizer.state["states"]] == [3, 3, 3]


@pytest.mark.cpu_only
@pytest.mark.parametrize("parts", ["Adam, AdamW, Adam", "AdamW, Muon, Lion"])
def test_compiled_equals_the_plain_composition_compiled(parts):
    rng = np.random.default_rng(1)
    parameters, steps = tree(rng), four_steps(rng)
    optimizer = fused.MultiOptimizer(PARTS[parts](fused), FILTERS, **BOTH)
    reference = Plain(optim.MultiOptimizer(PARTS[parts](optim), FILTERS), **BOTH)
    found, expected = (train(o, parameters, steps, is_compiled=True) for o in (optimizer, reference))
    assert_same_bits(found, expected)
    assert_same_bits(all_bits(optimizer.state, RECORDS), reference.state)
    # Written at each call: not those of the trace.
    assert optimizer.state["grad_norm"].item() == norm_of(steps[-1], parameters).item()
    assert optimizer.state["skipped"].item() == 1


def small_tree(rng: np.random.Generator) -> Any:
    return {
        "embed": random(rng, (3, 4)),
        "layers": [{"weight": random(rng, (2, 3)), "bias": random(rng, (3,))}, (random(rng, (2,)),)],
        "head": random(rng, (5,)),
    }


KINDS = {
    "Adam": lambda m, rate: m.Adam(rate),
    "AdamW": lambda m, rate: m.AdamW(rate, bias_correction=True),
    "Muon": lambda m, rate: optim.Muon(rate),
    "Lion": lambda m, rate: optim.Lion(rate),
    "SGD": lambda m, rate: optim.SGD(rate, momentum=0.9),
    "RMSprop": lambda m, rate: optim.RMSprop(rate),
    "Adamax": lambda m, rate: optim.Adamax(rate),
    "Adafactor": lambda m, rate: optim.Adafactor(rate, relative_step=False),
}
PATHS = ["embed", "layers.0.weight", "layers.0.bias", "layers.1.0", "head"]
DEEDS = ["good", "small", *PATHS, "max_grad_norm", "skip_nonfinite", "learning_rate", "init", "pickle", "file", "state"]


@dataclasses.dataclass(frozen=True)
class Among:
    """A filter that can be pickled."""

    paths: frozenset[str]

    def __call__(self, path: str, _: mx.array) -> bool:
        return path in self.paths


@pytest.mark.cpu_only
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kinds=st.lists(st.sampled_from(sorted(KINDS)), min_size=1, max_size=4),
    rates=st.lists(st.sampled_from([decaying, 1e-2]), min_size=4, max_size=4),
    choices=st.lists(st.integers(0, 3), min_size=5, max_size=5),
    options=st.sampled_from([{}, {"max_grad_norm": 2.0}, {"skip_nonfinite": True}, BOTH]),
    deeds=st.lists(st.sampled_from(DEEDS), min_size=1, max_size=8),
)
def test_any_program_equals_the_plain_composition(tmp_path, kinds, rates, choices, options, deeds):
    """Parts, filters, steps, changes of options, copies, files and states at random."""
    filters = [
        Among(frozenset(p for p, c in zip(PATHS, choices, strict=True) if c == i)) for i in range(len(kinds) - 1)
    ]

    def parts(m: Any) -> list[optim.Optimizer]:
        return [KINDS[kind](m, rate) for kind, rate in zip(kinds, rates, strict=False)]

    rng = np.random.default_rng(0)
    start = small_tree(rng)
    optimizer = fused.MultiOptimizer(parts(fused), filters, **options)
    reference = Plain(optim.MultiOptimizer(parts(optim), filters), **options)
    found = expected = start
    for o in (optimizer, reference):
        o.init(start)
    skipped = 0
    for deed in deeds:
        if deed == "learning_rate":
            for o in (optimizer, reference.optimizer):
                o.learning_rate = 3e-3
        elif deed in ("max_grad_norm", "skip_nonfinite"):
            value = None if deed == "max_grad_norm" and reference.max_grad_norm else 1.5
            value = not reference.skip_nonfinite if deed == "skip_nonfinite" else value
            skipped = 0 if deed == "skip_nonfinite" else skipped
            for o in (optimizer, reference):
                setattr(o, deed, value)
        elif deed == "init":
            optimizer.init(start)
        elif deed == "pickle":
            optimizer = pickle.loads(pickle.dumps(optimizer))
        elif deed == "state":
            optimizer.state = copied(optimizer.state)
        elif deed == "file":
            fused.save_optimizer(tmp_path / "o", optimizer)
            options = dict(max_grad_norm=optimizer.max_grad_norm, skip_nonfinite=optimizer.skip_nonfinite)
            optimizer = fused.MultiOptimizer(parts(fused), filters, **options)
            fused.load_optimizer(tmp_path / "o", optimizer)
        else:
            gradients = small_tree(rng)
            if deed == "small":
                gradients = tree_map(lambda x: x * 1e-3, gradients)
            elif deed in PATHS:
                if not reference.skip_nonfinite:
                    continue
                gradients = spoilt(gradients, deed)
                skipped += 1
            found, expected = (o.apply_gradients(gradients, p) for o, p in ((optimizer, found), (reference, expected)))
            if reference.max_grad_norm:
                assert_same_bits(optimizer.state["grad_norm"], norm_of(gradients, start))
        assert_same_bits(found, expected)
        assert_same_bits(all_bits(optimizer.state, RECORDS), reference.state)
        if reference.skip_nonfinite:
            assert optimizer.state["skipped"].item() == skipped


OPTIONS = {
    "int8": dict(state_dtype="int8"),
    "stochastic": dict(stochastic_rounding=True, seed=5),
    "master": dict(master_weights=True, state_dtype="int8"),
}


def fused_parts(dtype: mx.Dtype) -> list[optim.Optimizer]:
    """Each with other options; weights of 4096 elements would be needed for codes, so embed is made larger."""
    return [
        fused.AdamW(decaying, **OPTIONS["int8"]),
        fused.AdamW(1e-2, weight_decay=decaying, **OPTIONS["master"] if dtype == mx.bfloat16 else {}),
        fused.Adam(1e-2, **OPTIONS["stochastic"]),
    ]


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("part", ONE_OF_EACH)
@pytest.mark.parametrize("kind", ["fused", "fused bfloat16", "MLX's"])
def test_a_bad_step_is_as_if_it_had_not_been(kind, part, is_compiled):
    """NaN in the gradients of any one part."""
    if is_compiled and (kind, part) not in (("fused bfloat16", 0), ("MLX's", 2)):
        pytest.skip("compiling takes long")
    dtype = mx.bfloat16 if "bfloat16" in kind else mx.float32
    rng = np.random.default_rng(2)
    parameters = tree(rng, dtype) | {"embed": random(rng, (70, 96), dtype)}
    good = [tree(rng, dtype) | {"embed": random(rng, (70, 96), dtype)} for _ in range(2)]
    bad = spoilt(good[1], ONE_OF_EACH[part])

    def make() -> fused.MultiOptimizer:
        parts = PARTS["AdamW, Muon, Lion"](optim) if kind == "MLX's" else fused_parts(dtype)
        return fused.MultiOptimizer(parts, FILTERS, **BOTH)

    optimizer, reference = make(), make()
    found = train(optimizer, parameters, [bad, good[0], bad, good[1]], is_compiled)
    expected = train(reference, parameters, good, is_compiled)
    assert_same_bits(found, expected)
    assert_same_bits(all_bits(optimizer.state, ("skipped",)), all_bits(reference.state, ("skipped",)))
    assert optimizer.state["skipped"].item() == 2
    assert [o.step.item() for o in optimizer.optimizers] == [2, 2, 2]


def test_a_bad_step_evaluated_at_once_changes_nothing():
    """Parameters, state and schedules of every part, looked at after the step itself."""
    rng = np.random.default_rng(3)
    parameters, gradients = tree(rng), tree(rng)
    for path in ONE_OF_EACH.values():
        optimizer = fused.MultiOptimizer(PARTS["SGD, Adafactor, AdamW"](fused), FILTERS, **BOTH)
        start = train(optimizer, parameters, [gradients])
        before = all_bits([start, optimizer.state], RECORDS)
        after = train(optimizer, start, [spoilt(gradients, path, math.inf)])
        assert_same_bits(all_bits([after, optimizer.state], RECORDS), before)
        assert math.isinf(optimizer.state["grad_norm"].item())


def test_the_norm_is_that_of_all_parts_and_written_once():
    rng = np.random.default_rng(4)
    parameters, gradients = tree(rng), tree(rng)
    one, many = fused.AdamW(1e-2, **BOTH), fused.MultiOptimizer([fused.AdamW(1e-2) for _ in range(3)], FILTERS, **BOTH)
    expected, found = (train(o, parameters, [gradients] * 2) for o in (one, many))
    assert_same_bits(found, expected)
    assert many.state["grad_norm"].item() == one.state["grad_norm"].item() > 2
    recorded = [path for path, _ in tree_flatten(many.state) if path.split(".")[-1] in RECORDS]
    assert sorted(recorded) == list(RECORDS)
    assert many.state["grad_norm"].dtype == mx.float32 and many.state["skipped"].dtype == mx.uint64


def test_the_squares_are_summed_in_one_node(monkeypatch):
    """Over the gradients of all parts, in the order of their tree."""
    seen = []
    original = _multi_optimizer.clipping_of
    monkeypatch.setattr(
        _multi_optimizer, "clipping_of", lambda gradients, *rest: seen.append(gradients) or original(gradients, *rest)
    )
    rng = np.random.default_rng(5)
    parameters, gradients = tree(rng), tree(rng)
    inner = optim.MultiOptimizer([fused.AdamW(1e-2), optim.SGD(0.1)], [in_embed])
    optimizer = fused.MultiOptimizer([inner, fused.Adam(0.1)], [lambda path, _: path != "head"], **BOTH)
    optimizer.apply_gradients(gradients, parameters)
    assert [[id(x) for x in xs] for xs in seen] == [[id(x) for _, x in tree_flatten(gradients)]]


def test_state_is_that_of_mlx():
    """Tree, setter and errors; states move in both directions."""
    rng = np.random.default_rng(6)
    parameters, gradients = tree(rng), tree(rng)
    ours, theirs = (m.MultiOptimizer(PARTS["AdamW, Muon, Lion"](m), FILTERS) for m in (fused, optim))
    assert isinstance(ours, optim.MultiOptimizer)
    for optimizer in (ours, theirs):
        train(optimizer, parameters, [gradients])
    assert ours.state.keys() == theirs.state.keys() == {"states"}
    assert [s is o.state for s, o in zip(ours.state["states"], ours.optimizers, strict=True)] == [True] * 3
    ours.max_grad_norm = 2.0
    ours.apply_gradients(gradients, parameters)
    assert ours.state.keys() == {"states", "grad_norm"}
    new = fused.MultiOptimizer(PARTS["AdamW, Muon, Lion"](fused), FILTERS, **BOTH)
    new.state = copied(theirs.state)
    assert new.state["grad_norm"].item() == new.state["skipped"].item() == 0
    new.state = copied(ours.state) | {"skipped": mx.array(3, mx.uint64)}
    assert new.state["skipped"].item() == 3 and new.state["grad_norm"].item() > 2
    new.state = copied(theirs.state)
    assert new.state["skipped"].item() == new.state["grad_norm"].item() == 0
    theirs.state = copied(ours.state)
    for optimizer, state in ((ours, {}), (theirs, {}), (ours, {"states": [{}]}), (theirs, {"states": [{}]})):
        with pytest.raises(ValueError, match="Invalid state provided"):
            optimizer.state = state
    for module in (fused, optim):
        with pytest.raises(ValueError, match="Given 0 filters but 1 needed"):
            module.MultiOptimizer([fused.Adam(0.1), fused.Adam(0.1)])
    assert ours.learning_rate.item() == theirs.learning_rate.item() == np.float32(1e-2)
    ours.learning_rate = 0.5
    assert [o.learning_rate.item() for o in ours.optimizers] == [0.5] * 3
    assert ours.step.item() == 2


def test_one_part_and_trees_of_any_kind():
    for parameters in ({"a": [mx.ones(3), (mx.ones(2), mx.ones(1))]}, {"0": mx.ones(3), "a.b": mx.ones(2)}):
        gradients = tree_map(lambda x: 4 * x, parameters)
        many, one = fused.MultiOptimizer([fused.Adam(0.1)], **BOTH), fused.Adam(0.1, **BOTH)
        found, expected = (o.apply_gradients(gradients, parameters) for o in (many, one))
        assert_same_bits(found, expected)
        assert many.state["grad_norm"].item() == one.state["grad_norm"].item()
    optimizer = fused.MultiOptimizer([fused.Adam(0.1), optim.Lion(0.1)], [in_embed], **BOTH)
    optimizer.init({"embed": mx.ones(3), "other": mx.ones(3)})
    for parameters in ({"embed": mx.ones(3)}, {"other": mx.ones(3)}, {}):  # a part, or both, without gradients
        optimizer.apply_gradients(parameters, parameters)
    assert [o.step.item() for o in optimizer.optimizers] == [3, 3]


def test_options_are_attributes_and_shown():
    optimizer = fused.MultiOptimizer([optim.Lion(0.1), fused.Adam(0.1, state_dtype="int8")], [in_embed])
    assert (optimizer.max_grad_norm, optimizer.skip_nonfinite, optimizer.shard_group) == (None, False, None)
    assert repr(optimizer).startswith("MultiOptimizer([Lion, Adam(") and "'int8'" in repr(optimizer)
    optimizer.skip_nonfinite = True
    optimizer.max_grad_norm = "1"
    assert optimizer.max_grad_norm == 1.0
    assert repr(optimizer).endswith("], max_grad_norm=1.0, skip_nonfinite=True)")
    gradients = {"embed": mx.full((3,), math.nan), "b": mx.ones(3)}
    optimizer.apply_gradients(gradients, tree_map(mx.ones_like, gradients))
    assert optimizer.state["skipped"].item() == 1
    optimizer.skip_nonfinite = False
    assert optimizer.state.keys() == {"states", "grad_norm"}
    for optimizers in (fused.AdamW(1e-3), [], None):
        with pytest.raises(TypeError, match=r"\[MultiOptimizer\] optimizers must be a list of one or more but got"):
            fused.MultiOptimizer(optimizers)
    with pytest.raises(ValueError, match=r"\[MultiOptimizer\] max_grad_norm must be greater than 0 but got -1.0"):
        optimizer.max_grad_norm = -1
    for kind, value in (("max_grad_norm", True), ("skip_nonfinite", 1), ("shard_group", "all")):
        with pytest.raises(TypeError, match=rf"\[MultiOptimizer\] {kind} must be"):
            fused.MultiOptimizer([fused.Adam(0.1)], **{kind: value})
    with pytest.raises(TypeError, match="state_dtype"):
        fused.MultiOptimizer([fused.Adam(0.1)], state_dtype="int8")


@pytest.mark.parametrize("own", [{"max_grad_norm": 1.0}, {"skip_nonfinite": True}, BOTH], ids=str)
def test_clipping_of_a_part_s_own(own):
    """Each by itself without options of the whole, as in MLX's; rejected beside others, and joined with the same."""
    rng = np.random.default_rng(7)
    parameters, gradients = tree(rng), tree(rng)

    def parts() -> list[optim.Optimizer]:
        return [fused.AdamW(1e-2, **own), optim.SGD(0.1), fused.Adam(1e-2, **own)]

    ours, theirs = (m.MultiOptimizer(parts(), FILTERS) for m in (fused, optim))
    assert_same_bits(*(train(o, parameters, [gradients]) for o in (ours, theirs)))
    assert_same_bits(ours.state, theirs.state)
    assert own.keys() & {"max_grad_norm"} == set() or "grad_norm" in ours.state["states"][0]

    for other in ({"max_grad_norm": 3.0}, {"max_grad_norm": 1.0, "skip_nonfinite": True}):
        if own.items() <= other.items():
            continue
        with pytest.raises(ValueError, match=r"\[MultiOptimizer\] max_grad_norm and .* to MultiOptimizer alone"):
            fused.MultiOptimizer(parts(), FILTERS, **other)
        inner = optim.MultiOptimizer(parts(), FILTERS)
        with pytest.raises(ValueError, match="of its AdamW beside its own"):
            fused.MultiOptimizer([inner], **other)

    joined = fused.MultiOptimizer(parts(), FILTERS, **own)
    plain = fused.MultiOptimizer([fused.AdamW(1e-2), optim.SGD(0.1), fused.Adam(1e-2)], FILTERS, **own)
    assert_same_bits(*(train(o, parameters, [gradients]) for o in (joined, plain)))
    assert_same_bits(joined.state, plain.state)
    assert joined.optimizers[0].max_grad_norm is None and not joined.optimizers[2].skip_nonfinite
    before = all_bits(joined.state)
    joined.optimizers[2].max_grad_norm = 0.1
    for use in (lambda: joined.apply_gradients(gradients, parameters), lambda: joined.init(parameters)):
        with pytest.raises(ValueError, match="max_grad_norm=0.1, skip_nonfinite=False of its Adam"):
            use()
    joined.optimizers[2].max_grad_norm = None
    assert_same_bits(all_bits(joined.state), before)


@pytest.mark.parametrize("package", [fused, optim], ids=["fused", "mlx.optimizers"])
def test_parts_of_parts(package):
    rng = np.random.default_rng(8)
    parameters, steps = tree(rng), four_steps(rng, "layers.0.weight")
    inner = package.MultiOptimizer([fused.AdamW(decaying), optim.Lion(1e-2)], [in_embed])
    nested = fused.MultiOptimizer([inner, fused.Adam(1e-2)], [lambda path, _: path != "head"], **BOTH)
    flat = fused.MultiOptimizer(
        [fused.AdamW(decaying), fused.Adam(1e-2), optim.Lion(1e-2)], [in_embed, lambda path, _: path == "head"], **BOTH
    )
    assert_same_bits(*(train(o, parameters, steps) for o in (nested, flat)))
    assert nested.state["skipped"].item() == 1
    assert nested.state.keys() == {"states", *RECORDS} and inner.state.keys() == {"states"}
    states = [*nested.state["states"][0]["states"], nested.state["states"][1]]
    expected = [flat.state["states"][i] for i in (0, 2, 1)]
    assert_same_bits(states, expected)


class Signed(fused.Adam):
    """A rule of its own, which no clipping from outside reaches."""

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        state["m"] = state["m"] + gradient
        return parameter - self.learning_rate * mx.sign(gradient) * mx.minimum(mx.abs(gradient), 1)


class Averaged(optim.SGD):
    """Wraps apply_gradients, and keeps a list, a tuple, a number and nothing in its state; narrows one array."""

    def init(self, parameters: Any) -> None:
        super().init(parameters)
        self.state.setdefault("more", [mx.zeros(()), (mx.zeros(2), 1), None, "text", mx.ones(2)])

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        new = super().apply_gradients(gradients, parameters)
        a, (b, c), none, text, wide = self.state["more"]
        self.state["more"] = [a + 1, (b + gradients["head"][0, 0], c + 1), none, text, wide.astype(mx.float16)]
        return new


def test_rules_of_users_clip_and_skip_too():
    rng = np.random.default_rng(9)
    parameters = tree(rng)
    large, bad, _, other = four_steps(rng)

    def make() -> fused.MultiOptimizer:
        return fused.MultiOptimizer([Signed(1e-2), fused.AdamW(1e-2), Averaged(decaying)], FILTERS, **BOTH)

    optimizer, reference = make(), make()
    found, expected = (
        train(o, parameters, steps) for o, steps in ((optimizer, [large, bad, other]), (reference, [large, other]))
    )
    assert_same_bits(found, expected)
    more, wanted = (o.optimizers[2].state["more"] for o in (optimizer, reference))
    assert_same_bits([more[0], *map(mx.array, more[1])], [wanted[0], *map(mx.array, wanted[1])])
    assert more[4].dtype == wanted[4].dtype == mx.float16
    assert more[0].item() == 2 and int(more[1][1]) == 3 and more[2] is None and more[3] == "text"
    # Scaled: sums of clipped gradients.
    scales = [2 / norm_of(gradients, parameters).item() for gradients in (large, other)]
    m = scales[0] * np.array(large["embed"]) + scales[1] * np.array(other["embed"])
    np.testing.assert_allclose(np.array(optimizer.state["states"][0]["embed"]["m"]), m, rtol=1e-5, atol=1e-7)


class Late(optim.SGD):
    """Makes state in an update."""

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        state["late"] = gradient
        return super().apply_single(gradient, parameter, state)


def test_state_made_in_an_update_cannot_be_skipped():
    parameters = {"embed": mx.ones(3), "w": mx.ones(3)}
    optimizer = fused.MultiOptimizer([fused.Adam(0.1), Late(0.1)], [in_embed], skip_nonfinite=True)
    with pytest.raises(ValueError, match=r"state of Late must have the same arrays .* another at w.late: make it in"):
        optimizer.apply_gradients(parameters, parameters)
    assert "late" not in optimizer.state["states"][1].get("w", {})
    assert [o.step.item() for o in optimizer.optimizers] == [0, 0]
    optimizer.skip_nonfinite = False
    optimizer.apply_gradients(parameters, parameters)


class Broken(optim.SGD):
    """Fails after it has changed state."""

    is_broken = True

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        state["v"] = gradient
        if self.is_broken:
            raise KeyboardInterrupt
        return parameter


@pytest.mark.parametrize("options", [{}, BOTH], ids=str)
@pytest.mark.parametrize("is_first", [True, False], ids=["first step", "later"])
def test_an_error_in_one_part_leaves_all_as_they_were(options, is_first):
    rng = np.random.default_rng(10)
    parameters, gradients = tree(rng), tree(rng)
    broken = Broken(decaying, momentum=0.9)
    inner = optim.MultiOptimizer([fused.AdamW(decaying), optim.Lion(decaying)], [in_embed])
    optimizer = fused.MultiOptimizer([inner, broken], [lambda path, _: path != "head"], **options)
    if not is_first:
        broken.is_broken = False
        optimizer.apply_gradients(gradients, parameters)
        broken.is_broken = True
    before = all_bits(optimizer.state)
    dicts = [o.state for o in (*inner.optimizers, broken)]
    with pytest.raises(KeyboardInterrupt):
        optimizer.apply_gradients(gradients, parameters)
    assert_same_bits(all_bits(optimizer.state), before)
    assert [o._initialized for o in (*inner.optimizers, broken)] == [not is_first] * 3
    assert all(x is o.state for x, o in zip(dicts, (*inner.optimizers, broken), strict=True))


def test_what_is_wrong_is_named_and_changes_nothing():
    rng = np.random.default_rng(11)
    parameters, gradients = tree(rng), tree(rng)
    optimizer = fused.MultiOptimizer([optim.Lion(0.1), fused.AdamW(0.1), fused.Adam(0.1)], FILTERS, **BOTH)
    optimizer.init(parameters)
    before = all_bits(optimizer.state)
    for wrong, kind, message in (
        ({"head": mx.ones((2, 2))}, ValueError, "of head must have the parameter's shape"),
        ({"other": mx.ones(2)}, ValueError, "got nothing at other"),
        ({"head": 3.0}, TypeError, "gradient of head must be an array"),
    ):
        with pytest.raises(kind, match=message):
            optimizer.apply_gradients(gradients | wrong, parameters)
        assert_same_bits(all_bits(optimizer.state), before)
    half = {"embed": mx.ones(3), "head": mx.ones(3, mx.float16)}
    optimizer = fused.MultiOptimizer([optim.Lion(0.1), fused.Adam(0.1, master_weights=True)], [in_embed])
    with pytest.raises(ValueError, match="parameter of head must be bfloat16 or float32"):
        optimizer.init(half)
    assert "embed" not in optimizer.state["states"][0] and not optimizer.optimizers[0]._initialized


def test_other_dtypes_fall_back_within_parts():
    with mx.stream(mx.cpu):
        parameters = {"embed": mx.ones(3, mx.float64), "w": mx.ones(3), "head": mx.ones(3, mx.bfloat16)}
        gradients = {k: mx.full(3, 2.0, x.dtype) for k, x in parameters.items()}
        bad = gradients | {"head": mx.full(3, math.nan, mx.bfloat16)}

        def make() -> fused.MultiOptimizer:
            return fused.MultiOptimizer([fused.AdamW(decaying), optim.Lion(0.1)], [lambda path, _: path != "w"], **BOTH)

        optimizer, reference = make(), make()
        found, expected = (
            train(o, parameters, s) for o, s in ((optimizer, [gradients, bad]), (reference, [gradients]))
        )
        assert_same_bits(found, expected)
        assert_same_bits(all_bits(optimizer.state, RECORDS), all_bits(reference.state, RECORDS))
        # A 16-bit state of MLX's own optimizers keeps its dtype.
        halves = {k: x.astype(mx.bfloat16) for k, x in gradients.items()}
        optimizer = fused.MultiOptimizer([optim.Adafactor(), optim.Adam(0.1)], [in_embed], **BOTH)
        new = train(optimizer, halves, [halves, bad | halves])
        assert {x.dtype for x in new.values()} == {mx.bfloat16}


@pytest.mark.parametrize("how", ["pickle", "deepcopy"])
def test_copies_train_alike(how):
    rng = np.random.default_rng(12)
    parameters, steps = tree(rng), four_steps(rng)
    optimizer = fused.MultiOptimizer(PARTS["AdamW, Muon, Lion"](fused), FILTERS, **BOTH)
    parameters = train(optimizer, parameters, steps[:2])
    new = copy.deepcopy(optimizer) if how == "deepcopy" else pickle.loads(pickle.dumps(optimizer))
    assert new.max_grad_norm == 2.0 and new.state["skipped"].item() == 1
    assert all(a.state is b for a, b in zip(new.optimizers, new.state["states"], strict=True))
    found = [train(o, parameters, steps[2:], is_compiled=True) for o in (optimizer, new)]
    assert_same_bits(*found)
    assert_same_bits(new.state, optimizer.state)


def test_backend_decayed_and_the_state_of_mlx(device):
    optimizer = fused.MultiOptimizer(
        [fused.AdamW(0.1, decay_filter="weight$", state_dtype="int8"), optim.Muon(0.1), fused.Adam(0.1)],
        [lambda path, _: path.startswith("layers"), in_embed],
        **BOTH,
    )
    alone = fused.Adam(0.1).backend
    assert optimizer.backend == f"{alone}, stock (Muon is not fused)"
    assert fused.MultiOptimizer(optimizer.optimizers[:1]).backend == alone
    rng = np.random.default_rng(13)
    parameters = tree(rng) | {"layers": [{"weight": random(rng, (70, 96)), "bias": mx.ones(4)}]}
    assert optimizer.decayed(parameters) == ["embed", "layers.0.weight"]
    train(optimizer, parameters, [tree_map(mx.ones_like, parameters)])
    found = fused.stock_state(optimizer)
    assert found.keys() == {"states"}
    for i in (0, 2):
        assert_same_bits(found["states"][i], fused.stock_state(optimizer.optimizers[i]))
    assert_same_bits(found["states"][1], optimizer.optimizers[1].state)
    assert found["states"][1] is not optimizer.optimizers[1].state
    assert found["states"][0]["layers"][0]["weight"].keys() == {"m", "v"}
    theirs = optim.MultiOptimizer([optim.AdamW(0.1), optim.Muon(0.1), optim.Adam(0.1)], optimizer.filters[:2])
    theirs.state = copied(found)
    theirs.apply_gradients(tree_map(mx.ones_like, parameters), parameters)
    assert_same_bits(fused.stock_state(optim.MultiOptimizer(optimizer.optimizers, optimizer.filters[:2])), found)


@pytest.mark.parametrize("is_compiled", [False, True], ids=["eager", "compiled"])
def test_a_model_with_frozen_layers(is_compiled):
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 8), nn.Linear(8, 2))
    model.layers[0].freeze()
    optimizer = fused.MultiOptimizer(
        [optim.SGD(0.01), fused.AdamW(0.001)], [lambda path, _: path.startswith("layers.1")], **BOTH
    )
    frozen = np.array(model.layers[0].weight)
    loss = nn.value_and_grad(model, lambda model, x: (10 * model(x) ** 2).mean())
    optimizer.init(model.trainable_parameters())
    state = [model.state, optimizer.state]

    def step(x: mx.array) -> mx.array:
        value, gradients = loss(model, x)
        optimizer.update(model, gradients)
        return value

    run = mx.compile(step, inputs=state, outputs=state) if is_compiled else step
    losses = [run(mx.ones((3, 4)) * scale).item() for scale in (1, 1, math.nan, 1)]
    mx.eval(state)
    assert losses[3] < losses[1] < losses[0] and math.isnan(losses[2])
    assert optimizer.state["skipped"].item() == 1 and optimizer.step.item() == 3
    np.testing.assert_array_equal(np.array(model.layers[0].weight), frozen)


def test_a_skipped_step_needs_no_host_sync():
    """Nothing is evaluated in an update: not under a trace either."""
    parameters = {"embed": mx.ones(4), "w": mx.ones(4)}
    optimizer = fused.MultiOptimizer([fused.Adam(0.1), optim.Lion(0.1)], [in_embed], **BOTH)
    optimizer.init(parameters)

    def step(gradients: Any, parameters: Any, states: Any) -> Any:
        optimizer.state = states
        return optimizer.apply_gradients(gradients, parameters)

    # Evaluating a tracer is an error.
    mx.compile(step)(parameters, parameters, copied(optimizer.state))


def test_the_group_s_shards_are_summed_once(monkeypatch):
    group = mx.distributed.init()
    seen = []

    def all_sum(x: mx.array, *, group: Any) -> mx.array:
        seen.append(group)
        return 4 * x

    monkeypatch.setattr(mx.distributed, "all_sum", all_sum)
    parameters = {"embed": mx.ones(4), "w": mx.ones(12)}
    optimizer = fused.MultiOptimizer(
        [fused.Adam(0.1), optim.Lion(0.1)], [in_embed], max_grad_norm=1.0, shard_group=group
    )
    optimizer.apply_gradients(parameters, parameters)
    assert len(seen) == 1 and seen[0] is group is optimizer.shard_group
    assert optimizer.state["grad_norm"].item() == 8


def test_fused_parts_are_updated_in_place():
    rng = np.random.default_rng(14)
    parameters = {"embed": random(rng, (200, 300)), "head": random(rng, (300, 100))}
    gradients = copied(parameters)
    optimizer = fused.MultiOptimizer([fused.AdamW(1e-2), fused.Adam(1e-2)], [in_embed], **BOTH)
    parameters = train(optimizer, parameters, [gradients])

    def addresses() -> list[int]:
        return [address(state[name][k]) for state in optimizer.state["states"] for name in state if name in gradients
                for k in "mv"] + [address(x) for _, x in sorted(parameters.items())]  # fmt: skip

    before = addresses()
    for some in (gradients, spoilt(gradients, "head")):
        mx.synchronize()  # a GPU's handlers hold the moments of the step before for a while
        parameters = optimizer.apply_gradients(some, parameters)
        mx.eval(parameters, optimizer.state)
        assert addresses() == before
