"""A step allocates nothing that grows with the parameters, and no array that anyone still holds ever changes."""

import ast
from functools import partial
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_fused_adam as fused
from support import oracle, training
from support.arrays import DTYPES, address, random
from support.mlx_release import errors_in_tasks_are_raised
from support.processes import output_of_python

pytestmark = pytest.mark.usefixtures("device")

# Bytes that a step may allocate whatever the size of the model: the step's scalars, counters.
CONSTANT = 1 << 12


@pytest.fixture
def parameters_of(is_emulated):
    """parameters_of(dtype): a large matrix and some small tensors; smaller where every access is checked."""
    return partial(make_parameters, 96 if is_emulated else 600)


def make_parameters(side, dtype=mx.float32):
    shapes = {"matrix": (side, side + 8), "bias": (side,), "scalar": (), "conv": (4, 3, 3, 2)}
    return {name: mx.random.normal(shape).astype(dtype) for name, shape in shapes.items()}


def column_major_gradients(parameters):
    return {name: mx.random.normal(p.shape[::-1]).astype(p.dtype).T for name, p in parameters.items()}


def total_bytes(tree) -> int:
    return sum(x.nbytes for _, x in tree_flatten(tree))


def measure_step(step, count=3) -> int:
    """The most memory that any of a few steps holds beyond what was held before it, after one to warm up."""
    step()
    mx.synchronize()
    most = 0
    for _ in range(count):
        mx.clear_cache()
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        step()
        mx.synchronize()
        most = max(most, mx.get_peak_memory() - before)
    return most


OPTIONS = [
    (mx.float32, {}),
    (mx.bfloat16, {}),
    (mx.float32, {"state_dtype": "int8"}),
    (mx.float32, {"state_dtype": "int4"}),
    (mx.float32, {"state_dtype": "bfloat16"}),
    (mx.bfloat16, {"stochastic_rounding": True}),
    (mx.bfloat16, {"master_weights": True}),
    (mx.bfloat16, {"master_weights": True, "master_weight_bits": 24}),
    (mx.bfloat16, {"state_dtype": "int8", "master_weights": True}),
]


@pytest.mark.parametrize(("dtype", "options"), OPTIONS, ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_step_allocates_nothing_that_grows(parameters_of, compiled, dtype, options):
    parameters = parameters_of(dtype)
    gradients = column_major_gradients(parameters)
    optimizer = fused.AdamW(1e-3, bias_correction=True, **options)
    optimizer.init(parameters)
    state = [parameters, optimizer.state]
    mx.eval(state, gradients)
    run = (training.compiled if compiled else training.eager)(optimizer, parameters)

    def step():
        run(gradients)
        mx.eval(state)

    extra = measure_step(step)
    assert extra < CONSTANT < total_bytes(parameters), f"{extra} bytes more than before the step"


def moved(*arguments: str) -> str:
    """The output of ordinary_loop.py in a process of its own: with streams of other tests about, waiting for readers
    would not be safe, and is not done."""
    return output_of_python(Path(__file__).with_name("ordinary_loop.py"), *arguments)


@pytest.mark.cpu_only
@pytest.mark.parametrize("compiled", ["eager", "compiled"])
def test_the_ordinary_loop_moves_nothing(compiled):
    """A model and optimizer.update, forward and backward pass in the same evaluation, buffers seen from outside.

    The norm's weight may get a new buffer, where the backward pass reads it after its update's turn; no moment may.
    """
    assert set(ast.literal_eval(moved(compiled, "at-once", "cpu").removeprefix("moved: "))) <= {"0.layers.1.weight"}


@pytest.mark.parametrize("compiled", ["eager", "compiled"])
def test_nothing_moves_once_gradients_are_evaluated(compiled, process_device):
    """On any device: the recipe for a GPU, where a parameter that has just been read may get a new buffer otherwise."""
    assert moved(compiled, "gradients-first", process_device) == "moved: []\n"


@pytest.mark.parametrize(
    "retained",
    [
        pytest.param(True, id="inside grad"),
        pytest.param(False, id="after an error", marks=errors_in_tasks_are_raised),
    ],
)
def test_what_is_needed_again_is_kept(device, retained):
    """An evaluation inside grad keeps its graph; one that failed can be tried again."""
    x = mx.random.normal((64,))
    if retained:

        def loss(w, evaluate):
            w, m, v = fused.adam_update(w * 1, w * 0.5, w * 0.1, w * w, 0.1)
            if evaluate:
                mx.eval(w, m, v)
            return (w * w).sum() + m.sum() + v.sum()

        gradients = [mx.grad(lambda w, e=e: loss(w, e))(x) for e in (True, False)]
        assert mx.allclose(*gradients).item()
        return
    w, z = mx.ones((8, 8)), mx.zeros((8, 8))
    mx.eval(w, z)
    pending = [w * 1]  # a reader of the parameter, so that the update would wait for the failing task
    with mx.stream(mx.cpu):
        gradient = w + mx.linalg.inv(z)
    results = fused.adam_update(w, gradient, z * 1, z * 1, 0.1)
    for result in [*results, *results, *pending]:
        try:
            mx.eval(result)
        except RuntimeError as error:
            assert "LU factorization failed" in str(error)
    new = fused.adam_update(w, w, z, z, 0.1, eps=0.0)[0]
    np.testing.assert_allclose(np.array(new), 1 - 0.1 * 0.1 / 0.001**0.5, rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(200, 1100), (1100, 1000), (70, 16700)], ids=str)
