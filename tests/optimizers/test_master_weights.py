"""Master weights of 24 bits: bit for bit against a reference in float64, their error, and their conversions.

Those of 32 bits are float32 training itself: test_state_formats.py.
"""

from __future__ import annotations

import json

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

import mlx_fused_adam as fused
from support.arrays import assert_same_bits, bits, lay_out, random
from support.rounding_reference import bits_of_step
from support.storage_reference import joined, rounded_to_24, upper_half
from support.training import train

pytestmark = pytest.mark.usefixtures("device")

SETTINGS = dict(learning_rate=1e-2, weight_decay=0.1, bias_correction=True)
BITS_24 = dict(master_weights=True, master_weight_bits=24)
LAYOUTS = ["linear", "all axes reversed", "strided columns"]
BF16 = mx.bfloat16


def full_value(parameter: mx.array, remainder: mx.array) -> np.ndarray:
    """The float32 values that are stored."""
    unit = 256 if remainder.dtype == mx.int8 else 1
    return joined(bits(parameter), np.array(remainder).astype(np.int64) * unit)


def stored(x: np.ndarray) -> tuple[mx.array, mx.array]:
    """Parameter and correction of 24 bits that hold these float32 values."""
    upper = np.where(np.isnan(x), 0x7FC0, upper_half(x)).astype(np.uint16)
    lower = np.where(np.isfinite(x), (x.view(np.uint32) >> 8) & 0xFF, 0).astype(np.uint8)
    return mx.view(mx.array(upper), BF16), mx.view(mx.array(lower), mx.int8)


@pytest.mark.parametrize("state_dtype", [None, "float32", "int8"])
@pytest.mark.parametrize("rounding", [None, True, False])
def test_master_weights_of_24_bits_are_those_of_the_reference(state_dtype, rounding):
    """Every step against the same one on float32 parameters, from the value that is stored."""
    if state_dtype == "int8" and rounding is False:
        pytest.skip("int8 is always rounded stochastically")
    rng = np.random.default_rng(0)
    shapes = {"a": (64, 100), "b": (33, 40, 5), "c": (5000,), "d": (7,), "e": (64, 65), "f": ()}
    parameters = {k: random(rng, shape, BF16) for k, shape in shapes.items()}
    options = dict(SETTINGS, state_dtype=state_dtype or "bfloat16", seed=2**40 + 3, stochastic_rounding=rounding)
    optimizer, exact = fused.AdamW(**options, **BITS_24), fused.AdamW(**options)
    optimizer.init(parameters)
    for step in range(6):
        gradients = {
            k: lay_out(random(rng, shape, BF16), LAYOUTS[step % 3] if shape else "linear")
            for k, shape in shapes.items()
        }
        old = {k: full_value(x, optimizer.state[k]["remainder"]) for k, x in parameters.items()}
        weights = exact.apply_gradients(gradients, {k: mx.array(x) for k, x in old.items()})
        parameters = optimizer.apply_gradients(gradients, parameters)
        for number, (k, shape) in enumerate(shapes.items()):
            where, state = f"{k}, step {step + 1}", optimizer.state[k]
            draws = bits_of_step(options["seed"], step + 1, number, int(np.prod(shape)))["parameter"].reshape(shape)
            expected = rounded_to_24(np.array(weights[k]), None if rounding is False else draws)
            assert state["remainder"].dtype == mx.int8 and state["remainder"].shape == shape
            np.testing.assert_array_equal(full_value(parameters[k], state["remainder"]), expected, where)
            np.testing.assert_array_equal(bits(parameters[k]), upper_half(expected), where)
            for name, x in exact.state[k].items():
                assert mx.array_equal(state[name], x), f"{name} of {where}"


def one_decay(extension, x: np.ndarray, decay: np.float32, rounding: str = "parameter_and_v", seed: int = 0):
    """Parameter and correction after a step that multiplies float32 values of 24 bits by ``decay``."""
    parameter, remainder = stored(x)
    zeros = mx.zeros(x.shape, BF16)
    step = extension.AdamStep(
        mx.array(1.0), mx.array(3), weight_decay=float(1 - np.float64(decay)), rounding=rounding, seed=seed
    )
    state = {"m": zeros, "v": zeros, "remainder": remainder}
    (new,), (state,) = extension.adam_update([parameter], [zeros], [state], step, uses_kernel=lambda *_: True, name=str)
    return new, state["remainder"]


LARGEST = np.uint32(0x7F7FFF00)  # of 24 bits
SPECIAL = [0.0, np.inf, 2.0**-141, 2.0**-133, 2.0**-126, 2.0**-126 * (1 - 2.0**-15), 1.0, 1 + 2.0**-15, 2 - 2.0**-15]


