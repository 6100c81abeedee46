"""State in 4 bits, beside what test_state_formats.py asks of it: rows of odd length, whose last byte is half used;
conversions from and to every other state; bytes.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_fused_adam as fused
from support.arrays import assert_same_bits, bits, lay_out, random
from support.storage_reference import decode
from support.training import copied, train

pytestmark = pytest.mark.usefixtures("device")

SETTINGS = dict(learning_rate=1e-2, weight_decay=0.1, bias_correction=True)
SHAPE = (64, 71)  # of odd rows
STATE_DTYPES = ["float32", "bfloat16", "int8", "int4"]


def tree(seed: int, shape: tuple[int, ...] = SHAPE) -> dict[str, mx.array]:
    return {"w": random(np.random.default_rng(seed), shape, mx.bfloat16)}


def started(state_dtype: str | None, count: int = 3, **options) -> tuple[fused.AdamW, dict[str, mx.array]]:
    optimizer = fused.AdamW(**SETTINGS, state_dtype=state_dtype, **options)
    return optimizer, train(optimizer, tree(0), [tree(seed) for seed in range(1, count + 1)])


def value_of(state: dict, name: str, columns: int = SHAPE[-1]) -> np.ndarray:
    """A moment's float32 values."""
    moment = state[name]
    if f"{name}_scale" not in state:
        return np.array(moment.astype(mx.float32))
    bits_of_code = 4 if state["m"].dtype == mx.uint8 else 8
    scale = np.array(state[f"{name}_scale"].astype(mx.float32))
    return decode(name, np.array(moment), scale, bits_of_code, columns)


@pytest.mark.parametrize(("options", "expected"), [
    ({}, 3.125), ({"master_weights": True, "master_weight_bits": 24}, 4.125),
], ids=str)  # fmt: skip
def test_bytes_of_weights_and_state(options, expected):
    parameters = tree(0, (512, 1024)) | {"b": mx.ones(64, mx.bfloat16)}
    optimizer = fused.AdamW(1e-3, state_dtype="int4", **options)
    parameters = train(optimizer, parameters, [parameters])
    total = sum(x.nbytes for _, x in tree_flatten([parameters, optimizer.state]))
    assert total / sum(x.size for x in parameters.values()) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("to", STATE_DTYPES)
@pytest.mark.parametrize("given", STATE_DTYPES)
def test_an_assignment_converts_the_state(given, to):
    """To the values nearest to what was stored; those that fit already are the same objects."""
    optimizer, parameters = started(given)
    before = dict(optimizer.state["w"])
    optimizer.state_dtype = to
    optimizer.init(parameters)
    state = optimizer.state["w"]
    fresh = fused.AdamW(**SETTINGS, state_dtype=to)
    fresh.init(parameters)
    assert {k: (x.dtype, x.shape) for k, x in state.items()} == {
        k: (x.dtype, x.shape) for k, x in fresh.state["w"].items()
    }
    if given == to:
        assert all(state[k] is x for k, x in before.items())
    for name in "mv":
        old, new = value_of(before, name), value_of(state, name)
        if to == "int4":  # within half the widest gap of levels, of the block's largest
            blocks = np.pad(np.abs(old), ((0, 0), (0, 25))).reshape(64, 3, 32).max(axis=-1)
            allowed = np.repeat(blocks, 32, axis=1)[:, :71] * {"m": 0.14, "v": 0.18}[name]
            assert (np.abs(new - old) <= allowed).all()
        else:
            np.testing.assert_allclose(new, old, rtol=0.04, atol=2e-3 * np.abs(old).max())
    train(optimizer, parameters, [tree(9)])


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float64], ids=str)
def test_mlx_optimizers_take_the_state_of_odd_rows(dtype, device):
    """Whose parameters must say that they are odd; float64 ones, on the CPU, by init as well."""
    if dtype == mx.float64 and device != "cpu":
        pytest.skip("MLX has float64 on the CPU alone")
    optimizer = fused.AdamW(**SETTINGS, state_dtype="int4")
    start = {"w": tree(0)["w"].astype(mx.float32 if dtype == mx.float64 else dtype)}
    parameters = train(optimizer, start, [tree(1), tree(2)])
    expected = {name: value_of(optimizer.state["w"], name) for name in "mv"}
    if dtype == mx.float64:
        parameters = {"w": parameters["w"].astype(dtype)}
        with pytest.raises(ValueError, match="state of w must not be quantized for a parameter of .*float64"):
            optimizer.apply_gradients(parameters, parameters)
        optimizer.init(parameters)
        found = optimizer.state["w"]
    else:
        found = fused.stock_state(optimizer)["w"]
        reference = optim.AdamW(**SETTINGS)
        reference.state = fused.stock_state(optimizer)
        train(reference, parameters, [tree(3)])
        assert reference.state["step"].item() == 3
    for name, x in expected.items():
        assert found[name].dtype == dtype and found[name].shape == SHAPE
        assert mx.array_equal(found[name], mx.array(x).astype(dtype)), name


