"""State in 8 and 4 bits and exact master weights: bit for bit against a reference in NumPy, and against training in
float32.
"""

import copy
import pickle

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten, tree_unflatten

import mlx_fused_adam as fused
from support.arrays import DTYPES, assert_same_bits, bits, lay_out, random
from support.rounding_reference import bits_of_step, rounded
from support.storage_reference import decode, draws_of_step, encode, joined, upper_half
from support.training import copied, train

pytestmark = pytest.mark.usefixtures("device")

STATE_DTYPES = ["float32", "bfloat16", "int8", "int4"]
QUANTIZED = pytest.mark.parametrize("state_dtype", ["int8", "int4"])
BITS = {"int8": 8, "int4": 4}
SETTINGS = dict(learning_rate=1e-2, weight_decay=0.1, bias_correction=True)
LAYOUTS = ["linear", "all axes reversed", "strided columns"]


def to_numpy(x: mx.array) -> np.ndarray:
    return np.array(x.astype(mx.float32) if x.dtype == mx.bfloat16 else x)


def full_value(parameter: mx.array, state: dict) -> np.ndarray:
    return joined(bits(parameter), np.array(state["remainder"]).astype(np.int64))


# ---- Codes ----


def decoded(state: dict, name: str, columns: int | None = None) -> np.ndarray:
    """A quantized moment; of 4 bits by default of an even row."""
    bits = 4 if state["m"].dtype == mx.uint8 else 8
    return decode(name, np.array(state[name]), to_numpy(state[f"{name}_scale"]), bits, columns)


def assert_codes_are_right(parameter: mx.array, gradients: list[mx.array], seed: int, state_dtype: str) -> None:
    """Every step of an optimizer against float32 arithmetic between the reference's load and store."""
    optimizer = fused.AdamW(**SETTINGS, state_dtype=state_dtype, seed=seed)
    optimizer.init({"w": parameter})
    state = optimizer.state["w"]
    for step, g in enumerate(gradients, 1):
        before = [mx.array(decoded(state, k, parameter.shape[-1])) for k in "mv"]
        exact = fused.adam_update(parameter.astype(mx.float32), g.astype(mx.float32), *before, step=step, **SETTINGS)
        parameter = optimizer.apply_gradients({"w": g}, {"w": parameter})["w"]
        draws = draws_of_step(seed, step, 0, parameter.shape)
        w = np.array(exact[0])
        if parameter.dtype != mx.float32:
            w = rounded(w, bits_of_step(seed, step, 0, w.size)["parameter"].reshape(w.shape), parameter.dtype)
        np.testing.assert_array_equal(to_numpy(parameter), w, f"w, step {step}")
        for name, x in zip("mv", exact[1:], strict=True):
            codes, scales = encode(name, np.array(x), draws[name], BITS[state_dtype])
            where = f"{name} of {parameter.shape}, step {step}"
            np.testing.assert_array_equal(to_numpy(state[f"{name}_scale"]), scales, where)
            np.testing.assert_array_equal(np.array(state[name]), codes, where)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(128, 40), (64, 64), (4, 33, 40), (36, 3, 70), (70, 2, 64), (4097,), (2, 2050), (33, 151)], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@QUANTIZED
def test_quantized_state_is_that_of_the_reference(state_dtype, dtype, shape, layout):
    rng = np.random.default_rng(0)
    gradients = [lay_out(random(rng, shape, dtype), layout) for _ in range(3)]
    gradients[1] = gradients[1] * mx.array(np.exp(rng.normal(size=shape) * 3).astype(np.float32))
    gradients[1] = lay_out(mx.clip(gradients[1], -1e3, 1e3).astype(dtype), layout)
    assert_codes_are_right(random(rng, shape, dtype), gradients, 2**40 + 5, state_dtype)