@pytest.mark.parametrize("rounding", ["parameter_and_v", "nearest"])
def test_values_of_every_size_are_stored_within_the_bound(extension, is_hostile, rounding):
    """Less than one unit of 24 bits; to nearest half of one. Zeros keep their sign; what is finite stays so."""
    rng = np.random.default_rng(1)
    exponents = np.repeat(np.arange(-126 if is_hostile else -149, 128), 40)
    x = np.ldexp(rng.uniform(0.5, 1, exponents.size), exponents).astype(np.float32)
    x = np.concatenate([x, np.array(SPECIAL, np.float32)[2 * is_hostile :], [LARGEST.view(np.float32)]])
    x = (x.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFFF00)).view(np.float32)
    x = np.concatenate([x, -x, np.array([np.nan], np.float32)])
    for decay in np.array([1.0, 0.75, 0.9990234375, 0.7, 1.0000001], np.float32):
        decay = np.float32(1) - np.float32(1 - np.float64(decay))
        new, remainder = one_decay(extension, x, decay, rounding)
        found = full_value(new, remainder)
        with np.errstate(over="ignore"):
            exact = x * decay
        draws = bits_of_step(0, 3, 0, x.size)["parameter"] if rounding != "nearest" else None
        if is_hostile:  # subnormal results may be flushed
            exact = np.where(np.abs(exact) < 2.0**-126, found, exact)
        np.testing.assert_array_equal(found, rounded_to_24(exact, draws))
        np.testing.assert_array_equal(np.signbit(found), np.signbit(exact))
        finite = np.isfinite(exact)
        assert np.isfinite(found[finite]).all()
        size = np.maximum(np.abs(exact[finite].astype(np.float64)), 2.0**-126)
        error = np.abs(found[finite].astype(np.float64) - exact[finite])
        assert (error <= size * 2.0**-16).all() if rounding == "nearest" else (error < size * 2.0**-15).all()


def test_the_largest_value_never_becomes_infinite(extension):
    """Whose rounding upwards would: an update adds 200 units of float32 to the largest value of 24 bits."""
    parameter, remainder = stored(np.full(512, LARGEST.view(np.float32)))
    ones = mx.ones(512)
    step = extension.AdamStep(mx.array(200 * 2.0**104), mx.array(1), betas=(0.0, 0.0), eps=0.0, rounding="all")
    (new,), (state,) = extension.adam_update(
        [parameter], [-ones], [{"m": ones, "v": ones, "remainder": remainder}], step, uses_kernel=lambda *_: True,
        name=str,
    )  # fmt: skip
    np.testing.assert_array_equal(full_value(new, state["remainder"]).view(np.uint32), LARGEST)


def test_the_rounding_is_unbiased(extension):
    """The mean error of 2^18 values is that of a fair coin."""
    rng = np.random.default_rng(2)
    x = (rng.uniform(1, 2, 2**16).astype(np.float32).view(np.uint32) & np.uint32(0xFFFFFF00)).view(np.float32)
    decay = np.float32(1) - np.float32(1e-3)
    exact = (x * decay).astype(np.float64)
    errors = [full_value(*one_decay(extension, x, decay, seed=seed)).astype(np.float64) - exact for seed in range(4)]
    unit = np.exp2(np.floor(np.log2(exact)) - 15)
    mean = np.mean(errors / unit)
    assert abs(mean) < 5 * 0.5 / np.sqrt(4 * x.size)
    assert 0.3 < np.std(errors / unit) < 0.5


@pytest.mark.cpu_only
def test_small_steps_arrive_on_average_where_nearest_loses_them():
    """Each is a quarter of a unit. The error of 2000 is a random walk's: half a unit times their root, at most."""
    ones = mx.ones((64, 64), BF16)
    found = {}
    for rounding in (None, False):
        optimizer = fused.Adam(2.0**-18, [0.0, 0.0], 0.0, stochastic_rounding=rounding, **BITS_24)
        parameters = train(optimizer, {"w": ones}, [{"w": ones}] * 2000)
        found[rounding] = full_value(parameters["w"], optimizer.state["w"]["remainder"])
    off = found[None].astype(np.float64) - (1 - 2000 * 2.0**-18)
    walk = 0.5 * 2.0**-16 * np.sqrt(2000)
    assert abs(off.mean()) < 5 * walk / 64 and off.std() < walk
    assert (found[False] == 1).all()