@pytest.mark.parametrize("layout", ["linear", "column-major", "strided"])
@pytest.mark.parametrize("scale", [1.0, float("nan")])
def test_the_half_of_a_byte_that_is_no_element_s_stays_zero(extension, layout, scale):
    """Even where clipping makes NaN of every gradient, and of zeros beyond the row's end."""
    rng = np.random.default_rng(0)
    gradient = lay_out(random(rng, SHAPE), layout)
    state = {}
    for name in "mv":
        x = mx.abs(random(rng, SHAPE))
        state[name], state[f"{name}_scale"] = extension.quantize_moment(x, name == "v", 4)
    step = extension.AdamStep(mx.array(0.01), mx.array(1), rounding="parameter_and_v", gradient_scale=mx.array(scale))
    _, (new,) = extension.adam_update(
        [random(rng, SHAPE)], [gradient], [state], step, uses_kernel=lambda *_: True, name=str
    )
    for codes in (state["m"], state["v"], new["m"], new["v"]):
        assert codes.shape == (64, 36)
        assert not (np.array(codes)[:, -1] >> 4).any()


@pytest.mark.cpu_only
def test_threads_do_not_meet_in_a_byte():
    """Rows so long, and of such a length, that one thread ends where another begins."""
    shape = (3, 2**16 + 7)
    gradients = [
        {"w": lay_out(random(np.random.default_rng(seed), shape), layout)}
        for seed, layout in enumerate(("linear", "column-major", "strided columns"))
    ]
    before, found = fused.num_threads(), []
    try:
        for count in (1, 4):
            fused.set_num_threads(count)
            optimizer = fused.AdamW(**SETTINGS, state_dtype="int4")
            found.append([train(optimizer, {"w": mx.ones(shape)}, gradients * 2), optimizer.state])
    finally:
        fused.set_num_threads(before)
    assert_same_bits(*found)


# ---- Files ----


@pytest.mark.parametrize("is_initialized", [False, True])
@pytest.mark.parametrize(
    ("of_file", "to"), [*((x, "int4") for x in STATE_DTYPES), *(("int4", x) for x in STATE_DTYPES[:3])]
)
def test_files_of_other_states_are_taken_by_an_optimizer_that_has_one(of_file, to, is_initialized, tmp_path):
    first, parameters = started(of_file)
    fused.save_optimizer(tmp_path / "o", first)
    other = fused.AdamW(**SETTINGS, state_dtype=to)
    if is_initialized:
        other.init(parameters)
    if of_file != to:
        with pytest.raises(ValueError, match=rf"state_dtype \(file: '{of_file}', optimizer: '{to}'\)"):
            fused.load_optimizer(tmp_path / "o", other)
    fused.load_optimizer(tmp_path / "o", other, hyperparameters="optimizer")
    reference = fused.AdamW(**SETTINGS, state_dtype=to)
    reference.state = copied(first.state)
    found, expected = (train(o, parameters, [tree(4)]) for o in (other, reference))
    assert_same_bits(found, expected)
    assert_same_bits(other.state, reference.state)
    by_file = fused.AdamW(**SETTINGS, state_dtype=to)
    if is_initialized:
        by_file.init(parameters)
    fused.load_optimizer(tmp_path / "o", by_file, hyperparameters="file")
    assert by_file.state_dtype == of_file
    assert_same_bits(train(by_file, parameters, [tree(4)]), train(first, parameters, [tree(4)]))


