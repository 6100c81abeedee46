"""Random programs of all that a training script may do to an optimizer, each value held against the model of
support/programs.py.

A program draws a class, ours or a subclass, options and a tree of parameters, then steps eager and compiled, on
streams, evaluated or left lazy, with gradients in any layout; assigns options; holds handles and views, whose bits must
never change; replaces parameters; saves, loads, copies; asks for what must be rejected. All comparisons are bit for
bit. Built on hypothesis.stateful: a failure prints its shortest program. Long run:
FUSED_ADAM_PROGRAM_OPERATIONS=100000 pytest -n0 tests/optimizers/test_programs.py
"""

from __future__ import annotations

import copy
import dataclasses
import gc
import os
import pickle
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)
from mlx.utils import tree_flatten

import mlx_fused_adam as fused
from support.mlx_release import is_before
from support.programs import (
    BITS_OF_CODES,
    CODED,
    LAYOUTS,
    Model,
    Options,
    Tensor,
    assert_array,
    assert_same,
    by_mlx,
    clipped,
    laid_out,
    layout_for,
    random_values,
    repeated,
    state_dtypes,
    values_of,
)

pytestmark = pytest.mark.usefixtures("device")

# The long run: this many operations of all tests together; and the steps of one program.
OPERATIONS = int(os.environ.get("FUSED_ADAM_PROGRAM_OPERATIONS", "0"))
QUICK_PROGRAMS = 25
STEPS = 40

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
PATHS = ["embed.weight", "blocks.0.weight", "blocks.0.bias", "blocks.1.weight", "norm", "head.weight"]  # fmt: skip
SMALL = [
    (), (1,), (0,), (3, 0), (7,), (31,), (33,), (5, 4), (1, 40), (40, 1), (2, 3, 4), (2, 3, 4, 5), (64, 65),
    (4, 13, 20),
]  # fmt: skip
if is_before("0.32.1"):  # which cannot save an empty array
    SMALL = [shape for shape in SMALL if 0 not in shape]
# Quantized state begins at 4096 elements; the last two are more than one thread's share.
LARGE = [(128, 32), (4100,), (3, 33, 43), (70, 90), (2, 3, 20, 40), (130, 257), (40000,)]
MOST_HANDLES = 6


class Decay:
    """A schedule that can be copied and pickled."""

    def __init__(self, start: float) -> None:
        self.start = start

    def __call__(self, step: mx.array) -> mx.array:
        return self.start * mx.power(mx.array(0.875), step.astype(mx.float32))


def is_a_weight(path: str, parameter: mx.array | None = None) -> bool:
    return path.endswith("weight")


FILTERS: dict[str, Any] = {
    "none": None,
    "callable": is_a_weight,
    "expressions": ["weight$"],
}


def filtered(name: str) -> dict[str, Any]:
    return {"decay_filter": FILTERS[name], "decays": (lambda path: True) if name == "none" else is_a_weight}


# What may be assigned, or differ between a file and an optimizer: fields of Options.
CHANGES: list[dict[str, Any]] = [
    *({"state_dtype": x} for x in (None, "float32", "bfloat16", "int8", "int4")),
    *({"stochastic_rounding": x} for x in (None, True, False)),
    *({"master_weights": x, "master_weight_bits": bits} for x, bits in ((False, 32), (True, 32), (True, 24))),
    *({"max_grad_norm": x} for x in (None, 1.0)),
    *({"skip_nonfinite": x} for x in (False, True)),
    *map(filtered, FILTERS), {"seed": 7}, {"eps": 1e-4}, {"betas": (0.7, 0.8)}, {"weight_decay": 0.05},
]  # fmt: skip


def is_forbidden(options: Options) -> bool:
    """Whether two options conflict."""
    return options.state_dtype in CODED and options.stochastic_rounding is False


class Adds:
    """A subclass that has names, lists and shapes of its own beside our state."""

    def init_single(self, parameter: mx.array, state: dict) -> None:
        super().init_single(parameter, state)
        state["own"] = [mx.zeros((2, 3)), {"count": mx.array(0)}]


class Counts(Adds):
    """And a rule of its own around ours."""

    def apply_single(self, gradient: mx.array, parameter: mx.array, state: dict) -> mx.array:
        new = super().apply_single(gradient, parameter, state)
        state["own"][1]["count"] = state["own"][1]["count"] + 1
        return new


class Widens(Adds):
    """And moments of its own choice, which no option changes."""

    def init_single(self, parameter: mx.array, state: dict) -> None:
        super().init_single(parameter, state)
        state.pop("m_scale", None), state.pop("v_scale", None)
        state["m"] = state["v"] = mx.zeros(parameter.shape)


ADDITIONS = {"nothing": (), "state": (Adds,), "a rule": (Counts,), "float32 moments": (Widens,)}
CLASSES: dict[tuple[str, str], Any] = {
    (adds, kind.__name__): type(f"{kind.__name__} with {adds}", (*bases, kind), {}) if bases else kind
    for adds, bases in ADDITIONS.items()
    for kind in (fused.Adam, fused.AdamW)
}
globals().update({kind.__name__: kind for kind in CLASSES.values()})  # where pickle looks for them