def test_a_parameter_changed_from_outside_costs_half_a_unit_at_most():
    rng = np.random.default_rng(1)
    zeros = mx.zeros((40, 50), BF16)
    optimizer = fused.Adam(1e-2, **BITS_24)
    train(optimizer, {"w": zeros + 1}, [{"w": random(rng, (40, 50), BF16)}] * 3)
    optimizer.learning_rate = 0.0
    changed = random(rng, (40, 50), BF16)
    changed[0, :4] = mx.array([0.0, -0.0, float("inf"), float("-inf")])
    changed[0, 4] = float("nan")
    optimizer.state["w"]["remainder"][0, :5] = mx.array([-3, -3, -3, -3, 5], mx.int8)
    kept = optimizer.apply_gradients({"w": zeros}, {"w": changed})["w"]
    full, old = full_value(kept, optimizer.state["w"]["remainder"]), np.array(changed.astype(mx.float32))
    assert np.isnan(full[0, 4]) and (full[0, :2] == 0).all()
    assert full[0, 2] > 3.39e38 and full[0, 3] < -3.39e38
    rest = np.isfinite(old)
    unit = np.exp2(np.floor(np.log2(np.maximum(np.abs(old[rest]), 2.0**-126))) - 7)
    assert (np.abs(full[rest] - old[rest]) <= unit / 2).all()


# ---- Bytes, and conversions ----


@pytest.mark.parametrize(("options", "expected"), [({}, 7), ({"state_dtype": "int8"}, 5.125)], ids=str)
def test_bytes_of_weights_and_state(options, expected):
    parameters = {"w": mx.ones((512, 1024), BF16), "b": mx.ones(64, BF16)}
    optimizer = fused.AdamW(1e-3, **BITS_24, **options)
    parameters = train(optimizer, parameters, [parameters])
    total = sum(x.nbytes for _, x in tree_flatten([parameters, optimizer.state]))
    assert total / sum(x.size for x in parameters.values()) == pytest.approx(expected, abs=2e-3)


def started(**options) -> tuple[fused.AdamW, dict[str, mx.array]]:
    rng = np.random.default_rng(5)
    optimizer = fused.AdamW(**SETTINGS, **options)
    start = {"w": random(rng, (64, 70), BF16)}
    return optimizer, train(optimizer, start, [{"w": random(rng, (64, 70), BF16)} for _ in range(4)])


def test_assignments_convert_corrections():
    """32 to 24 bits and back, to none and to zeros; each within its bound, and no parameter is touched."""
    optimizer, parameters = started(master_weights=True)
    nothing = {"w": mx.zeros((64, 70), BF16)}
    optimizer.learning_rate = 0.0
    full = full_value(parameters["w"], optimizer.state["w"]["remainder"])
    old = np.array(optimizer.state["w"]["remainder"]).astype(np.int64)

    optimizer.master_weight_bits = 24
    optimizer.init(parameters)
    new = optimizer.state["w"]["remainder"]
    nearest = np.clip(np.round(old / 256), -128, 127)
    np.testing.assert_array_equal(np.array(new), nearest.astype(np.int8))
    assert new.dtype == mx.int8 and (np.abs(full_value(parameters["w"], new) - full) < np.abs(full) * 2.0**-15).all()
    new_parameters = train(optimizer, parameters, [nothing])
    assert_same_bits([new_parameters["w"], optimizer.state["w"]["remainder"]], [parameters["w"], new])

    optimizer.master_weight_bits = 32
    train(optimizer, parameters, [nothing])
    back = optimizer.state["w"]["remainder"]
    assert back.dtype == mx.int16 and mx.array_equal(back, new.astype(mx.int16) * 256)

    optimizer.master_weights = False
    train(optimizer, parameters, [nothing])
    assert "remainder" not in optimizer.state["w"]
    optimizer.master_weights, optimizer.master_weight_bits = True, 24
    optimizer.init(parameters)
    assert_same_bits(optimizer.state["w"]["remainder"], mx.zeros((64, 70), mx.int8))
    optimizer.master_weights = False
    train(optimizer, parameters, [nothing])
    assert "remainder" not in optimizer.state["w"]


def test_a_correction_at_the_end_of_its_range_stays_there():
    """32767 of 32768 is nearest to 128, which a byte has no place for."""
    optimizer = fused.Adam(1e-2, **BITS_24)
    parameters = {"w": mx.ones((1, 6), BF16)}
    correction = mx.array([[32767, 32640, 32639, 128, -128, -32768]], mx.int16)
    optimizer.state["w"] = {"m": mx.zeros((1, 6)), "v": mx.zeros((1, 6)), "remainder": correction}
    optimizer.init(parameters)
    np.testing.assert_array_equal(np.array(optimizer.state["w"]["remainder"]), [[127, 127, 127, 0, 0, -128]])