def test_no_element_is_updated_twice(device, is_emulated, assert_equal, shape, dtype):
    """Tiles of a column-major gradient, cut where cache lines begin, meet without a gap or an overlap.

    Only in place does an element of two tiles show, since it is updated from a value that is new already.
    """
    if is_emulated and shape != (200, 1100):
        shape = (130, 140)  # a block of tiles is smaller on a GPU
    rng = np.random.default_rng(0)

    w, transposed, m, v = (random(rng, s, dtype) for s in (shape, shape[::-1], shape, shape))
    v = mx.abs(v)
    addresses = [address(x) for x in (w, m, v)]
    if device == "cpu":
        assert address(w) % 64 and address(transposed) % 64, "no shift where cache lines begin"
    inputs = [w, transposed.T, m, v]
    mx.eval(inputs)
    del w, transposed, m, v
    before = [oracle.to_numpy(x) for x in inputs]
    mx.synchronize()  # the casts to NumPy's dtypes hold what they have read until their handlers have run
    settings = oracle.Settings(learning_rate=0.1)
    results = fused.adam_update(*inputs, **settings.arguments(1))
    inputs.clear()
    mx.eval(results)
    assert [address(x) for x in results] == addresses
    expected = oracle.adam(*before, 1, settings, oracle.stepwise)
    slacks = (oracle.slack_on_gpu(before[0], expected[0], 1, settings), 0.0, 0.0)
    for name, actual, reference, slack in zip("wmv", results, expected, slacks, strict=True):
        assert_equal(actual, reference, name, slack)


def test_a_buffer_in_another_order_is_not_donated(device):
    """Nobody holds these, but their rows are not where a row-major output has them."""

    def column_major():
        return mx.contiguous(mx.arange(6.0).reshape(2, 3).T).T

    inputs = [column_major(), mx.zeros((2, 3)), column_major(), column_major()]
    mx.eval(inputs)
    results = fused.adam_update(*inputs, 0.0, betas=(0.5, 0.5))
    inputs.clear()
    for result, scale in zip(results, (1, 0.5, 0.5), strict=True):
        np.testing.assert_array_equal(np.array(result), np.arange(6.0).reshape(2, 3) * scale)


@pytest.mark.parametrize("weight_decay", [0.0, 0.5], ids=["one scalar", "three scalars"])
def test_what_a_queued_update_reads_stays_alive(device, weight_decay):
    """Gradient, learning rate and what is made of it are dropped, and their memory used again, before the update
    runs.
    """
    size = 1 << 14
    slow = mx.ones((700, 700))
    mx.eval(slow)
    for _ in range(5):
        w, g, m, v = mx.ones(size), mx.ones(size), mx.zeros(size), mx.zeros(size)
        rate = mx.array(0.5)
        mx.eval(w, g, m, v, rate)
        busy = slow @ slow @ slow
        results = fused.adam_update(w, g, m, v, rate, betas=(0.0, 0.0), eps=0.0, weight_decay=weight_decay)
        mx.async_eval(busy, *results)
        del g, rate
        junk = [mx.array(np.full(size, 7.0, np.float32)) for _ in range(4)]
        # As many as it takes for small allocations to come round to the memory just freed.
        junk += [mx.array([9.0] * n) for _ in range(300) for n in (1, 3)]
        expected = 1 - 0.5 * weight_decay - 0.5
        np.testing.assert_allclose(np.array(results[0]), expected, rtol=1e-6)
        np.testing.assert_array_equal(np.array(results[1]), 1.0)
        del junk


