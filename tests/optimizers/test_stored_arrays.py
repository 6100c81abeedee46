"""Quantized state and remainders in arrays of every kind: wide rows, any layout, lazy, held, compiled, at the edges of
their formats.
"""

import mlx.core as mx
import numpy as np
import pytest

import mlx_fused_adam as fused
from support import stored_tensors
from support.arrays import assert_same_bits, bits, lay_out, random
from support.training import copied, train

pytestmark = pytest.mark.usefixtures("device")

SETTINGS = dict(learning_rate=1e-2, weight_decay=0.1, bias_correction=True)
MASTER_INT8 = ("master", "bfloat16", "int8")
STORED = ("m", "v", "remainder", "m_scale", "v_scale")


def turned(x: mx.array) -> mx.array:
    """The same values, column-major and lazy."""
    return mx.contiguous(x.T).T


@pytest.mark.parametrize("options", [{"state_dtype": "int8"}, {"state_dtype": "int8", "master_weights": True}], ids=str)
@pytest.mark.parametrize(
    ("shape", "dtype"), [((64, 1100), mx.float32), ((70, 16650), mx.bfloat16), ((9, 4200), mx.bfloat16)], ids=str
)
def test_codes_of_wide_rows_are_those_of_row_major_gradients(shape, dtype, options):
    """Rows of several tiles, whose edges must be those of blocks."""
    rng = np.random.default_rng(0)
    parameters, gradients = {"w": random(rng, shape, dtype)}, [random(rng, shape, dtype) for _ in range(2)]
    results = []
    for place in (lambda x: x, turned):
        optimizer = fused.AdamW(**SETTINGS, **options)
        new = train(optimizer, parameters, [{"w": place(g)} for g in gradients])
        results.append([new, optimizer.state])
    assert_same_bits(*results)


@pytest.mark.parametrize("state_dtype", ["int8", "int4"])
@pytest.mark.parametrize("layout", ["linear", "column-major", "strided"])
def test_equal_tensors_have_codes_of_their_own(layout, state_dtype):
    x = random(np.random.default_rng(1), (64, 96))
    optimizer = fused.Adam(1e-2, state_dtype=state_dtype)
    gradient = lay_out(x, layout)
    train(optimizer, {"a": x, "b": x}, [{"a": gradient, "b": gradient}])
    a, b = optimizer.state["a"], optimizer.state["b"]
    for name in "mv":
        assert_same_bits(a[f"{name}_scale"], b[f"{name}_scale"])
        assert not mx.array_equal(a[name], b[name]), name


@pytest.mark.cpu_only
def test_random_bits_are_numbered_over_all_leaves():
    """Whatever falls back, or does not decay."""
    rng = np.random.default_rng(2)
    start = {k: random(rng, (300,), mx.bfloat16) for k in "bc"}
    gradients = {k: random(rng, (300,), mx.bfloat16) for k in "bc"}
    double = {"a": mx.ones(3, mx.float64)}
    found = []
    for decay_filter in ("c", "b", None):
        for options in ({"stochastic_rounding": True}, {"max_grad_norm": 1e9}):
            optimizer = fused.AdamW(1e-2, weight_decay=0.0 if decay_filter is None else 1e-30, **options,
                                    decay_filter=decay_filter)  # fmt: skip
            new = train(optimizer, double | start, [double | gradients])
            v = [optimizer.state[k]["v"] for k in "bc"]
            found.append([new["b"], new["c"], *v])
    first = {"a": random(rng, (3,), mx.bfloat16)}
    without = fused.AdamW(1e-2, weight_decay=0.0)
    new = train(without, first | start, [first | gradients])
    for other in found:
        assert_same_bits(other, [new["b"], new["c"], *(without.state[k]["v"] for k in "bc")])


# ---- Layouts ----


@pytest.mark.parametrize("name", STORED)
def test_lazy_state_in_any_layout_gives_the_same_update(extension, name):
    """Nothing can look at the layout of what is not evaluated."""
    tensor = stored_tensors.make(extension, (64, 96), MASTER_INT8)
    (expected,) = stored_tensors.update(extension, [tensor])
    (found,) = stored_tensors.update(extension, [tensor | {name: turned(tensor[name])}])
    assert_same_bits(found, expected)


@pytest.mark.parametrize("name", ["m", "v"])
@pytest.mark.parametrize("is_lazy", [True, False])
def test_decoding_takes_any_layout(extension, name, is_lazy):
    tensor = stored_tensors.make(extension, (40, 150), MASTER_INT8)
    codes, scales = tensor[name], tensor[f"{name}_scale"]
    expected = extension.dequantize_moment(codes, scales)
    for some in ((turned(codes), scales), (codes, turned(scales))):
        if not is_lazy:
            mx.eval(some)
        assert_same_bits(extension.dequantize_moment(*some), expected)