@pytest.mark.parametrize("of_file", [32, 24])
def test_files_say_how_many_bits_there_are(of_file, tmp_path):
    first, parameters = started(master_weights=True, master_weight_bits=of_file)
    fused.save_optimizer(tmp_path / "o", first)
    own = 56 - of_file
    other = fused.AdamW(**SETTINGS, master_weights=True, master_weight_bits=own)
    told = rf"master_weight_bits \(file: {of_file}, optimizer: {own}\)"
    with pytest.raises(ValueError, match=told):
        fused.load_optimizer(tmp_path / "o", other)
    fused.load_optimizer(tmp_path / "o", other, hyperparameters="optimizer")
    other.init(parameters)
    assert other.state["w"]["remainder"].dtype == {24: mx.int8, 32: mx.int16}[own]
    third = fused.AdamW(**SETTINGS, master_weights=True, master_weight_bits=own)
    fused.load_optimizer(tmp_path / "o", third, hyperparameters="file")
    assert third.master_weight_bits == of_file
    gradients = [{"w": random(np.random.default_rng(8), (64, 70), BF16)}]
    assert_same_bits(train(third, parameters, gradients), train(first, parameters, gradients))
    assert_same_bits(third.state, first.state)


@pytest.mark.parametrize("in_parts", [False, True])
def test_a_file_from_before_there_was_a_choice_has_32_bits(in_parts, tmp_path):
    def new(**options):
        optimizer = fused.AdamW(**SETTINGS, master_weights=True, **options)
        return fused.MultiOptimizer([optimizer]) if in_parts else optimizer

    optimizer = new()
    parameters = train(optimizer, {"w": mx.ones((64, 70), BF16)}, [{"w": mx.ones((64, 70), BF16)}])
    fused.save_optimizer(tmp_path / "o", optimizer)
    arrays, metadata = mx.load(str(tmp_path / "o"), format="safetensors", return_metadata=True)
    mx.eval(arrays)
    old = json.loads(metadata["optimizer"])
    for description in old["parts"] if in_parts else [old]:
        del description["master_weight_bits"]
    mx.save_safetensors(str(tmp_path / "old.safetensors"), arrays, metadata | {"optimizer": json.dumps(old)})
    again = new()
    fused.load_optimizer(tmp_path / "old.safetensors", again)
    assert_same_bits(train(again, parameters, [parameters]), train(optimizer, parameters, [parameters]))
    with pytest.raises(ValueError, match=r"master_weight_bits \(file: 32, optimizer: 24\)"):
        fused.load_optimizer(tmp_path / "old.safetensors", new(master_weight_bits=24))
    taker = new(master_weight_bits=24)
    fused.load_optimizer(tmp_path / "old.safetensors", taker, hyperparameters="file")
    assert "master_weight_bits" not in repr(taker)


def test_24_bits_of_no_master_weights_are_an_error():
    with pytest.raises(ValueError, match=r"\[AdamW\] master_weights must be True with master_weight_bits=24 but"):
        fused.AdamW(1e-3, master_weight_bits=24)
    for bad in ("24", 16, True, None, 24.0):
        with pytest.raises((ValueError, TypeError), match=r"\[Adam\] master_weight_bits must be 32 or 24 but got"):
            fused.Adam(1e-3, master_weights=True, master_weight_bits=bad)
    assert "master_weight_bits=24" in repr(fused.Adam(1e-3, **BITS_24))


def test_another_dtype_between_updates_is_named():
    optimizer, parameters = started(**BITS_24)
    optimizer.state["w"]["remainder"] = optimizer.state["w"]["remainder"].astype(mx.int16)
    message = r"remainder of w must be mlx.core.int8 for master_weight_bits=24 but got mlx.core.int16: call init"
    with pytest.raises(ValueError, match=message):
        optimizer.apply_gradients(parameters, parameters)
    optimizer.init(parameters)
    train(optimizer, parameters, [parameters])


@pytest.mark.parametrize("bits", [24, 32])
def test_a_remainder_of_none_is_an_error(bits):
    """Read as absent, it would train without master weights."""
    optimizer = fused.AdamW(1e-2, master_weights=True, master_weight_bits=bits)
    parameters = {"w": mx.ones((8,), mx.bfloat16)}
    optimizer.init(parameters)
    optimizer.state["w"]["remainder"] = None
    with pytest.raises(ValueError, match="state of w must hold a remainder for master_weights but got none"):
        optimizer.apply_gradients(parameters, parameters)