# How the blocks of a tree are kept: a function of the words of a path, which returns keys.
CONTAINERS: dict[str, Callable[..., list]] = {
    "lists": lambda *words: [int(x) if x.isdigit() else x for x in words],
    "tuples": lambda *words: [int(x) if x.isdigit() else x for x in words],
    "ints": lambda *words: [int(x) if x.isdigit() else x for x in words],
    "digits": lambda *words: list(words),
    "flat": lambda *words: [".".join(words)],  # no levels, but dots in keys
    # The names of moments, an empty one, and a dot.
    "odd": lambda *words: {"norm": ["m"], "head": ["v", "", "weight"], "embed": ["a.0", "weight"]}.get(
        words[0], list(words)
    ),
}


def tree_of(leaves: dict[str, Any], containers: str) -> dict[str, Any]:
    """The tree of some of PATHS; a block of a list that has nothing is there, and empty."""
    tree: dict[str, Any] = {}
    for path, x in leaves.items():
        *outer, last = CONTAINERS[containers](*path.split("."))
        inner = tree
        for key in outer:
            inner = inner.setdefault(key, {})
        inner[last] = x
    if containers in ("lists", "tuples") and "blocks" in tree:
        blocks = tree["blocks"]
        kind = list if containers == "lists" else tuple
        tree["blocks"] = kind(blocks.get(i, {}) for i in range(max(blocks) + 1))
    return tree


def merge(tree: Any, new: Any) -> None:
    """Put the leaves of a smaller tree in their places."""
    items = new.items() if isinstance(new, dict) else enumerate(new)
    for key, x in items:
        if isinstance(x, mx.array):
            tree[key] = x
        else:
            merge(tree[key], x)


@dataclasses.dataclass
class Handle:
    """An array that the program keeps, and what it must hold for ever."""

    what: str
    array: Any  # of MLX, or a NumPy view of one
    expected: np.ndarray
    is_lazy: bool

    def check(self) -> None:
        found = self.array if isinstance(self.array, np.ndarray) else values_of(self.array)
        if found.dtype == np.float16:
            found = found.astype(np.float32)
        assert_same(np.asarray(found), self.expected, f"held {self.what}")


VIEWS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda x: x,
    "slice": lambda x: x[1:] if x.ndim else x,
    "every second": lambda x: x[..., ::2] if x.ndim else x,
    "transposed": lambda x: x.T if isinstance(x, np.ndarray) else x.transpose(),
    "reversed": lambda x: x[::-1] if x.ndim else x,
    "flat": lambda x: x.reshape(-1),
}
OTHER_VIEWS = ["NumPy view", "doubled"]
PARTS = ["parameter", "m", "v", "any"]


class Streams:
    """Streams of this process: MLX keeps each as long as the process lives, so programs share two."""

    def __init__(self, count: int) -> None:
        device = mx.default_device()
        self.first = mx.default_stream(device)
        self.all = [self.first, *(mx.new_stream(device) for _ in range(count))]


# A step's gradients, where it runs and what is evaluated after it.
STEP: dict[str, Any] = dict(
    seed=st.integers(0, 2**32),
    some=st.integers(0, 2 ** len(PATHS) - 1),
    layout=st.sampled_from(["mixed", "mixed", *LAYOUTS]),
    scale=st.sampled_from([1.0, 1.0, 1e-3, 1e-6, 0.0, 1e20]),
    dtype=st.sampled_from(["parameter's", "parameter's", *DTYPES]),
    place=st.integers(0, 5),
    is_ready=st.booleans(),
    spoils=st.sampled_from([None, None, None, "nan", "inf", "-inf"]),  # an element of a gradient
    keeps=st.sampled_from([0, 0, 0, 1, 3]),  # handles, on anything
    then=st.sampled_from(["eval", "eval", "lazy", "async", "parameters", "state", "one", "item"]),
)


