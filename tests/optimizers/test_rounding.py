"""Stochastic rounding, bit for bit against a reference in NumPy, its statistics, and the dtypes of the optimizers'
state.
"""

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

import mlx_fused_adam as fused
from support.arrays import assert_same_bits, lay_out, random
from support.rounding_reference import bits_of_step, rounded
from support.training import train

pytestmark = pytest.mark.usefixtures("device")

HALVES = [mx.bfloat16, mx.float16]


def as_float64(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32)).astype(np.float64)


@pytest.mark.parametrize("layout", ["linear", "column-major", "strided columns"])
@pytest.mark.parametrize("shape", [(70, 90), (136, 72), (130, 257), (3, 5)], ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_bits_are_those_of_the_reference(dtype, shape, layout):
    rng = np.random.default_rng(0)
    # float16's subnormal numbers too: its moments are small here.
    scale = 1.0 if dtype == mx.bfloat16 else 1e-3
    p, m = random(rng, shape, dtype), random(rng, shape, dtype, scale)
    g, v = random(rng, shape, dtype, scale), mx.abs(random(rng, shape, dtype, scale**2))
    g = lay_out(g, layout)
    settings = dict(learning_rate=1e-2, step=7, weight_decay=0.1, bias_correction=True)
    exact = [x.astype(mx.float32) for x in (p, g, m, v)]
    expected = fused.adam_update(*exact, **settings)
    results = fused.adam_update(p, g, m, v, seed=2**40 + 5, **settings)
    bits = bits_of_step(2**40 + 5, 7, 0, p.size)
    for name, result, x in zip(("parameter", "m", "v"), results, expected, strict=True):
        assert result.dtype == dtype
        wanted = rounded(np.array(x), bits[name].reshape(shape), dtype)
        np.testing.assert_array_equal(as_float64(result), wanted, err_msg=name)
    nearest = fused.adam_update(p, g, m, v, **settings)
    if p.size > 100:
        assert any(not mx.array_equal(a, b) for a, b in zip(results, nearest, strict=True))


@pytest.mark.parametrize("asked, is_random", [(None, "parameter v"), (True, "parameter m v"), (False, "")])
def test_each_tensor_of_an_optimizer_has_bits_of_its_own(asked, is_random):
    rng = np.random.default_rng(1)
    parameters = {f"{i}": random(rng, (40 + i, 33), mx.bfloat16) for i in range(5)}
    parameters["large"] = random(rng, (400, 200), mx.bfloat16)
    gradients = {name: random(rng, p.shape, mx.bfloat16) for name, p in parameters.items()}
    optimizer = fused.Adam(1e-2, seed=3, stochastic_rounding=asked)
    results = optimizer.apply_gradients(gradients, parameters)
    for number, name in enumerate(parameters):
        zeros = mx.zeros(parameters[name].shape)
        exact = [x.astype(mx.float32) for x in (parameters[name], gradients[name])]
        expected = fused.adam_update(*exact, zeros, zeros, 1e-2)
        found = (results[name], optimizer.state[name]["m"], optimizer.state[name]["v"])
        bits = bits_of_step(3, 1, number, zeros.size)
        for what, result, x in zip(("parameter", "m", "v"), found, expected, strict=True):
            wanted = as_float64(x.astype(mx.bfloat16))
            if what in is_random.split():
                wanted = rounded(np.array(x), bits[what].reshape(zeros.shape), mx.bfloat16)
            np.testing.assert_array_equal(as_float64(result), wanted, err_msg=f"{name}.{what}")


@pytest.mark.cpu_only
def test_bits_do_not_depend_on_the_number_of_threads():
    rng = np.random.default_rng(2)
    p, g = (random(rng, (700, 501), mx.bfloat16) for _ in range(2))
    before = fused.num_threads()
    results = []
    try:
        for count in (1, 3):
            fused.set_num_threads(count)
            z = mx.zeros_like(p)
            results.append(fused.adam_update(p, g.T.reshape(p.shape), z, z, 0.1, step=1, seed=0))
            mx.eval(results)
    finally:
        fused.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert mx.array_equal(a, b)


def test_special_values():
    special = [np.inf, -np.inf, np.nan, 0.0, -0.0]
    p = mx.array(special * 20).astype(mx.bfloat16)
    zeros = mx.zeros_like(p)
    for dtype in HALVES:
        p = mx.array(special * 20).astype(dtype)
        result, m, v = fused.adam_update(p, zeros, zeros, zeros, 0.1, step=1, seed=0)
        assert mx.array_equal(result, p, equal_nan=True)
        assert mx.all(m == 0) and mx.all(v == 0)


@pytest.mark.cpu_only
def test_draws_are_uniform_and_uncorrelated():
    """The bits are the reference's, which the tests above find in the kernels. Five standard deviations of a million
    draws.
    """
    count = 10**6
    base = bits_of_step(0, 1, 0, count)
    others = {
        "next element": np.roll(base["v"], 1),
        "next but seven": np.roll(base["v"], 8),
        "next step": bits_of_step(0, 2, 0, count)["v"],
        "next tensor": bits_of_step(0, 1, 1, count)["v"],
        "next seed": bits_of_step(1, 1, 0, count)["v"],
        "m": base["m"],
        "parameter": base["parameter"],
    }
    for name, bits in {"v": base["v"], **others}.items():
        mean = bits.mean() / 65536
        assert abs(mean - 0.5) < 5 / np.sqrt(12 * count), name
    for name, bits in others.items():
        correlation = np.corrcoef(base["v"], bits)[0, 1]
        assert abs(correlation) < 5 / np.sqrt(count), name
    # One element, from step to step.
    steps = np.array([bits_of_step(0, step, 0, 64)["v"] for step in range(1, 2001)]) / 65536
    assert abs(steps.mean() - 0.5) < 5 / np.sqrt(12 * steps.size)
    lagged = np.corrcoef(steps[1:].ravel(), steps[:-1].ravel())[0, 1]
    assert abs(lagged) < 5 / np.sqrt(steps.size)


# ---- 16-bit training that mlx.optimizers gets wrong ----


def mean(x: mx.array) -> float:
    return x.astype(mx.float32).mean().item()


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_v_does_not_stick(dtype):
    ones = mx.ones(4096, dtype)
    optimizer = fused.Adam(1e-3)
    train(optimizer, {"w": ones}, [{"w": ones}] * 6000)
    v = optimizer.state["w"]["v"]
    assert v.dtype == mx.bfloat16
    assert abs(mean(v) / 0.9975 - 1) < 0.02
    nearest = fused.Adam(1e-3, stochastic_rounding=False)
    train(nearest, {"w": ones}, [{"w": ones}] * 3000)
    assert mean(nearest.state["w"]["v"]) < 0.5


def test_a_step_of_v_is_right_on_average():
    count = 20000
    old = mx.full((count,), 0.5, mx.bfloat16)
    for betas in ((0.9, 0.999), (0.9, 0.99)):
        v = fused.adam_update(old, old, old, old, 0.0, betas=betas, step=3, seed=1)[2]
        expected = betas[1] * 0.5 + (1 - betas[1]) * 0.25
        unit = 2.0**-9  # between 0.25 and 0.5
        assert abs(mean(v) - expected) < 5 * unit / np.sqrt(4 * count)


@pytest.mark.cpu_only
def test_weight_decay_moves_16_bit_weights():
    settings = dict(learning_rate=1e-4, weight_decay=0.1)
    ones, zeros = {"w": mx.ones(8192, mx.bfloat16)}, {"w": mx.zeros(8192, mx.bfloat16)}
    exact = (1 - 1e-5) ** 2000
    stochastic = train(fused.AdamW(**settings), ones, [zeros] * 2000)
    assert abs(mean(stochastic["w"]) - exact) < 1e-3
    nearest = train(fused.AdamW(**settings, stochastic_rounding=False), ones, [zeros] * 200)
    assert mean(nearest["w"]) == 1.0  # as documented


@pytest.mark.parametrize("rounding", [None, True])
def test_a_compiled_function_of_the_state_repeats_the_bits_of_its_seed(rounding):
    """The state goes through the compiled function as an argument and a result."""
    rng = np.random.default_rng(3)
    start = {"a": random(rng, (60, 50), mx.bfloat16), "b": random(rng, (9,), mx.bfloat16)}
    gradients = [{k: random(rng, p.shape, mx.bfloat16) for k, p in start.items()} for _ in range(6)]
    whole, other, compiled = (fused.AdamW(1e-2, stochastic_rounding=rounding, seed=seed) for seed in (5, 6, 5))
    expected = train(whole, start, gradients)
    compiled.init(start)

    @mx.compile
    def step(parameters, g, state):
        compiled.state = state
        compiled._initialized = True
        new = compiled.apply_gradients(g, parameters)
        return new, compiled.state

    found, state = start, compiled.state
    for g in gradients:
        found, state = step(found, g, state)
    assert_same_bits([found, state], [expected, whole.state])
    train(other, start, gradients)
    assert not mx.array_equal(other.state["a"]["v"], whole.state["a"]["v"])


# ---- Dtypes of the state ----


@pytest.mark.parametrize("asked", [None, "float32", "bfloat16", mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", [mx.float32, *HALVES], ids=str)
@pytest.mark.parametrize("by_init", [True, False])
def test_state_has_the_dtype_asked_for(dtype, asked, by_init):
    parameters = {"w": mx.ones((5, 4), dtype)}
    gradients = {"w": mx.ones((5, 4), mx.bfloat16)}
    optimizer = fused.Adam(1e-3, state_dtype=asked)
    if by_init:
        optimizer.init(parameters)
    new = optimizer.apply_gradients(gradients, parameters)
    default = "float32" if dtype == mx.float32 else "bfloat16"
    wanted = str(asked or default).removeprefix("mlx.core.")
    assert new["w"].dtype == dtype
    for name in ("m", "v"):
        assert str(optimizer.state["w"][name].dtype).endswith(wanted), name


@pytest.mark.parametrize("asked", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [mx.float32, *HALVES], ids=str)
def test_a_state_of_another_dtype_is_converted(dtype, asked):
    parameters = {"a": {"w": mx.ones((5, 4), dtype)}}
    gradients = {"a": {"w": mx.full((5, 4), 0.5, dtype)}}
    other = optim.Adam(1e-3)
    other.apply_gradients(gradients, parameters)
    optimizer = fused.Adam(1e-3, state_dtype=asked)
    optimizer.state = other.state
    before = {name: other.state["a"]["w"][name] for name in ("m", "v")}
    optimizer.init(parameters)
    wanted = optimizer._options.dtype_of_moments(parameters["a"]["w"])
    for name, x in before.items():
        found = optimizer.state["a"]["w"][name]
        assert found.dtype == wanted
        assert mx.array_equal(found, x.astype(wanted)), name
    optimizer.apply_gradients(gradients, parameters)
    assert optimizer.state["step"].item() == 2


def test_float32_is_untouched_by_the_rounding_options():
    rng = np.random.default_rng(4)
    parameters = {"w": random(rng, (33, 40), mx.float32)}
    gradients = {"w": random(rng, (33, 40), mx.float32)}
    results = [
        fused.AdamW(1e-2, stochastic_rounding=rounding).apply_gradients(gradients, parameters)["w"]
        for rounding in (None, True, False)
    ]
    assert all(mx.array_equal(results[0], x) for x in results[1:])