@pytest.mark.parametrize("name", ["m", "v"])
def test_encoding_takes_any_layout_and_dtype(extension, name):
    x = mx.abs(random(np.random.default_rng(5), (40, 150), mx.bfloat16))
    expected = extension.quantize_moment(x.astype(mx.float32), name == "v")
    assert_same_bits(extension.quantize_moment(turned(x), name == "v"), expected)


@pytest.mark.cpu_only  # the emulator would build kernels for a minute
def test_tensors_of_every_combination_of_formats_share_a_call(extension):
    """Each is updated as it is alone, whichever node it shares."""
    tensors = []
    for parameter in ("float32", "bfloat16", "master"):
        for gradient in ("float32", "bfloat16", "float16"):
            for state in ("float32", "bfloat16", "int8"):
                tensors.append(stored_tensors.make(extension, (3, 40), (parameter, gradient, state), len(tensors)))
    found = stored_tensors.update(extension, tensors, rounding="nearest")
    for i, tensor in enumerate(tensors):
        (expected,) = stored_tensors.update(extension, [tensor], rounding="nearest")
        assert_same_bits(found[i], expected, f"tensor {i}: ")


def compiled_update(extension, shapeless):
    def update(*arrays):
        (new,) = stored_tensors.update(extension, [dict(zip(stored_tensors.PARTS, arrays, strict=True))])
        return [new[name] for name in stored_tensors.PARTS]

    return mx.compile(update, shapeless=shapeless)


@pytest.mark.parametrize("name", stored_tensors.PARTS[1:])
def test_later_shapes_of_a_shapeless_update_are_checked(extension, name):
    """One array of the shape that the first call had."""
    update = compiled_update(extension, shapeless=True)
    old, new = (stored_tensors.make(extension, (64, columns), MASTER_INT8) for columns in (64, 96))
    mx.eval(update(*(old[part] for part in stored_tensors.PARTS)))
    mixed = new | {name: old[name]}
    with pytest.raises(ValueError, match=r"must have the (parameter's )?shape"):
        mx.eval(update(*(mixed[part] for part in stored_tensors.PARTS)))
    found = update(*(new[part] for part in stored_tensors.PARTS))
    (expected,) = stored_tensors.update(extension, [new])
    assert_same_bits(found, [expected[part] for part in stored_tensors.PARTS])


@pytest.mark.parametrize("name", STORED)
def test_layouts_of_a_compiled_update_are_checked(extension, name):
    update = compiled_update(extension, shapeless=False)
    tensor = stored_tensors.make(extension, (64, 96), MASTER_INT8)
    wrong = tensor | {name: turned(tensor[name])}
    mx.eval(wrong)
    with pytest.raises(ValueError, match="must be row-major"):
        mx.eval(update(*(wrong[part] for part in stored_tensors.PARTS)))


# ---- Steps that are not applied ----


@pytest.mark.parametrize("held", ["w", *STORED])
@pytest.mark.parametrize("shape", [(66, 70), (130, 33)], ids=str)
def test_a_skipped_step_keeps_what_is_held_and_what_is_not(shape, held):
    """One array is still referenced, so its new one is a copy; the others are kept in place."""
    rng = np.random.default_rng(3)
    options = {"state_dtype": "int8", "master_weights": True, "skip_nonfinite": True}
    good, bad = ({"w": random(rng, shape, mx.bfloat16)} for _ in range(2))
    bad["w"][-1, -1] = float("nan")
    optimizer = fused.Adam(1e-2, **options)
    parameters = train(optimizer, {"w": random(rng, shape, mx.bfloat16)}, [good, good])
    before = [bits(parameters["w"]), *(bits(optimizer.state["w"][name]) for name in STORED)]
    kept = parameters["w"] if held == "w" else optimizer.state["w"][held]
    parameters = optimizer.apply_gradients(bad, parameters)
    mx.eval(parameters, optimizer.state)
    after = [bits(parameters["w"]), *(bits(optimizer.state["w"][name]) for name in STORED)]
    for what, a, b in zip(("w", *STORED), after, before, strict=True):
        np.testing.assert_array_equal(a, b, f"{what} with {held} held")
    del kept


# ---- The edges of the formats ----


@pytest.mark.parametrize("gradient", [mx.bfloat16, mx.float32], ids=str)
@pytest.mark.parametrize(
    ("weight", "remainder", "kept"),
    [(0x0000, -5, 0), (0x8000, -5, 0), (0x0000, 5, 5), (0x8000, 5, 5), (0x7F80, -0x3662, -0x3662), (0xFF80, -1, -1),
     (0x7F80, 7, 0), (0xFF80, 7, 0)],
)  # fmt: skip
def test_remainders_beside_zero_and_infinity(device, is_hostile, weight, remainder, kept, gradient):
    """Below zero there is nothing, above infinity neither; just below infinity is a float32 that rounds to it."""
    parameter = mx.full((40,), weight, mx.uint16).view(mx.bfloat16)
    optimizer = fused.Adam(1e-2, master_weights=True)
    optimizer.init({"w": parameter})
    optimizer.state["w"]["remainder"] = mx.full((40,), remainder, mx.int16)
    new = train(optimizer, {"w": parameter}, [{"w": mx.zeros(40, gradient)}])
    np.testing.assert_array_equal(bits(new["w"]), weight)
    found = np.array(optimizer.state["w"]["remainder"])
    if (device == "gpu" or is_hostile) and not weight & 0x7FFF and not found.any():
        return  # together a subnormal number, which a GPU may flush to zero
    np.testing.assert_array_equal(found, kept)