@pytest.mark.parametrize(("shape", "to"), [((64, 73), "int8"), ((64, 69), "int4"), ((65, 71), "bfloat16")], ids=str)
def test_a_file_of_other_shapes_is_rejected(shape, to, tmp_path):
    first, _ = started("int4")
    fused.save_optimizer(tmp_path / "o", first)
    other = fused.AdamW(**SETTINGS, state_dtype=to)
    other.init(tree(0, shape))
    packed = (*shape[:-1], -(-shape[-1] // 2))
    message = rf"must hold w.m of shape \({packed[0]}, {packed[1]}\) but got shape \(64, 36\)"
    with pytest.raises(ValueError, match=message):
        fused.load_optimizer(tmp_path / "o", other, hyperparameters="optimizer")


def test_a_state_of_other_rows_is_named_at_its_first_use():
    first, _ = started("int4")
    other = fused.AdamW(**SETTINGS, state_dtype="int4")
    other.state = copied(first.state)
    with pytest.raises(
        ValueError, match=r"m of w must have shape \(64, 37\), two values to a byte, but got \(64, 36\)"
    ):
        other.init(tree(0, (64, 73)))


# ---- Subclasses, and what the operation rejects ----


def test_a_subclass_may_add_to_the_state_of_init_single():
    class Counted(fused.AdamW):
        def init_single(self, parameter, state):
            super().init_single(parameter, state)
            state["count"] = mx.array(0)

    optimizer, plain = Counted(**SETTINGS, state_dtype="int4"), fused.AdamW(**SETTINGS, state_dtype="int4")
    found, expected = (train(o, tree(0), [tree(1), tree(2)]) for o in (optimizer, plain))
    assert_same_bits(found, expected)
    assert optimizer.state["w"].keys() == {"m", "v", "m_scale", "v_scale", "count"}
    assert optimizer.state["w"]["m"].dtype == mx.uint8 and optimizer.state["w"]["m"].shape == (64, 36)


def test_conversions_reject_what_does_not_fit(extension):
    x = mx.ones((4, 33))
    codes, scales = extension.quantize_moment(x, False, 4)
    assert codes.shape == (4, 17) and scales.shape == (4, 2)
    np.testing.assert_allclose(np.array(extension.dequantize_moment(codes, scales, False, 33)), 1, rtol=0.01)
    for arguments, message in (
        ((codes, scales, False, 35), r"a moment of 35 columns in 4 bits must have shape \(4,18\) but got \(4,17\)"),
        ((codes.astype(mx.int8), scales, False, 33), "must be uint8 but got int8"),
        ((codes, scales[:, :1], True, 33), r"scales must be bfloat16 of shape \(4,2\)"),
        ((codes.astype(mx.int32), scales), "must be int8 or uint8 but got int32"),
    ):
        with pytest.raises(ValueError, match=message):
            extension.dequantize_moment(*arguments)
    with pytest.raises(ValueError, match="bits must be 8 or 4 but got 5"):
        extension.quantize_moment(x, False, 5)
    with pytest.raises(ValueError, match="must have an axis to be quantized but got a scalar"):
        extension.quantize_moment(mx.array(1.0), False, 4)


@pytest.mark.parametrize(("name", "value", "message"), [
    ("m", mx.zeros(SHAPE, mx.uint8), r"m of w must have shape \(64,36\) but got \(64,71\)"),
    ("v", mx.zeros((64, 35), mx.uint8), r"v of w must have shape \(64,36\) but got \(64,35\)"),
    ("v_scale", mx.zeros((64, 2), mx.bfloat16), r"v_scale of w must be bfloat16 of shape \(64,3\)"),
    ("m_scale", None, "m_scale of w must be an array of bfloat16 but got nothing"),
    ("m", mx.zeros(SHAPE, mx.int8), r"v of w must have the parameter's shape \(64,71\) but got \(64,36\)"),
], ids=str)  # fmt: skip
def test_a_state_spoilt_between_updates_is_rejected(name, value, message):
    optimizer, parameters = started("int4")
    state = optimizer.state["w"]
    state.pop(name) if value is None else state.update({name: value})
    with pytest.raises(ValueError, match=message):
        optimizer.apply_gradients(parameters, parameters)


def test_levels_are_within_their_bound():
    """What a value is stored as is one of its two neighbours; v is never 0; blocks have scales of their own."""
    rng = np.random.default_rng(3)
    g = rng.normal(size=(128, 96)) * np.exp2(rng.integers(-30, 30, size=(128, 3))).repeat(32, axis=1)
    gradients = {"w": mx.array(g.astype(np.float32))}
    optimizer = fused.AdamW(1e-3, state_dtype="int4")
    train(optimizer, {"w": mx.zeros((128, 96))}, [gradients])
    for name, exact in (("m", 0.1 * g), ("v", 0.001 * g * g)):
        found = value_of(optimizer.state["w"], name, 96)
        largest = np.abs(exact).reshape(128, 3, 32).max(axis=-1, keepdims=True)
        off = np.abs(found - exact).reshape(128, 3, 32) / largest
        assert off.max() < {"m": 0.27, "v": 0.35}[name]
        assert name == "m" or (found[g != 0] > 0).all()
    assert bits(optimizer.state["w"]["m"]).shape == (128, 48)
