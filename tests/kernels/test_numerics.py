"""The numbers: every step and every element against the float64 oracle, and float32 against mlx.optimizers, bit for
bit.
"""

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

import mlx_fused_adam as fused
from support import oracle
from support.arrays import DTYPES

pytestmark = pytest.mark.usefixtures("device")


def settings_of():
    return st.builds(
        oracle.Settings,
        learning_rate=st.sampled_from([0.0, 1e-5, 1e-3, 0.1, 1.0]),
        beta1=st.sampled_from([0.0, 0.1, 0.9, 0.95]),
        beta2=st.sampled_from([0.0, 0.25, 0.95, 0.999]),
        eps=st.sampled_from([0.0, 1e-8, 1e-6, 1.0]),
        weight_decay=st.sampled_from([0.0, 0.01, 0.5, -0.1]),
        bias_correction=st.booleans(),
    )


def draw(rng: np.random.Generator, shape, dtype, scale=1.0) -> mx.array:
    """Values over many magnitudes, zeros among them."""
    x = rng.normal(size=shape) * np.exp2(rng.integers(-12, 4, size=shape)) * scale
    x = np.where(rng.random(shape) < 0.1, 0.0, x)
    return mx.array(x.astype(np.float32)).astype(dtype)


@given(
    shape=st.lists(st.integers(0, 9), max_size=3).map(tuple),
    dtypes=st.tuples(*[st.sampled_from(DTYPES)] * 3),
    settings=settings_of(),
    seed=st.integers(0, 2**31),
)
@example(shape=(777, 199), dtypes=(mx.float32,) * 3, settings=oracle.Settings(), seed=0)
@example(shape=(23, 24, 25), dtypes=(mx.bfloat16,) * 3, settings=oracle.Settings(), seed=1)
@example(shape=(40000,), dtypes=(mx.float16,) * 3, settings=oracle.Settings(), seed=2)
@example(shape=(), dtypes=(mx.float32,) * 3, settings=oracle.Settings(bias_correction=True), seed=3)
def test_every_step_equals_the_oracle(assert_equal, shape, dtypes, settings, seed):
    """16-bit storage holds the float32 step rounded once; float32 storage holds it exactly."""
    rng = np.random.default_rng(seed)
    parameter_dtype, gradient_dtype, state_dtype = dtypes
    w = draw(rng, shape, parameter_dtype)
    m, v = draw(rng, shape, state_dtype), mx.square(draw(rng, shape, state_dtype))
    for step in range(1, 5):
        g = draw(rng, shape, gradient_dtype)
        before = [oracle.to_numpy(x) for x in (w, g, m, v)]
        new = oracle.adam(*before, step, settings, oracle.stepwise)
        w, m, v = fused.adam_update(w, g, m, v, **settings.arguments(step))
        slacks = (oracle.slack_on_gpu(before[0], new[0], step, settings), 0.0, 0.0)
        for name, actual, expected, slack in zip("wmv", (w, m, v), new, slacks, strict=True):
            assert_equal(actual, expected, f"{name} after step {step}", slack)
            assert actual.dtype == (parameter_dtype if name == "w" else state_dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_pass_as_ieee_says(assert_equal, dtype):
    """Infinity, NaN, subnormals and the largest numbers of each dtype, in every place."""
    largest = float(mx.finfo(dtype).max)
    tiny = {mx.float32: 1e-40, mx.bfloat16: 1e-40, mx.float16: 6e-8}[dtype]
    specials = [0.0, -0.0, 1.0, -1.0, largest, -largest, tiny, -tiny, np.inf, -np.inf, np.nan]
    grid = np.array(np.meshgrid(specials, specials, specials)).reshape(3, -1).astype(np.float32)
    w, g, m = (mx.array(x).astype(dtype) for x in grid)
    v = mx.abs(w)
    settings = oracle.Settings(weight_decay=0.1, bias_correction=True)
    before = [oracle.to_numpy(x) for x in (w, g, m, v)]
    new = oracle.adam(*before, 3, settings, oracle.stepwise)
    results = fused.adam_update(w, g, m, v, **settings.arguments(3))
    slacks = (oracle.slack_on_gpu(before[0], new[0], 3, settings), 0.0, 0.0)
    for name, actual, expected, slack in zip("wmv", results, new, slacks, strict=True):
        assert_equal(actual, expected, name, slack)


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_every_16_bit_pattern_survives_load_and_store(assert_equal, dtype):
    """With learning rate 0 a parameter keeps its value whatever it is; all 65536 bit patterns are tried."""
    w = mx.view(mx.arange(65536).astype(mx.uint16), dtype)
    zeros = mx.zeros_like(w)
    new, _, _ = fused.adam_update(w, zeros, zeros, zeros, 0.0)
    expected = oracle.to_numpy(w)
    assert_equal(new, expected, "parameter")


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_16_bit_stores_round_to_nearest_even(assert_equal, dtype):
    """float32 gradients around every midpoint between two 16-bit values, stored as m."""
    bits = np.arange(65536, dtype=np.uint16)
    values = bits.view(oracle.NUMPY_DTYPES[dtype]).astype(np.float32)
    values = np.sort(values[np.isfinite(values)])
    midpoints = (values[:-1].astype(np.float64) + values[1:]) / 2
    with np.errstate(over="ignore"):
        midpoints = midpoints.astype(np.float32)
        near = [midpoints, np.nextafter(midpoints, np.inf), np.nextafter(midpoints, -np.inf)]
    g = np.concatenate(near).astype(np.float32)
    zeros = mx.zeros(g.shape, dtype)
    _, m, _ = fused.adam_update(zeros, mx.array(g), zeros, zeros, 0.0, betas=(0.0, 0.5))
    assert_equal(m, g, "m")


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
def test_every_nan_is_stored_as_nan(device, dtype):
    """Also those whose payload would round up into infinity or into a number."""
    bits = [0x7F800001, 0x7FBFFFFF, 0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F801000]
    g = mx.view(mx.array(bits, mx.uint32), mx.float32)
    zeros = mx.zeros(g.shape, dtype)
    _, m, v = fused.adam_update(zeros, g, zeros, zeros, 0.0, betas=(0.0, 0.0))
    assert mx.all(mx.isnan(m)).item() and mx.all(mx.isnan(v)).item()


class Transformer(nn.Module):
    """Two blocks of MLX's layers: column-major and row-major gradients, vectors, an embedding."""

    def __init__(self, vocabulary=17, width=16):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, width)
        self.blocks = [nn.TransformerEncoderLayer(width, 2, 2 * width) for _ in range(2)]
        self.head = nn.Linear(width, vocabulary)

    def __call__(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, None)
        return self.head(x)