def test_results_that_nobody_waits_for(device):
    """Queued and dropped before they are computed: no crash, and the next result is right."""
    w, g = mx.ones(5000), mx.ones(5000)
    m, v = mx.zeros(5000), mx.zeros(5000)
    mx.eval(w, g, m, v)
    for _ in range(50):
        mx.async_eval(fused.adam_update(w, g, m, v, 0.1))
    mx.async_eval(fused.adam_update(mx.ones(5000), mx.ones(5000), m, v, 0.1))
    new, _, _ = fused.adam_update(w, g, m, v, 0.1, eps=0.0)
    np.testing.assert_allclose(np.array(new), 1 - 0.1 * 0.1 / 0.001**0.5, rtol=1e-5)


@pytest.mark.parametrize("held", ["parameters", "m", "v", "gradients"])
def test_what_is_held_never_changes(parameters_of, held):
    parameters = parameters_of()
    optimizer = fused.AdamW(0.1)
    optimizer.init(parameters)
    for _ in range(3):
        gradients = column_major_gradients(parameters)
        mx.eval(parameters, optimizer.state, gradients)
        keep = {
            "parameters": dict(parameters),
            "m": {k: optimizer.state[k]["m"] for k in parameters},
            "v": {k: optimizer.state[k]["v"] for k in parameters},
            "gradients": gradients,
        }[held]
        copies = {k: np.array(x) for k, x in keep.items()}
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
        for k, x in keep.items():
            np.testing.assert_array_equal(np.array(x), copies[k], err_msg=f"old {held} {k}")
        assert not mx.array_equal(parameters["matrix"], mx.array(copies["matrix"])).item()


def test_views_and_pending_uses_of_old_values_never_change(device):
    """A NumPy view, an MLX slice and an unevaluated expression all outlive the step."""
    w, g = mx.random.normal((64,)), mx.random.normal((64,))
    m, v = mx.zeros(64), mx.zeros(64)
    mx.eval(w, g, m, v)
    copy = np.array(w)
    view = np.asarray(memoryview(m))
    part = w[8:24]
    mx.eval(part)
    pending = w * 2
    w, m, v = fused.adam_update(w, g, m, v, 0.1)
    mx.eval(w, m, v)
    np.testing.assert_array_equal(view, np.zeros(64, np.float32))
    np.testing.assert_array_equal(np.array(part), copy[8:24])
    np.testing.assert_array_equal(np.array(pending), copy * 2)
    assert not np.array_equal(np.array(w), copy)


def test_one_buffer_behind_two_parameters(device):
    """Tied or sliced parameters that share a buffer each get a result of their own."""
    whole = mx.random.normal((2, 50))
    mx.eval(whole)
    copy = np.array(whole)
    parameters = {"a": whole[0], "b": whole[1], "tied": whole[0]}
    del whole
    optimizer, reference = fused.Adam(0.1), optim.Adam(0.1)
    gradients = {k: mx.full((50,), i + 1.0) for i, k in enumerate(parameters)}
    expected = reference.apply_gradients(
        gradients, {"a": mx.array(copy[0]), "b": mx.array(copy[1]), "tied": mx.array(copy[0])}
    )
    parameters = optimizer.apply_gradients(gradients, parameters)
    for k in parameters:
        np.testing.assert_allclose(np.array(parameters[k]), np.array(expected[k]), rtol=1e-6, atol=1e-7, err_msg=k)


def test_memory_is_returned(parameters_of):
    """Many steps, nothing left behind."""
    parameters = parameters_of()
    optimizer = fused.Adam(1e-3)
    held = []
    for i in range(20):
        gradients = {k: mx.full(p.shape, 0.1) for k, p in parameters.items()}
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
        del gradients
        mx.synchronize()
        if i >= 3:
            held.append(mx.get_active_memory())
    assert max(held) - min(held) < CONSTANT, held