@pytest.mark.cpu_only
@given(
    row=st.integers(32, 300),
    extra=st.integers(0, 40),
    outer=st.sampled_from([(), (1,), (3,)]),
    layout=st.sampled_from(LAYOUTS),
    scale=st.sampled_from([1e-30, 1e-6, 1.0, 1e15]),
    seed=st.integers(0, 2**64 - 1),
    state_dtype=st.sampled_from(["int8", "int4"]),
)
def test_quantized_state_of_any_shape_and_scale(row, extra, outer, layout, scale, seed, state_dtype):
    shape = (*outer, -(-4096 // row) + extra, row)
    rng = np.random.default_rng(seed % 1000)
    gradients = [lay_out(random(rng, shape) * scale, layout) for _ in range(2)]
    assert_codes_are_right(random(rng, shape), gradients, seed, state_dtype)


@pytest.mark.cpu_only
@given(
    exponents=st.lists(st.integers(-149, 127), min_size=1, max_size=45),
    seed=st.integers(0, 99),
    bits=st.sampled_from([8, 4]),
)
def test_conversion_is_to_nearest_and_back(exponents, seed, bits, extension):
    rng = np.random.default_rng(seed)
    x = np.ldexp(rng.uniform(0.5, 1, (8, len(exponents))), exponents).astype(np.float32)
    for name in "mv":
        values = x * np.where(rng.random(x.shape) < 0.5, -1, 1) if name == "m" else x
        codes, scales = extension.quantize_moment(mx.array(values.astype(np.float32)), name == "v", bits)
        expected = encode(name, values.astype(np.float32), np.full(x.shape, 0x8000), bits)
        np.testing.assert_array_equal(np.array(codes), expected[0], name)
        np.testing.assert_array_equal(to_numpy(scales), expected[1], name)
        columns = x.shape[-1]
        found = np.array(extension.dequantize_moment(codes, scales, name == "v", columns if bits == 4 else None))
        np.testing.assert_array_equal(found, decode(name, *expected, bits, columns), name)
        if name == "v":
            assert ((found > 0) == (x > 0)).all()


@QUANTIZED
def test_a_gradient_that_is_not_finite_spoils_its_own_weight_alone(state_dtype):
    shape = (128, 40)
    for bad in (np.inf, -np.inf, np.nan):
        g = np.full(shape, 0.5, np.float32)
        g[3, 7] = bad
        optimizer = fused.Adam(1e-2, state_dtype=state_dtype)
        parameters = train(optimizer, {"w": mx.ones(shape)}, [{"w": mx.array(g)}] * 3)
        finite = np.isfinite(np.array(parameters["w"]))
        assert not finite[3, 7] and finite.sum() == finite.size - 1
        state = optimizer.state["w"]
        for name in "mv":
            assert np.isfinite(decoded(state, name)).all(), name


@QUANTIZED
def test_zero_gradients_move_nothing(state_dtype):
    parameters = {"w": random(np.random.default_rng(0), (70, 90))}
    optimizer = fused.Adam(1e-2, state_dtype=state_dtype)
    new = train(optimizer, parameters, [{"w": mx.zeros((70, 90))}] * 4)
    assert mx.array_equal(new["w"], parameters["w"])
    assert not mx.any(optimizer.state["w"]["m"]) and not mx.any(optimizer.state["w"]["v"])


@pytest.mark.cpu_only
@QUANTIZED
def test_weights_whose_gradients_stop_come_to_rest(state_dtype):
    """Beside others that go on, so that their block's scales stay."""
    rng = np.random.default_rng(0)
    alive = np.arange(64) % 2 == 0
    parameters = {"w": mx.zeros((64, 64))}
    optimizer = fused.Adam(1e-2, state_dtype=state_dtype)
    both = [{"w": random(rng, (64, 64))} for _ in range(20)]
    half = [{"w": g["w"] * mx.array(alive.astype(np.float32))} for g in both]
    parameters = train(optimizer, parameters, both + half * 30)
    m, v = (decoded(optimizer.state["w"], name) for name in "mv")
    assert not m[:, ~alive].any() and m[:, alive].any()
    assert v[:, ~alive].all()


@pytest.mark.cpu_only
@QUANTIZED
def test_quantized_v_reaches_its_value(state_dtype):
    ones = mx.ones((64, 64))
    optimizer = fused.Adam(1e-3, state_dtype=state_dtype)
    parameters = {"w": ones}
    for _ in range(6000):
        parameters = optimizer.apply_gradients({"w": ones}, parameters)
        mx.eval(parameters, optimizer.state)
    v = decoded(optimizer.state["w"], "v")
    assert abs(v.mean() / 0.9975 - 1) < 0.02


@pytest.mark.parametrize(
    ("shape", "is_coded"),
    [((128, 32), True), ((4096,), True), ((4095,), False), ((132, 31), False), ((), False),
     ((8, 16, 32), True), ((0, 64), False)],
    ids=str,
)  # fmt: skip
@QUANTIZED
def test_small_parameters_keep_bfloat16(state_dtype, shape, is_coded):
    optimizer = fused.Adam(1e-3, state_dtype=state_dtype)
    parameters = train(optimizer, {"w": mx.ones(shape)}, [{"w": mx.ones(shape)}])
    state = optimizer.state["w"]
    assert parameters["w"].shape == shape
    if is_coded:
        assert state["m"].dtype == {"int8": mx.int8, "int4": mx.uint8}[state_dtype] and state["v"].dtype == mx.uint8
        packed = (*shape[:-1], -(-shape[-1] * BITS[state_dtype] // 8))
        assert state["m"].shape == state["v"].shape == packed
        scales = (*shape[:-1], -(-shape[-1] // 32))
        assert state["m_scale"].shape == state["v_scale"].shape == scales
    else:
        assert state.keys() == {"m", "v"} and state["m"].dtype == state["v"].dtype == mx.bfloat16


@pytest.mark.cpu_only
@QUANTIZED
def test_quantized_state_does_not_depend_on_the_number_of_threads(state_dtype):
    rng = np.random.default_rng(2)
    parameters = {"w": random(rng, (300, 501), mx.bfloat16)}
    gradients = [{"w": lay_out(random(rng, (300, 501), mx.bfloat16), x)} for x in LAYOUTS]
    before, states = fused.num_threads(), []
    try:
        for count in (1, 3):
            fused.set_num_threads(count)
            optimizer = fused.AdamW(**SETTINGS, state_dtype=state_dtype, master_weights=True)
            train(optimizer, parameters, gradients)
            states.append(optimizer.state)
    finally:
        fused.set_num_threads(before)
    assert_same_bits(*states)


# ---- Master weights ----


@pytest.mark.parametrize("rounding", [None, True])
@pytest.mark.parametrize("state_dtype", STATE_DTYPES)
def test_master_weights_are_those_of_float32_training(state_dtype, rounding):
    rng = np.random.default_rng(0)
    shapes = {"a": (64, 100), "b": (33, 40, 5), "c": (5000,), "d": (7,), "e": (64, 64), "f": ()}
    start = {k: random(rng, shape, mx.bfloat16) for k, shape in shapes.items()}
    options = dict(SETTINGS, state_dtype=state_dtype, seed=3, stochastic_rounding=rounding)
    master, exact = fused.AdamW(**options, master_weights=True), fused.AdamW(**options)
    parameters, weights = start, {k: p.astype(mx.float32) for k, p in start.items()}
    for step in range(6):
        gradients = {
            k: lay_out(random(rng, shape, mx.bfloat16), LAYOUTS[step % 3] if shape else "linear")
            for k, shape in shapes.items()
        }
        parameters = master.apply_gradients(gradients, parameters)
        weights = exact.apply_gradients(gradients, weights)
        for k in shapes:
            where = f"{k}, step {step + 1}"
            full = full_value(parameters[k], master.state[k])
            np.testing.assert_array_equal(full, np.array(weights[k]), where)
            np.testing.assert_array_equal(bits(parameters[k]), upper_half(full), where)
            for name, x in exact.state[k].items():
                assert mx.array_equal(master.state[k][name], x), f"{name} of {where}"


def test_a_parameter_changed_from_outside_costs_half_a_unit_at_most():
    rng = np.random.default_rng(1)
    zeros = mx.zeros((40, 50), mx.bfloat16)
    optimizer = fused.Adam(1e-2, master_weights=True)
    train(optimizer, {"w": zeros + 1}, [{"w": random(rng, (40, 50), mx.bfloat16)}] * 3)
    optimizer.learning_rate = 0.0
    changed = random(rng, (40, 50), mx.bfloat16)
    changed[0, :4] = mx.array([0.0, -0.0, float("inf"), float("-inf")])
    changed[0, 4] = float("nan")
    assert mx.any(optimizer.state["w"]["remainder"][0, :5] != 0)
    kept = optimizer.apply_gradients({"w": zeros}, {"w": changed})["w"]
    full = full_value(kept, optimizer.state["w"])
    old = to_numpy(changed)
    assert np.isnan(full[0, 4])
    # Half a unit below infinity is near the largest float.
    assert full[0, 2] > 3.39e38 and full[0, 3] < -3.39e38
    rest = np.isfinite(old)
    unit = np.exp2(np.floor(np.log2(np.maximum(np.abs(old[rest]), 2.0**-126))) - 7)
    assert (np.abs(full[rest] - old[rest]) <= unit / 2).all()


def test_the_least_significant_bits_survive_where_bfloat16_loses_them():
    ones, zeros = mx.ones((64, 64), mx.bfloat16), mx.zeros((64, 64), mx.bfloat16)
    optimizer = fused.AdamW(1e-4, weight_decay=0.1, master_weights=True)
    parameters = train(optimizer, {"w": ones}, [{"w": zeros}] * 50)
    full = full_value(parameters["w"], optimizer.state["w"])
    np.testing.assert_allclose(full, (1 - 1e-5) ** 50, rtol=1e-5)
    assert (full < 0.9996).all()


def test_float32_parameters_need_no_correction_and_float16_ones_are_rejected():
    optimizer = fused.Adam(1e-2, master_weights=True)
    optimizer.init({"w": mx.ones(3)})
    assert optimizer.state["w"].keys() == {"m", "v"}
    for by_init in (True, False):
        optimizer = fused.AdamW(1e-2, master_weights=True)
        parameters = {"a": mx.ones(3), "b": [mx.ones(3, mx.float16)]}
        with pytest.raises(ValueError, match=r"\[AdamW\] parameter of b.0 must be bfloat16 or float32"):
            optimizer.init(parameters) if by_init else optimizer.apply_gradients(parameters, parameters)
        assert optimizer.step.item() == 0


@pytest.mark.cpu_only
def test_what_mlx_gets_wrong_in_16_bits_is_right():
    """float16 with zero gradients is NaN in mlx.optimizers; bfloat16's decay sticks; see also test_rounding."""
    for options in ({}, {"stochastic_rounding": True}, {"state_dtype": "int8"}):
        ones, zeros = mx.ones((64, 64), mx.float16), mx.zeros((64, 64), mx.float16)
        parameters = train(fused.AdamW(1e-2, **options), {"w": ones}, [{"w": zeros}] * 3)
        assert mx.all(mx.isfinite(parameters["w"])), options
    parameters = train(optim.AdamW(1e-2), {"w": ones}, [{"w": zeros}] * 3)
    assert mx.any(mx.isnan(parameters["w"]))


# ---- States ----

OPTIONS = {
    "float32": dict(state_dtype="float32"),
    "bfloat16": dict(state_dtype="bfloat16"),
    "int8": dict(state_dtype="int8"),
    "master": dict(master_weights=True),
    "master int8": dict(master_weights=True, state_dtype="int8"),
    "24-bit master": dict(master_weights=True, master_weight_bits=24),
    "int4": dict(state_dtype="int4"),
    "24-bit master int4": dict(master_weights=True, master_weight_bits=24, state_dtype="int4"),
}
BYTES = {
    "float32": 2 + 8,
    "bfloat16": 2 + 4,
    "int8": 2 + 2 + 4 / 32,
    "master": 2 + 4 + 2,
    "master int8": 2 + 2 + 4 / 32 + 2,
    "24-bit master": 2 + 4 + 1,
    "int4": 2 + 1 + 4 / 32,
    "24-bit master int4": 2 + 1 + 4 / 32 + 1,
}


@pytest.mark.parametrize("name", OPTIONS)
def test_bytes_of_weights_and_state(name):
    parameters = {"w": mx.ones((128, 128), mx.bfloat16)}
    optimizer = fused.Adam(1e-3, **OPTIONS[name])
    parameters = train(optimizer, parameters, [{"w": mx.ones((128, 128), mx.bfloat16)}])
    arrays = tree_flatten([parameters, optimizer.state["w"]])
    assert sum(x.nbytes for _, x in arrays) == BYTES[name] * 128 * 128


STOCHASTIC = dict(stochastic_rounding=True, seed=5)


@pytest.mark.parametrize("options", [*OPTIONS.values(), {}, STOCHASTIC], ids=str)
def test_resumed_and_compiled_runs_repeat_the_bits(options, has_exact_scalars, tmp_path):
    options = SETTINGS | {"bias_correction": has_exact_scalars} | options
    rng = np.random.default_rng(3)
    start = {"a": random(rng, (70, 90), mx.bfloat16), "b": [random(rng, (9,), mx.bfloat16)]}

    def gradients():
        return {"a": random(rng, (90, 70), mx.bfloat16).T, "b": [random(rng, (9,), mx.bfloat16)]}

    steps = [gradients() for _ in range(6)]
    whole = fused.AdamW(**options)
    expected = train(whole, start, steps)

    half = fused.AdamW(**options)
    parameters = train(half, start, steps[:3])
    path = str(tmp_path / "state.safetensors")
    mx.save_safetensors(path, dict(tree_flatten(half.state)))
    resumed = fused.AdamW(**options)
    resumed.state = tree_unflatten(list(mx.load(path).items()))
    assert_same_bits(train(resumed, parameters, steps[3:]), expected)
    assert_same_bits(resumed.state, whole.state)

    again = fused.AdamW(**options)
    assert_same_bits(train(again, start, steps, is_compiled=True), expected)
    assert_same_bits(again.state, whole.state)


def state_of(name: str, parameters: dict, gradients: list[dict]) -> dict:
    """A state of so many steps as mlx.optimizers or one of the options stores it, beside new parameters."""
    optimizer = optim.Adam(1e-2) if name == "mlx.optimizers" else fused.Adam(1e-2, **OPTIONS[name])
    train(optimizer, parameters, gradients)
    return optimizer.state


@pytest.mark.parametrize("is_saved", [False, True])
@pytest.mark.parametrize("to", OPTIONS)
@pytest.mark.parametrize("given_by", ["mlx.optimizers", *OPTIONS])
def test_any_state_is_adopted(given_by, to, is_saved, tmp_path):
    rng = np.random.default_rng(4)
    parameters = {
        "a": {"w": random(rng, (64, 70), mx.bfloat16)},
        "b": [random(rng, (9,), mx.bfloat16)],
    }
    gradients = [{"a": {"w": random(rng, (64, 70), mx.bfloat16)}, "b": [random(rng, (9,), mx.bfloat16)]}]
    state = state_of(given_by, parameters, gradients * 3)
    if is_saved:
        mx.save_safetensors(str(tmp_path / "s.safetensors"), dict(tree_flatten(state)))
        state = tree_unflatten(list(mx.load(str(tmp_path / "s.safetensors")).items()))
    values = {
        path: {k: value_of(node, k) for k in "mv"} for path, node in (("a.w", state["a"]["w"]), ("b.0", state["b"][0]))
    }
    optimizer = fused.Adam(1e-2, **OPTIONS[to])
    optimizer.state = state
    optimizer.init(parameters)
    fresh = fused.Adam(1e-2, **OPTIONS[to])
    fresh.init(parameters)
    assert [(k, x.dtype, x.shape) for k, x in sorted(tree_flatten(optimizer.state["a"]))] == [
        (k, x.dtype, x.shape) for k, x in sorted(tree_flatten(fresh.state["a"]))
    ]
    for path, node in (("a.w", optimizer.state["a"]["w"]), ("b.0", optimizer.state["b"][0])):
        for k in "mv":
            found, old = value_of(node, k), values[path][k]
            if node[k].dtype in (mx.int8, mx.uint8):
                is_4_bit = node["m"].dtype == mx.uint8
                rtol, atol = (1.0, 0.02) if is_4_bit else (0.5, 1e-4)
                np.testing.assert_allclose(found, old, rtol=rtol, atol=atol * np.abs(old).max())
            else:
                np.testing.assert_array_equal(found, to_numpy(mx.array(old).astype(node[k].dtype)))
    train(optimizer, parameters, gradients)
    assert optimizer.state["step"].item() == 4


def value_of(state: dict, name: str) -> np.ndarray:
    if f"{name}_scale" in state:
        return decoded(state, name)
    return to_numpy(state[name])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPTIONS)
def test_mlx_optimizers_go_on_with_stock_state(name, dtype):
    rng = np.random.default_rng(5)
    parameters = {"a": {"w": random(rng, (64, 70), dtype)}, "b": [random(rng, (9,), dtype)]}
    gradients = {"a": {"w": random(rng, (64, 70), dtype)}, "b": [random(rng, (9,), dtype)]}
    optimizer, reference = fused.AdamW(1e-2, **OPTIONS[name]), optim.AdamW(1e-2)
    parameters = train(optimizer, parameters, [gradients] * 2)
    before = dict(tree_flatten(optimizer.state))
    tree = fused.stock_state(optimizer)
    reference.init(parameters)
    assert [(k, x.dtype, x.shape) for k, x in sorted(tree_flatten(tree))] == [
        (k, x.dtype, x.shape) for k, x in sorted(tree_flatten(reference.state))
    ]
    for k in "mv":
        expected = mx.array(value_of(optimizer.state["a"]["w"], k)).astype(dtype)
        assert mx.array_equal(tree["a"]["w"][k], expected), k
    reference.state = tree
    train(reference, parameters, [gradients])
    assert reference.state["step"].item() == 3
    after = dict(tree_flatten(optimizer.state))
    assert before.keys() == after.keys() and all(before[k] is after[k] for k in before)


def test_stock_state_needs_parameters_that_were_seen():
    optimizer = fused.Adam(1e-2)
    optimizer.state = {"layers": [{"w": {"m": mx.zeros(3), "v": mx.zeros(3)}}]}
    with pytest.raises(ValueError, match=r"parameter of layers.0.w but got none: call optimizer.init"):
        fused.stock_state(optimizer)
    optimizer.init({"layers": [{"w": mx.zeros(3, mx.float16)}]})
    assert fused.stock_state(optimizer)["layers"][0]["w"]["m"].dtype == mx.float16
    with pytest.raises(TypeError, match="must be an Adam, AdamW or MultiOptimizer of mlx_fused_adam but got"):
        fused.stock_state(optim.Adam(1e-2))


def test_stock_state_knows_all_parameters_that_init_has_seen():
    """Also those that the last init did not have, being frozen."""
    optimizer = fused.Adam(1e-2)
    parameters = {"a": mx.ones(3, mx.float16), "b": mx.ones(3, mx.bfloat16)}
    optimizer.init(parameters)
    optimizer.init({"b": parameters["b"]})
    tree = fused.stock_state(optimizer)
    assert {k: tree[k]["m"].dtype for k in parameters} == {"a": mx.float16, "b": mx.bfloat16}


def broken(key: str, value) -> dict:
    optimizer = fused.Adam(1e-2, state_dtype="int8", master_weights=True)
    optimizer.init({"a": {"w": mx.ones((64, 64), mx.bfloat16)}})
    state = optimizer.state["a"]["w"]
    state.pop(key) if value is None else state.update({key: value})
    return optimizer.state


WRONG = [
    ("m", mx.ones((64, 64), mx.int32), "m of a.w must be floating or mlx.core.int8 with a scale but got"),
    ("m", mx.ones((64, 64), mx.uint8), r"m of a.w must have shape \(64, 32\), two values to a byte, but got \(64, 64"),
    ("m", mx.ones((64, 32), mx.uint8), r"v of a.w must have shape \(64, 32\), two values to a byte, but got \(64, 64"),
    ("v", mx.ones((64, 64), mx.int8), "v of a.w must be floating or mlx.core.uint8 with a scale but"),
    ("v", None, "state of a.w must hold v but got nothing"),
    ("m_scale", None, "m_scale of a.w must be there, since m is mlx.core.int8, but got nothing"),
    ("v_scale", mx.ones((64, 3), mx.bfloat16), r"v_scale of a.w must be bfloat16 of shape \(64, 2\)"),
    ("m_scale", mx.ones((64, 2)), "m_scale of a.w must be bfloat16 of shape .* but got mlx.core.float32"),
    ("m_scale", "1", "m_scale of a.w must be an array but got '1'"),
    ("remainder", mx.ones((64, 64)), "remainder of a.w must be int16, or int8 for 24 bits, but got mlx.core.float32"),
    ("remainder", mx.ones(3, mx.int16), r"remainder of a.w must have the parameter's shape \(64, 64\)"),
    ("m", mx.ones((64, 65)), "m of a.w must have the parameter's shape"),
    ("v", mx.ones((64, 65), mx.uint8), "v of a.w must have the parameter's shape"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "message"), WRONG, ids=str)
def test_a_state_that_does_not_fit_is_rejected_by_its_path(key, value, message):
    parameters = {"a": {"w": mx.ones((64, 64), mx.bfloat16)}}
    optimizer = fused.Adam(1e-2, state_dtype="int8", master_weights=True)
    optimizer.state = broken(key, value)
    before = dict(tree_flatten(optimizer.state))
    for use in (optimizer.init, lambda p: optimizer.apply_gradients(p, p)):
        with pytest.raises((ValueError, TypeError), match=message):
            use(parameters)
        after = dict(tree_flatten(optimizer.state))
        assert all(after[k] is x for k, x in before.items()), "the state has changed"
    optimizer.state = fused.Adam(1e-2).state
    train(optimizer, parameters, [parameters])
    assert optimizer.state["step"].item() == 1


@pytest.mark.parametrize(("key", "value", "message"), [
    ("m_scale", mx.ones((64, 3), mx.bfloat16), "m_scale of a.w must be .*bfloat16 of shape"),
    ("m_scale", None, "m_scale of a.w must be an array of .*bfloat16 but got nothing"),
    ("remainder", None, "state of a.w must hold a remainder for master_weights but got none"),
    ("remainder", mx.ones((64, 64), mx.int8), "remainder of a.w must be .*int16 for master_weight_bits=32 but got"),
    ("remainder", mx.ones((64, 3), mx.int16), "remainder of a.w must be .*int16 of shape"),
    ("m", mx.ones((64, 64)), "v of a.w must be float32, bfloat16 or float16 but got uint8"),
])  # fmt: skip
def test_a_state_spoilt_between_updates_is_rejected_too(key, value, message):
    parameters = {"a": {"w": mx.ones((64, 64), mx.bfloat16)}}
    optimizer = fused.Adam(1e-2, state_dtype="int8", master_weights=True)
    optimizer.init(parameters)
    good = dict(optimizer.state["a"]["w"])
    state = optimizer.state["a"]["w"]
    state.pop(key) if value is None else state.update({key: value})
    with pytest.raises(ValueError, match=message):
        optimizer.apply_gradients(parameters, parameters)
    assert optimizer.step.item() == 0
    state.update(good)
    train(optimizer, parameters, [parameters])


def test_a_rejected_init_leaves_no_state_behind():
    optimizer = fused.AdamW(1e-3, master_weights=True)
    before = dict(optimizer.state)
    with pytest.raises(ValueError, match="parameter of h must be bfloat16 or float32"):
        optimizer.init({"a": mx.ones(3, mx.bfloat16), "h": mx.ones(3, mx.float16)})
    assert dict(optimizer.state) == before
    optimizer.init({"a": mx.ones(3, mx.bfloat16)})
    assert set(optimizer.state["a"]) == {"m", "v", "remainder"}


def test_a_rejected_init_leaves_none_in_the_containers_of_before():
    optimizer = fused.AdamW(1e-3, master_weights=True)
    parameters = {"a": {"w": mx.ones(3, mx.bfloat16)}, "l": [{"w": mx.ones(3)}]}
    optimizer.init(parameters)
    before = dict(tree_flatten(optimizer.state))
    more = {"a": parameters["a"] | {"b": mx.ones(3)}, "l": [parameters["l"][0] | {"h": mx.ones(3, mx.float16)}]}
    for use in (optimizer.init, lambda p: optimizer.apply_gradients(p, p)):
        with pytest.raises(ValueError, match="h"):
            use(more)
        after = dict(tree_flatten(optimizer.state))
        assert after.keys() == before.keys() and all(after[k] is x for k, x in before.items())


@pytest.mark.parametrize("name", OPTIONS)
def test_an_optimizer_can_be_copied_and_pickled(name):
    parameters = {"a": mx.ones((64, 70), mx.bfloat16)}
    optimizer = fused.AdamW(1e-2, **OPTIONS[name])
    parameters = train(optimizer, parameters, [parameters] * 2)
    copies = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    expected = train(optimizer, parameters, [parameters])
    for other in copies:
        assert_same_bits(train(other, parameters, [parameters]), expected)
        assert_same_bits(other.state, optimizer.state)


@pytest.mark.cpu_only
def test_quantized_state_of_parameters_that_become_float64_is_dequantized_by_init():
    parameters = {"w": mx.ones((128, 32))}
    optimizer = fused.Adam(1e-3, state_dtype="int8")
    parameters = train(optimizer, parameters, [{"w": mx.full((128, 32), 1e-3)}] * 20)
    expected = value_of(optimizer.state["w"], "m")
    wide = {"w": parameters["w"].astype(mx.float64)}
    quantized = dict(optimizer.state["w"])
    for plain in ({}, {"m": wide["w"]}, {"v": wide["w"]}):
        optimizer.state["w"].update(quantized | plain)
        with pytest.raises(ValueError, match="state of w must not be quantized for a parameter of .*float64"):
            optimizer.apply_gradients(wide, wide)
    optimizer.state["w"].update(quantized)
    optimizer.init(wide)
    assert optimizer.state["w"]["m"].dtype == mx.float64
    np.testing.assert_array_equal(np.array(optimizer.state["w"]["m"]), expected)
    train(optimizer, wide, [wide])


@pytest.mark.cpu_only
@pytest.mark.parametrize("spike", [1e15, 1e19, 1e22, 3e38, -3e38])
def test_a_huge_gradient_moves_its_weight_no_further_than_it_may(spike):
    """v overflows; in float32 the update is 0 from then on."""
    g = np.ones((128, 32), np.float32)
    spiked = g.copy()
    spiked[:, 0] = spike
    steps = [{"w": mx.array(x)} for x in [g] * 9 + [spiked] + [g] * 10]
    optimizer = fused.Adam(1e-3, state_dtype="int8")
    weights = np.array(train(optimizer, {"w": mx.zeros((128, 32))}, steps)["w"])
    assert np.isfinite(weights).all() and np.abs(weights).max() < 0.2


def test_a_state_is_converted_inside_a_shapeless_trace():
    parameters = {"w": mx.ones((64, 70))}
    other = optim.Adam(1e-2)
    train(other, parameters, [parameters])
    optimizer = fused.Adam(1e-2, state_dtype="int8")

    def step(parameters, state):
        optimizer.state = state
        return optimizer.apply_gradients(parameters, parameters)["w"]

    state = copied(other.state)
    expected = step(parameters, copied(state))
    found = mx.compile(step, shapeless=True)(parameters, state)
    assert mx.array_equal(found, expected)


def test_a_change_of_the_parameters_dtype_is_rejected():
    parameters = {"w": mx.ones((64, 64), mx.bfloat16)}
    optimizer = fused.Adam(1e-2, master_weights=True)
    optimizer.init(parameters)
    with pytest.raises(
        ValueError, match="state of w must hold no remainder .* but got one beside mlx.core.float32: call init"
    ):
        optimizer.apply_gradients(parameters, {"w": mx.ones((64, 64))})


def test_moments_that_are_not_row_major_keep_their_values():
    rng = np.random.default_rng(6)
    parameters, g = (
        {"w": random(rng, (64, 96), mx.bfloat16)},
        {"w": random(rng, (64, 96), mx.bfloat16)},
    )
    plain = fused.Adam(1e-2, state_dtype="int8", master_weights=True)
    train(plain, parameters, [g] * 2)
    turned = fused.Adam(1e-2, state_dtype="int8", master_weights=True)
    turned.state = copied(plain.state)
    turned.init(parameters)
    for name, x in turned.state["w"].items():
        turned.state["w"][name] = mx.contiguous(x.T).T
    mx.eval(turned.state)
    state = dict(plain.state["w"])
    expected = plain.apply_gradients(g, parameters)
    found = turned.apply_gradients(g, parameters)
    assert state["m"] is not plain.state["w"]["m"]
    assert_same_bits(found, expected)
    assert_same_bits(turned.state["w"], plain.state["w"])


def test_a_compiled_update_of_quantized_state_that_is_not_row_major_is_an_error():
    parameters = {"w": mx.ones((64, 96), mx.bfloat16)}
    optimizer = fused.Adam(1e-2, state_dtype="int8")
    optimizer.init(parameters)
    captured = [parameters, optimizer.state]

    @mx.compile
    def step(parameters, m):
        optimizer.state["w"]["m"] = m
        optimizer._initialized = True
        return optimizer.apply_gradients(parameters, parameters)

    with pytest.raises(ValueError, match="must be row-major"):
        mx.eval(step(parameters, mx.contiguous(mx.zeros((96, 64), mx.int8)).T))
    del captured


def test_derivatives_and_vmap_are_rejected():
    parameter = mx.ones((64, 64), mx.bfloat16)
    for options, word in (
        ({"state_dtype": "int8"}, "int8"), ({"state_dtype": "int4"}, "int4"), ({"master_weights": True}, "master"),
    ):  # fmt: skip
        optimizer = fused.Adam(1e-2, **options)
        optimizer.init({"w": parameter})
        state = dict(optimizer.state["w"])

        def loss(g, optimizer=optimizer, state=state):
            optimizer.state["w"] = dict(state)
            return optimizer.apply_gradients({"w": g}, {"w": parameter})["w"].sum()

        with pytest.raises(ValueError, match=word):
            mx.eval(mx.grad(loss)(parameter))


def test_a_model_is_trained_with_all_options():
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(96, 64), nn.ReLU(), nn.Linear(64, 96))
    model.set_dtype(mx.bfloat16)
    optimizer = fused.AdamW(1e-3, state_dtype="int8", master_weights=True, stochastic_rounding=True, seed=1)
    x = mx.random.normal((16, 96)).astype(mx.bfloat16)
    loss_and_gradients = nn.value_and_grad(model, lambda m, x: (m(x) - x).square().mean())
    losses = []
    for _ in range(30):
        loss, gradients = loss_and_gradients(model, x)
        optimizer.update(model, gradients)
        mx.eval(loss, model.parameters(), optimizer.state)
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    assert optimizer.state["layers"][0]["weight"]["m"].dtype == mx.int8
    assert optimizer.state["layers"][0]["bias"]["m"].dtype == mx.bfloat16