def train(make_optimizer, steps, dtype=mx.float32):
    """Yields, after every step, the flat parameters and optimizer state."""
    mx.random.seed(7)
    model = Transformer()
    model.set_dtype(dtype)
    optimizer = make_optimizer()
    loss_and_gradients = nn.value_and_grad(
        model, lambda model, x, y: nn.losses.cross_entropy(model(x), y, reduction="mean")
    )
    tokens = np.random.default_rng(7)
    for _ in range(steps):
        x = mx.array(tokens.integers(0, 17, (4, 8)))
        _, gradients = loss_and_gradients(model, x, mx.roll(x, 1, axis=1))
        optimizer.update(model, gradients)
        mx.eval(model.parameters(), optimizer.state)
        yield dict(tree_flatten({"model": model.parameters(), "state": optimizer.state}))


@pytest.mark.parametrize("bias_correction", [False, True], ids=["plain", "corrected"])
def test_moments_are_those_of_mlx_on_the_same_device(device, is_hostile, bias_correction):
    """Given the same gradients, m and v of many steps are bit-identical to eager mlx.optimizers', on a GPU as on the
    CPU.

    Parameters too, except where a GPU makes the step's scalars for the two in different ways.
    """
    rng = np.random.default_rng(0)
    start = mx.array(rng.normal(size=(40, 30)).astype(np.float32))
    optimizer, reference = (
        module.AdamW(1e-2, weight_decay=0.1, bias_correction=bias_correction) for module in (fused, optim)
    )
    w = expected = {"w": start}
    for step in range(1, 51):
        gradients = {"w": mx.array(rng.normal(size=(30, 40)).astype(np.float32)).T}
        w = optimizer.apply_gradients(gradients, w)
        expected = reference.apply_gradients(gradients, expected)
        for s in "mv":
            actual = np.array(optimizer.state["w"][s])
            np.testing.assert_array_equal(actual, np.array(reference.state["w"][s]), f"{s}, {step}")
        tolerance = 0.0 if device == "cpu" else 1e-4
        np.testing.assert_allclose(
            np.array(w["w"]), np.array(expected["w"]), rtol=0, atol=tolerance, err_msg=f"w, {step}"
        )