class Programs(RuleBasedStateMachine):
    """Every rule ends by counting itself, which looks at what is held."""

    counts: Counter[str]
    streams: Streams
    is_small: bool  # where every access is checked
    has_exact_scalars: bool
    folder: Path

    def __init__(self) -> None:
        super().__init__()
        self.handles: list[Handle] = []
        self.rng = np.random.default_rng(0)
        self.num_threads = fused.num_threads()

    # ---- Beginning and end ----

    @initialize(
        kind=st.sampled_from(["Adam", "AdamW"]),
        adds=st.sampled_from(["nothing", "nothing", *ADDITIONS]),
        dtypes=st.sampled_from(["float32", "bfloat16", "mixed"]),
        has_schedule=st.booleans(),
        betas=st.sampled_from([(0.9, 0.999), (0.8, 0.9)]),
        eps=st.sampled_from([1e-8, 1e-3]),
        weight_decay=st.sampled_from([0.0, 0.1]),
        bias_correction=st.booleans(),
        state_dtype=st.sampled_from([None, None, "float32", "bfloat16", "int8", "int4"]),
        stochastic_rounding=st.sampled_from([None, True, False]),
        seed=st.sampled_from([0, 3, 2**40 + 5]),
        master_weight_bits=st.sampled_from([None, None, 32, 24]),
        max_grad_norm=st.sampled_from([None, None, 1.0, 1e4]),
        skip_nonfinite=st.booleans(),
        decay_filter=st.sampled_from(sorted(FILTERS)),
        shapes=st.lists(st.sampled_from(SMALL), min_size=1, max_size=5),
        large=st.sampled_from(LARGE),
        begins_with_init=st.booleans(),
        containers=st.sampled_from(["lists", *CONTAINERS]),
    )
    def begin(
        self, *, dtypes: str, has_schedule: bool, shapes: list[tuple[int, ...]], large: tuple[int, ...],
        begins_with_init: bool, decay_filter: str, containers: str, **drawn: Any,
    ) -> None:  # fmt: skip
        drawn["master_weights"] = drawn["master_weight_bits"] is not None
        drawn["master_weight_bits"] = drawn["master_weight_bits"] or 32
        if drawn["state_dtype"] in CODED and drawn["stochastic_rounding"] is False:
            drawn["stochastic_rounding"] = None
        if not self.has_exact_scalars:
            drawn["bias_correction"] = False
            has_schedule = False
        if drawn["adds"] == "a rule":
            drawn |= {"max_grad_norm": None, "skip_nonfinite": False}
            decay_filter = "none"
        elif drawn["adds"] == "float32 moments":
            drawn |= {"master_weights": False, "master_weight_bits": 32}
        if self.is_small and int(np.prod(large)) > 5000:
            large = (128, 32)
        options = Options(
            **drawn,
            schedule=Decay(0.01) if has_schedule else None,
            **filtered(decay_filter),
        )
        names = ["float32", "bfloat16"] + ["float16"] * (not options.master_weights)
        tensors = {}
        for i, (path, shape) in enumerate(zip(PATHS, [large, *shapes], strict=False)):
            dtype = DTYPES[names[(i + len(shapes)) % len(names)] if dtypes == "mixed" else dtypes]
            tensors[path] = Tensor(dtype, random_values(self.rng, shape, 1.0, dtype))
        self.model = Model(options, tensors)
        self.containers = containers
        self.own_names = ["own"] if options.adds != "nothing" else []
        self.tree = self.tree_of({k: mx.array(x.value).astype(x.dtype) for k, x in tensors.items()})
        self.make_optimizer()
        self.is_initialized = False
        self.has_records = True  # norm and count, which a state of MLX's has not
        self.loaded: set[str] = set()  # what a file has that has not met its parameters
        self.saved: Model | None = None
        self.turned: set[str] = set()  # paths whose quantized state or correction may not be row-major
        if begins_with_init:
            self.init_all()
        self.counts["programs"] += 1

    def make_optimizer(self) -> None:
        self.optimizer = self.made(self.model.options)
        self.forget_compiled()

    def made(self, options: Options) -> Any:
        return CLASSES[options.adds, options.kind](**options.arguments())

    def changed(self, change: dict[str, Any]) -> Options | None:
        """The options with a change, or None where it is not for this program."""
        options = dataclasses.replace(self.model.options, **change)
        has_halves = any(tensor.dtype == mx.float16 for tensor in self.model.tensors.values())
        if options.kind == "Adam" and change.keys() & {"weight_decay", "decay_filter"}:
            return None
        if options.master_weights and (has_halves or options.adds == "float32 moments"):
            return None
        if options.adds == "a rule" and (options.max_grad_norm or options.skip_nonfinite or options.decay_filter):
            return None
        return options

    def tree_of(self, leaves: dict[str, Any]) -> dict[str, Any]:
        return tree_of(leaves, self.containers)

    def at(self, tree: Any, path: str) -> Any:
        """What a tree of this program's containers has at one of PATHS."""
        for key in CONTAINERS[self.containers](*path.split(".")):
            tree = tree[key]
        return tree

    def forget_compiled(self) -> None:
        self.compiled: dict[tuple[str, ...], Callable[[Any], None]] = {}

    def teardown(self) -> None:
        try:
            if hasattr(self, "model") and sys.exc_info()[0] is None:
                self.check_all()
                for handle in self.handles:
                    handle.check()
        finally:
            mx.set_default_stream(self.streams.first)
            fused.set_num_threads(self.num_threads)

    def count(self, name: str) -> None:
        """Each operation is counted, and looks at all that is held."""
        self.counts[name] += 1
        self.counts["operations"] += 1
        for handle in self.handles:
            if not handle.is_lazy:
                handle.check()

    # ---- Steps ----

    def arrays(self) -> dict[str, mx.array]:
        return {path: self.at(self.tree, path) for path in self.model.tensors}

    def states(self) -> dict[str, dict[str, Any]]:
        """By path."""
        return {path: self.at(self.optimizer.state, path) for path in self.model.paths_with_state}

    def draw_gradients(
        self, paths: list[str], layout: str, scale: float, dtype: str
    ) -> tuple[dict[str, np.ndarray], dict[str, mx.array]]:
        values, arrays = {}, {}
        for path in paths:
            tensor = self.model.tensors[path]
            shape = tensor.value.shape
            name = layout if layout != "mixed" else LAYOUTS[self.rng.integers(len(LAYOUTS))]
            name = layout_for(shape, name)
            kind = tensor.dtype if dtype == "parameter's" else DTYPES[dtype]
            x = repeated(random_values(self.rng, shape, scale, kind), name)
            values[path], arrays[path] = x, laid_out(x, kind, name, self.rng)
        return values, arrays

    @rule(how=st.sampled_from(["eager", "eager", "own gradient"]), **STEP)
    def update(self, **drawn: Any) -> None:
        self.one_update(**drawn)

    @rule(**STEP)
    def compiled_update(self, **drawn: Any) -> None:
        self.one_update(how="compiled", **drawn)

    @rule(how=st.sampled_from(["eager", "compiled"]), count=st.integers(2, 6), **STEP)
    def updates_in_a_row(self, count: int, seed: int, **drawn: Any) -> None:
        for i in range(count):
            self.one_update(seed=seed + i, **drawn)

    def one_update(
        self, seed: int, some: int, layout: str, scale: float, dtype: str, how: str, place: int, is_ready: bool,
        spoils: str | None, keeps: int, then: str,
    ) -> None:  # fmt: skip
        self.rng = np.random.default_rng(seed)
        for _ in range(keeps):
            part, view = self.rng.choice(PARTS), self.rng.choice([*VIEWS, *OTHER_VIEWS])
            self.keep_one(int(self.rng.integers(99)), part, view, self.rng.random() < 0.5)
        model, known = self.model, list(self.model.tensors)
        paths = [path for i, path in enumerate(known) if some >> i & 1]
        if not paths:
            paths = known
        if not self.is_initialized and known[0] not in paths:
            paths.insert(0, known[0])  # an expression of the filter that matches nothing is rejected
        values, arrays = self.draw_gradients(paths, layout, scale, dtype)
        if how == "own gradient":
            parameters = self.arrays()
            values |= {path: model.tensors[path].value for path in paths}
            arrays |= {path: parameters[path] for path in paths}
            del parameters
        if spoils:
            self.spoil(spoils, values, arrays)
        if is_ready:
            mx.eval(arrays)
        gradients = self.tree_of(arrays)
        # In the order of the tree, which numbers the tensors.
        values = {path: values[path] for _, path in tree_flatten(self.tree_of({path: path for path in paths}))}
        del arrays
        known = self.loaded if self.loaded else model.paths_with_state if self.is_initialized else known
        if not set(paths) <= set(known):
            self.reject(partial(self.optimizer.apply_gradients, gradients, self.tree))
            return self.count("rejected update")
        if not self.is_initialized:
            model.init(paths)
            self.forget_compiled()
        stream = self.streams.all[place % len(self.streams.all)]
        with mx.stream(stream if place < 3 else mx.default_stream(mx.default_device())):
            if how == "compiled" and self.is_initialized and not self.turned & set(paths):
                self.compiled_step(paths)(gradients)
            else:
                merge(self.tree, self.optimizer.apply_gradients(gradients, self.tree))
                self.turned -= set(paths)
        del gradients
        guard = model.take_norm(values, self.optimizer.state)
        if guard[1]:
            self.compare_with_mlx(values, guard[0])
        else:
            self.counts["skipped steps"] += 1
        model.update(values, *guard)
        self.is_initialized, self.has_records, self.loaded = True, True, set()
        self.counts["tensors"] += len(paths)
        self.evaluate(then)
        self.count(f"update, {how}")

    def compiled_step(self, paths: list[str]) -> Callable[[Any], None]:
        key = tuple(paths)
        if key not in self.compiled:
            captured = [self.tree, self.optimizer.state]
            optimizer, tree = self.optimizer, self.tree

            def step(gradients: Any) -> None:
                merge(tree, optimizer.apply_gradients(gradients, tree))

            self.compiled[key] = mx.compile(step, inputs=captured, outputs=captured)
        return self.compiled[key]

    def spoil(self, by: str, values: dict[str, np.ndarray], arrays: dict[str, mx.array]) -> None:
        """An element of one gradient is not a number: for steps that are skipped, since all would be lost elsewhere."""
        options = self.model.options
        if not options.skip_nonfinite and (options.max_grad_norm or self.rng.random() < 0.9):
            return
        path = list(values)[int(self.rng.integers(len(values)))]
        if not values[path].size:
            return
        spoilt = values[path].copy()
        spoilt.reshape(-1)[int(self.rng.integers(spoilt.size))] = float(by)
        values[path], arrays[path] = spoilt, mx.array(spoilt).astype(arrays[path].dtype)

    def compare_with_mlx(self, gradients: dict[str, np.ndarray], scale: np.float32) -> None:
        """float32 throughout: the model itself must be mlx.optimizers, bit for bit."""
        after = self.model.copy()
        plain = [
            path
            for path, tensor in after.tensors.items()
            if path in gradients and tensor.dtype == tensor.state_dtype == mx.float32
        ]
        if not plain or not self.has_exact_scalars:
            return
        path = plain[int(self.rng.integers(len(plain)))]
        gradient = clipped(gradients[path], scale)
        expected = by_mlx(after, path, gradient)
        after.update({path: gradient})
        tensor = after.tensors[path]
        found = (tensor.value, tensor.moment("m"), tensor.moment("v"))
        for name, a, e in zip(("parameter", "m", "v"), found, expected, strict=True):
            assert_same(a, e, f"the model's {name} of {path}, against that of mlx.optimizers")

    def evaluate(self, how: str) -> None:
        if how == "lazy":
            return
        if how == "async":
            mx.async_eval(self.tree, self.optimizer.state)
            return
        if how == "parameters":
            mx.eval(self.tree)
            self.check_parameters()
        elif how == "state":
            mx.eval(self.optimizer.state)
            self.check_state()
        elif how == "one":
            arrays = self.arrays()
            path = list(arrays)[int(self.rng.integers(len(arrays)))]
            mx.eval(arrays.pop(path))
            return
        elif how == "item":
            self.optimizer.state["step"].item()
            return
        else:
            mx.eval(self.tree, self.optimizer.state)
            self.check_all()

    @rule(how=st.sampled_from(["eval", "eval", "async", "parameters", "state", "synchronize"]))
    def evaluate_what_is_pending(self, how: str) -> None:
        if how == "synchronize":
            mx.synchronize()
        else:
            self.evaluate(how)
        self.count("evaluation")

    # ---- Comparing ----

    def where(self, path: str, name: str) -> str:
        return f"{path}: {name} after step {self.model.step}"

    def check_parameters(self) -> None:
        arrays = self.arrays()
        assert len(tree_flatten(self.tree)) == len(arrays)
        for path, tensor in self.model.tensors.items():
            assert_array(arrays[path], tensor.value, tensor.dtype, self.where(path, "parameter"))

    def check_state(self) -> None:
        for path, state in self.states().items():
            tensor = self.model.tensors[path]
            dtypes = state_dtypes(tensor)
            assert set(state) == {*dtypes, *self.own_names}, self.where(path, f"state holds {sorted(state)}")
            for zeros, count in (state[name] for name in self.own_names):
                assert zeros.shape == (2, 3) and count["count"].item() == tensor.count, self.where(path, "own state")
            for name, dtype in dtypes.items():
                assert_array(state[name], tensor.state[name], dtype, self.where(path, name))
        if self.has_records:
            for name, (value, dtype) in self.model.guard.items():
                expected = np.asarray(value)
                assert_array(self.optimizer.state[name], expected, dtype, name)
        assert self.optimizer.step.item() == self.model.step
        found = self.optimizer.learning_rate.item()
        assert found == self.model.learning_rate, f"learning_rate {found}"

    def check_all(self) -> None:
        self.check_parameters()
        self.check_state()

    # ---- What is held ----

    def keep(self, handle: Handle) -> None:
        self.handles.append(handle)
        if len(self.handles) > MOST_HANDLES:
            self.handles.pop(0).check()

    @rule(
        which=st.integers(0, 99),
        part=st.sampled_from(PARTS),
        view=st.sampled_from([*VIEWS, *OTHER_VIEWS]),
        is_evaluated=st.booleans(),
    )
    def hold(self, which: int, part: str, view: str, is_evaluated: bool) -> None:
        self.keep_one(which, part, view, is_evaluated)
        self.count("hold")

    def keep_one(self, which: int, part: str, view: str, is_evaluated: bool) -> None:
        self.counts["handles"] += 1
        paths = list(self.model.tensors)
        path = paths[which % len(paths)]
        tensor = self.model.tensors[path]
        states = self.states()
        if part != "parameter" and path in states:
            names = sorted(tensor.state)
            name = names[which % len(names)] if part == "any" else part
            array, value = states[path][name], tensor.state[name]
        else:
            name, array, value = "parameter", self.arrays()[path], tensor.value
        what = f"{view} of {self.where(path, name)}"
        if view == "NumPy view":
            mx.eval(array)
            if array.dtype == mx.bfloat16 or not array.size:
                array = values_of(array)
            else:
                array = np.asarray(memoryview(array))
            return self.keep(Handle(what, array, value, False))
        if view == "doubled":
            if name != "parameter":
                return
            kept = array * 2
            expected = values_of(mx.array(value).astype(tensor.dtype) * 2)
        else:
            kept = VIEWS[view](array)
            expected = np.array(VIEWS[view](value))
        if is_evaluated:
            mx.eval(kept)
        self.keep(Handle(what, kept, expected, not is_evaluated))

    @rule(how=st.sampled_from(["newest", "all", "garbage", "cache"]))
    def let_go(self, how: str) -> None:
        if how == "newest" and self.handles:
            self.handles.pop().check()
        elif how == "all":
            for handle in self.handles:
                handle.check()
            self.handles.clear()
        elif how == "garbage":
            gc.collect()
        else:
            mx.clear_cache()
        self.count("let go")

    # ---- Changes from outside ----

    @rule(
        seed=st.integers(0, 2**32),
        which=st.integers(0, 99),
        how=st.sampled_from(["laid out", "laid out", "half", "of one buffer", "tied"]),
        layout=st.sampled_from(LAYOUTS),
        is_evaluated=st.booleans(),
    )
    def replace_a_parameter(self, seed: int, which: int, how: str, layout: str, is_evaluated: bool) -> None:
        self.rng = np.random.default_rng(seed)
        arrays, tensors = self.arrays(), self.model.tensors
        paths = list(tensors)
        path = paths[which % len(paths)]
        tensor = tensors[path]
        shape = tensor.value.shape
        new = {}
        if how == "half":
            new[path] = arrays[path] * 0.5
            value = values_of(mx.array(tensor.value).astype(tensor.dtype) * 0.5)
            self.model.replace(path, value)
        elif how == "laid out":
            layout = layout_for(shape, layout)
            value = repeated(random_values(self.rng, shape, 1.0, tensor.dtype), layout)
            new[path] = laid_out(value, tensor.dtype, layout, self.rng)
            self.model.replace(path, value)
        else:
            # Two parameters are parts of one buffer, or are one array.
            others = [
                other
                for other in paths
                if other != path
                and tensors[other].dtype == tensor.dtype
                and (how == "of one buffer" or tensors[other].value.shape == shape)
            ]
            for other in others[:1]:
                value = random_values(self.rng, shape, 1.0, tensor.dtype)
                if how == "tied":
                    new[path] = new[other] = mx.array(value).astype(tensor.dtype)
                    self.model.replace(path, value)
                    self.model.replace(other, value)
                    continue
                size, rest = tensor.value.size, tensors[other].value.size
                both = random_values(self.rng, (size + rest,), 1.0, tensor.dtype)
                buffer = mx.array(both).astype(tensor.dtype)
                new[path] = buffer[:size].reshape(shape)
                new[other] = buffer[size:].reshape(tensors[other].value.shape)
                self.model.replace(path, both[:size].reshape(shape))
                self.model.replace(other, both[size:].reshape(tensors[other].value.shape))
        if is_evaluated:
            mx.eval(new)
        del arrays
        merge(self.tree, self.tree_of(new))
        self.count("replaced parameter")

    @rule(which=st.integers(0, 99), layout=st.sampled_from(LAYOUTS[:7]), is_evaluated=st.booleans())
    def lay_out_a_state_anew(self, which: int, layout: str, is_evaluated: bool) -> None:
        """As a user's loader may: the same values in another layout."""
        states = self.states()
        places = [(path, name) for path in states for name in sorted(self.model.tensors[path].state)]
        if not places:
            return
        path, name = places[which % len(places)]
        state = states[path]
        layout = layout_for(state[name].shape, layout)
        dtype, tensor = state[name].dtype, self.model.tensors[path]
        if tensor.state_dtype in BITS_OF_CODES or name == "remainder":
            # Eager updates make these row-major; a compiled one that is not rejects (test_stress.py).
            is_evaluated = True
            self.turned.add(path)
        state[name] = laid_out(tensor.state[name], dtype, layout, self.rng)
        if is_evaluated:
            mx.eval(state[name])
        self.count("state laid out")

    @rule(
        what=st.sampled_from(["learning rate", "default stream", "threads"]),
        rate=st.sampled_from([1e-2, 1e-3, 0.0, 0.1]),
        number=st.integers(0, 11),
    )
    def set_something(self, what: str, rate: float, number: int) -> None:
        if what == "learning rate":
            self.optimizer.learning_rate = rate
            self.model.learning_rate = float(np.float32(rate))
        elif what == "default stream":
            mx.set_default_stream(self.streams.all[number % len(self.streams.all)])
        else:
            fused.set_num_threads(1 + number % 4)
        self.count(what)

    @rule(change=st.sampled_from(CHANGES))
    def assign_an_option(self, change: dict[str, Any]) -> None:
        name, value = next(iter(change.items()))
        options = self.changed(change)
        if options is None:
            return
        if is_forbidden(options):
            self.reject(lambda: setattr(self.optimizer, name, value))
            return self.count("rejected option")
        setattr(self.optimizer, name, value)
        if "master_weight_bits" in change:
            self.optimizer.master_weight_bits = change["master_weight_bits"]
        self.model.set_options(options)
        self.forget_compiled()
        if name not in ("betas", "eps", "weight_decay", "decay_filter"):
            self.is_initialized, self.has_records = False, True
        self.count("option")

    # ---- What must be rejected ----

    def reject(self, attempt: Callable[[], Any], optimizer: Any = None) -> None:
        """It raises, and every array of tree and state is the same object as before."""
        optimizer = optimizer or self.optimizer

        def everything() -> list[tuple[str, Any]]:
            return [*tree_flatten(self.tree), *tree_flatten(optimizer.state), (str(vars(optimizer._options)), "")]

        before = everything()
        # Around a subclass's rule, what is missing is named by MLX.
        kinds = (LookupError,) if self.model.options.adds == "a rule" else ()
        with pytest.raises((ValueError, TypeError, *kinds)):
            attempt()
        after = everything()
        assert [path for path, _ in after] == [path for path, _ in before]
        for (path, a), (_, b) in zip(after, before, strict=True):
            assert a is b, f"{path} was changed by what was rejected"

    @rule(
        which=st.integers(0, 99),
        how=st.sampled_from([
            "shape", "broadcast", "dtype", "unknown", "none", "betas", "eps", "weight_decay", "rate", "moment", "file",
        ]),
    )  # fmt: skip
    def ask_for_what_is_rejected(self, which: int, how: str) -> None:
        optimizer, parameters = self.optimizer, self.arrays()
        paths = list(parameters)
        path = paths[which % len(paths)]
        shape = parameters[path].shape
        gradients: dict[str, Any] = {k: mx.ones_like(x) for k, x in parameters.items()}
        set_back: list[tuple[Any, str, Any]] = []

        def spoil(name: str, value: Any) -> None:
            set_back.append((optimizer, name, getattr(optimizer, name)))
            setattr(optimizer, name, value)

        if how == "shape":
            gradients[path] = mx.ones((*shape, 2))
        elif how == "broadcast":
            gradients[path] = mx.ones((1, *shape))
        elif how == "dtype":
            gradients[path] = mx.ones(shape, mx.int32)
        elif how == "none":
            gradients[path] = None
        elif how == "betas":
            spoil("betas", [float("nan"), 0.9])
        elif how == "eps":
            spoil("eps", -1.0 if which % 2 else float("nan"))
        elif how == "weight_decay" and self.model.options.kind == "AdamW":
            spoil("weight_decay", float("inf"))
        elif how == "rate" and self.model.options.schedule is None:
            optimizer.state["learning_rate"] = mx.ones(2)
        elif how == "moment" and path in self.states():
            kept = self.states()[path]["m"]
            self.states()[path]["m"] = mx.zeros((*shape, 3))
        elif how == "file":
            file = self.folder / "rejected"
            file.write_bytes(b"\x10" * (which + 1))
            self.reject(lambda: fused.load_optimizer(file, optimizer))
            return self.count("rejected file")
        else:
            how = "unknown"
            gradients["nothing"] = mx.ones(3)
        tree = {"nothing": gradients.pop("nothing")} if how == "unknown" else {}
        tree = self.tree_of(gradients) | tree
        del parameters, gradients
        try:
            self.reject(lambda: optimizer.apply_gradients(tree, self.tree))
        finally:
            for target, name, value in set_back:
                setattr(target, name, value)
            if how == "rate":
                optimizer.learning_rate = self.model.learning_rate
            if how == "moment":
                self.states()[path]["m"] = kept
        self.count("rejected update")

    # ---- States that come and go ----

    def init_all(self) -> None:
        def form() -> list[Any]:
            tensors = self.model.tensors.values()
            return [(str(x.state_dtype), sorted(x.state or {})) for x in tensors]

        before = form()
        if self.loaded and len(self.loaded) < len(self.model.tensors):
            # Parameters of a later time get their state once those of the file have theirs.
            self.reject(lambda: self.optimizer.init(self.tree))
            arrays = self.arrays()
            self.optimizer.init(self.tree_of({path: x for path, x in arrays.items() if path in self.loaded}))
        self.optimizer.init(self.tree)
        self.model.init(list(self.model.tensors))
        self.is_initialized, self.has_records, self.loaded = True, True, set()
        if form() != before:
            self.forget_compiled()

    @rule()
    def init_again(self) -> None:
        self.init_all()
        self.count("init")

    @rule()
    def save(self) -> None:
        fused.save_optimizer(self.folder / "optimizer", self.optimizer)
        self.saved = self.model.copy()
        self.count("save")

    @precondition(lambda self: self.saved is not None)
    @rule(
        to=st.sampled_from(["itself", "new", "of other options", "of something else"]),
        change=st.sampled_from(CHANGES),
        side=st.sampled_from(["error", "file", "optimizer"]),
        is_init=st.booleans(),
    )
    def load(self, to: str, change: dict[str, Any], side: str, is_init: bool) -> None:
        model, saved = self.model, self.saved
        file = self.folder / "optimizer"
        load = partial(fused.load_optimizer, file, hyperparameters=side)
        if to == "of something else":
            other = self.made(model.options)
            other.init({"blocks": [{"weight": mx.ones(3)}]})
            self.reject(partial(load, other), other)
            return self.count("rejected load")
        if to != "itself":
            options = self.changed(change) if to == "of other options" else model.options
            if options is None or is_forbidden(options):
                return
            model.options = options
            self.make_optimizer()
            for path in model.paths_with_state:
                model.tensors[path] = dataclasses.replace(model.tensors[path], state=None)
            model.step, model.learning_rate = 0, Model(options, {}).learning_rate
            model.forget_guard()
            self.is_initialized, self.has_records, self.loaded = False, True, set()
        has_met = model.paths_with_state and not self.loaded
        after = model.options.after_load(saved.options, side)
        if after is None or has_met and set(model.paths_with_state) != set(saved.paths_with_state):
            self.reject(partial(load, self.optimizer))
            return self.count("rejected load")
        load(self.optimizer)
        if after != model.options:
            self.forget_compiled()
        for path in model.tensors:
            old = saved.tensors[path]
            new = dict(state=old.state, state_dtype=old.state_dtype, count=old.count)
            model.tensors[path] = dataclasses.replace(model.tensors[path], **new)
        model.step, model.grad_norm, model.skipped = saved.step, saved.grad_norm, saved.skipped
        model.set_options(after)
        if side != "optimizer" or after.schedule:
            model.learning_rate = saved.learning_rate
        self.is_initialized, self.has_records = False, True
        self.loaded = set(saved.paths_with_state)
        if is_init:
            self.init_all()
        self.count("load")

    @rule(is_adopted=st.booleans(), is_init=st.booleans())
    def go_by_mlx(self, is_adopted: bool, is_init: bool) -> None:
        """The state that mlx.optimizers would hold: compared, or adopted as well."""
        if not self.is_initialized or is_adopted and self.model.options.adds == "float32 moments":
            return
        model = self.model if is_adopted else self.model.copy()
        state = fused.stock_state(self.optimizer)
        model.to_mlx()
        assert not model.guard.keys() & state.keys()
        for path, tensor in model.tensors.items():
            if tensor.state is None:
                continue
            node = self.at(state, path)
            assert set(node) == {"m", "v", *self.own_names}, path
            for name in ("m", "v"):
                where = f"stock_state's {self.where(path, name)}"
                assert_array(node[name], tensor.state[name], tensor.dtype, where)
        if is_adopted:
            self.optimizer.state = state
            self.is_initialized = self.has_records = False
            model.forget_guard()
            self.forget_compiled()
            if is_init:
                self.init_all()
        self.count("stock_state")

    @rule(how=st.sampled_from(["deepcopy", "pickle"]), goes_on=st.booleans())
    def copy_the_optimizer(self, how: str, goes_on: bool) -> None:
        old = self.optimizer
        new = copy.deepcopy(old) if how == "deepcopy" else pickle.loads(pickle.dumps(old))
        other = old if goes_on else new
        if goes_on:
            self.optimizer = new
            self.forget_compiled()
        # The one that does not go on must stay as it is.
        kept = self.optimizer
        self.optimizer = other
        states = self.states()
        self.optimizer = kept
        for path, state in list(states.items())[:2]:
            tensor = self.model.tensors[path]
            for name in ("m", "v"):
                what = f"copied {self.where(path, name)}"
                self.keep(Handle(what, state[name], tensor.state[name], True))
        self.count(how)