@pytest.mark.parametrize("bad", [0x7FC00000, 0xFFC00000, 0x7FC00001, 0x7F800001, 0xFFFFFFFF], ids=hex)
def test_a_master_weight_that_is_not_a_number_is_the_one_nan(bad):
    parameters = {"w": mx.ones(40, mx.bfloat16)}
    optimizer = fused.Adam(1e-2, master_weights=True)
    for _ in range(2):
        parameters = train(optimizer, parameters, [{"w": mx.full((40,), bad, mx.uint32).view(mx.float32)}])
        np.testing.assert_array_equal(bits(parameters["w"]), 0x7FC0)
        assert not mx.any(optimizer.state["w"]["remainder"])


def test_a_gradient_that_is_no_number_leaves_its_block_alone():
    """The codes of its neighbours are those beside a gradient of zero."""
    g = random(np.random.default_rng(4), (64, 64))
    states = []
    for value in (0.0, float("nan")):
        g[3, 7] = value
        optimizer = fused.Adam(1e-2, state_dtype="int8")
        train(optimizer, {"w": mx.ones((64, 64))}, [{"w": g}])
        states.append(optimizer.state["w"])
    zero, bad = states
    assert_same_bits([bad["m_scale"], bad["v_scale"]], [zero["m_scale"], zero["v_scale"]])
    for name in "mv":
        differ = np.argwhere(np.array(zero[name]) != np.array(bad[name]))
        assert differ.tolist() == [[3, 7]], name


# ---- What does not fit ----


@pytest.mark.parametrize(("key", "value", "message"), [
    ("v_scale", mx.ones((64, 3), mx.bfloat16), "v_scale of w must be .*bfloat16 of shape"),
    ("v_scale", mx.ones((64, 2)), "v_scale of w must be .*bfloat16 of shape"),
    ("remainder", mx.ones((64, 65), mx.int16), "remainder of w must be .*int16 of shape"),
    ("v", mx.ones((64, 65), mx.uint8), "v of w must have the parameter's shape"),
    ("m", mx.ones((65, 64), mx.int8), "m of w must have the parameter's shape"),
])  # fmt: skip
def test_every_part_of_a_state_is_checked_before_an_update(key, value, message):
    parameters = {"w": mx.ones((64, 64), mx.bfloat16)}
    optimizer = fused.Adam(1e-2, state_dtype="int8", master_weights=True)
    optimizer.init(parameters)
    optimizer.state["w"][key] = value
    with pytest.raises(ValueError, match=message):
        optimizer.apply_gradients(parameters, parameters)
    assert optimizer.step.item() == 0


@pytest.mark.parametrize("name", ["m", "v", "remainder"])
def test_numpy_arrays_amid_a_run_are_taken(name):
    rng = np.random.default_rng(6)
    parameters, gradients = ({"w": random(rng, (64, 70), mx.bfloat16)} for _ in range(2))
    results = []
    for convert in (lambda x: x, np.array):
        optimizer = fused.Adam(1e-2, state_dtype="int8", master_weights=True)
        new = train(optimizer, parameters, [gradients])
        optimizer.state["w"][name] = convert(optimizer.state["w"][name])
        new = train(optimizer, new, [gradients])
        results.append([new, optimizer.state])
    assert_same_bits(*results)


@pytest.mark.parametrize("key", ["m_scale", "v_scale"])
def test_scales_beside_plain_moments_are_an_error(key):
    parameters = {"w": mx.ones((64, 64))}
    optimizer = fused.Adam(1e-2)
    optimizer.init(parameters)
    before = copied(optimizer.state)
    optimizer.state["w"][key] = mx.ones((64, 2), mx.bfloat16)
    with pytest.raises(ValueError, match="m of w must be quantized, since it has scales, but got float32"):
        optimizer.apply_gradients(parameters, parameters)
    del optimizer.state["w"][key]
    assert_same_bits(optimizer.state, before)


def test_codes_of_a_scalar_are_an_error(extension):
    dtypes = {"m": mx.int8, "v": mx.uint8, "m_scale": mx.bfloat16, "v_scale": mx.bfloat16}
    scalar = {name: mx.array(1, dtypes.get(name, mx.float32)) for name in ("parameter", "gradient", *dtypes)}
    with pytest.raises(ValueError, match="m of 0 must have an axis to be quantized"):
        stored_tensors.update(extension, [scalar])
    with pytest.raises(ValueError, match="must have an axis to be quantized but got a scalar"):
        extension.quantize_moment(mx.array(1.0), False)