@pytest.mark.parametrize(
    ("name", "bias_correction", "schedule"),
    [("Adam", 0, 0), ("Adam", 1, 1), ("AdamW", 0, 1), ("AdamW", 1, 0)],
    ids=["Adam", "Adam corrected scheduled", "AdamW scheduled", "AdamW corrected"],
)
def test_1000_steps_are_bit_identical_to_mlx_optimizers(
    device, is_emulated, is_hostile, name, bias_correction, schedule
):
    """Parameters and state of a small transformer, after every step; the first 200 where every access is checked."""
    if device == "gpu" or is_hostile:
        pytest.skip(
            "on a GPU m and v of one step are bit-identical, but a parameter may be a rounding off, "
            "and all that follows"
        )

    def make(module):
        learning_rate = optim.cosine_decay(3e-3, 900) if schedule else 3e-3
        options = {"weight_decay": 0.1} if name == "AdamW" else {}
        return lambda: getattr(module, name)(
            learning_rate, betas=[0.9, 0.99], bias_correction=bool(bias_correction), **options
        )

    steps = 200 if is_emulated else 1000
    runs = zip(train(make(optim), steps), train(make(fused), steps), strict=True)
    for step, (expected, actual) in enumerate(runs, 1):
        assert expected.keys() == actual.keys()
        same = mx.stack([mx.array_equal(expected[k], actual[k]) for k in expected])
        if not mx.all(same).item():
            wrong = [k for k in expected if not mx.array_equal(expected[k], actual[k])]
            raise AssertionError(f"step {step}: {len(wrong)} differ from mlx.optimizers: {wrong[:5]}")


def test_16_bit_is_closer_to_float32_than_mlx_optimizers(device):
    """err(fused) <= err(mlx.optimizers) against a float32 run from the same start, for bfloat16 parameters."""
    rng = np.random.default_rng(0)
    start = mx.array(rng.normal(size=(64, 64)).astype(np.float32)).astype(mx.bfloat16)
    gradients = [mx.array(rng.normal(size=(64, 64)).astype(np.float32)) for _ in range(50)]

    def final(module, dtype):
        optimizer = module.AdamW(1e-2, weight_decay=0.1, bias_correction=True)
        w = {"w": start.astype(dtype)}
        for g in gradients:
            w = optimizer.apply_gradients({"w": g.astype(dtype)}, w)
            mx.eval(w, optimizer.state)
        return oracle.to_numpy(w["w"])

    reference = final(optim, mx.float32)
    fused_error = np.abs(final(fused, mx.bfloat16) - reference).mean()
    mlx_error = np.abs(final(optim, mx.bfloat16) - reference).mean()
    assert fused_error <= mlx_error, f"mean error {fused_error}, MLX's {mlx_error}"


def test_bfloat16_decays_with_zero_gradients(device):
    """Wherever float32's decay moves a bfloat16 value at all, storage follows it."""
    optimizer = fused.AdamW(0.1, weight_decay=0.1, stochastic_rounding=False)
    w = {"w": mx.array([1.0, -3.0, 0.5], mx.bfloat16)}
    expected = oracle.to_numpy(w["w"])
    decay = oracle.stepwise(1 - oracle.stepwise(np.float32(0.1) * np.float64(np.float32(0.1))))
    for _ in range(50):
        w = optimizer.apply_gradients({"w": mx.zeros(3, mx.bfloat16)}, w)
        expected = oracle.store(expected * decay, mx.bfloat16)
        np.testing.assert_array_equal(oracle.to_numpy(w["w"]), expected)
    assert (np.abs(expected) < [0.7, 2.1, 0.35]).all()


@pytest.mark.parametrize("bias_correction", [False, True])
def test_float16_zero_gradients_give_no_nan(device, bias_correction):
    """eps underflows in float16 arithmetic, where mlx.optimizers divides 0 by 0."""
    optimizer = fused.AdamW(1e-3, bias_correction=bias_correction)
    w = {"w": mx.ones(8, mx.float16)}
    for _ in range(10):
        w = optimizer.apply_gradients({"w": mx.zeros(8, mx.float16)}, w)
    assert not mx.any(mx.isnan(w["w"])).item()
    assert mx.all(mx.abs(w["w"] - 1) < 1e-2).item()