# ---- Tests ----


def run_programs(attributes: dict[str, Any], programs: int, operations: int, capsys: pytest.CaptureFixture) -> None:
    """So many programs of the suite's own seed or, for a long run, random ones until so many operations are done."""
    counts: Counter[str] = Counter()
    machine = type("Programs", (Programs,), {**attributes, "counts": counts})
    chosen = settings(
        max_examples=programs,
        stateful_step_count=STEPS,
        derandomize=not operations,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    try:
        run_state_machine_as_test(machine, settings=chosen)
        while counts["operations"] < operations:
            run_state_machine_as_test(machine, settings=chosen)
    finally:
        told = ", ".join(f"{n} × {name}" for name, n in sorted(counts.items()))
        if operations:
            with capsys.disabled():
                print(f"\n{told}", flush=True)
    # Nothing is left out by what other rules make of a program; in few operations chance may leave out any.
    if counts["operations"] >= 10_000:
        for name in (
            "update, eager",
            "update, compiled",
            "load",
            "rejected update",
            "stock_state",
        ):
            assert counts[name] > counts["operations"] // 500, f"too few of {name!r}: {told}"


@pytest.fixture
def attributes(is_emulated: bool, has_exact_scalars: bool, tmp_path: Path) -> dict[str, Any]:
    return {
        "folder": tmp_path,
        "is_small": is_emulated,
        "has_exact_scalars": has_exact_scalars,
    }


@pytest.fixture
def programs(is_emulated: bool) -> int:
    if OPERATIONS:
        return 100
    return QUICK_PROGRAMS // 4 if is_emulated else QUICK_PROGRAMS


# First, since a stream lasts as long as its process, and with a single one updates wait for readers of what they
# change.
def test_programs_on_one_stream(attributes, programs, capsys):
    attributes["streams"] = Streams(0)
    run_programs(attributes, programs, OPERATIONS // 2, capsys)


def test_programs_on_several_streams(attributes, programs, capsys):
    attributes["streams"] = Streams(2)
    run_programs(attributes, programs, OPERATIONS // 2, capsys)
