"""max_grad_norm and skip_nonfinite: what they compute, what they leave alone, and how they go with everything else."""

from __future__ import annotations

import math
import pickle

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map, tree_unflatten

import mlx_fused_adam as fused
from support.arrays import DTYPES, LAYOUTS, address, all_bits, assert_same_bits, lay_out, random
from support.oracle import to_numpy
from support.processes import output_of_python
from support.stored_tensors import sum_of_squares
from support.training import copied, train

pytestmark = pytest.mark.usefixtures("device")

SETTINGS = dict(weight_decay=0.1, bias_correction=True)


def tree(rng, dtype=mx.float32, scale=1.0):
    """Nodes of one tensor and of several, quantized state and none, rows that are no whole blocks."""
    return {
        "layers": [{"weight": random(rng, (70, 90), dtype, scale), "bias": random(rng, (90,), dtype, scale)}],
        "head": random(rng, (65, 1100), dtype, scale),
        "scalar": random(rng, (), dtype, scale),
    }  # fmt: skip


RECORDS = ("grad_norm", "skipped")


def assert_same_training(actual, optimizer, expected, reference):
    """Parameters and states, but for what the options record."""
    assert_same_bits(all_bits([actual, optimizer.state], RECORDS), all_bits([expected, reference.state], RECORDS))


def exact_norm(gradients) -> float:
    return math.sqrt(sum(float((to_numpy(g).astype(np.float64) ** 2).sum()) for _, g in tree_flatten(gradients)))


# ---- The norm ----


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norm_of_every_layout(extension, dtype, layout):
    rng = np.random.default_rng(0)
    gradients = [lay_out(random(rng, shape, dtype), layout) for shape in [(70, 90), (3, 33, 40)]]
    gradients += [lay_out(random(rng, (2, 3, 5, 7), dtype), layout)]
    total = sum_of_squares(extension, gradients)
    assert total.dtype == mx.float32 and total.shape == ()
    np.testing.assert_allclose(total.item(), exact_norm(gradients) ** 2, rtol=2e-6)


@pytest.mark.parametrize("size", [0, 1, 31, 32, 33, 255, 256, 1024, 16383, 16385, 65536, 70001])
def test_norm_of_every_size(extension, size):
    """About chunks, streams, spans and units; nothing is left out, nothing counted twice."""
    x = mx.arange(size) % 7 + 1
    for dtype in DTYPES:
        total = sum_of_squares(extension, [x.astype(dtype)]).item()
        assert total == float((np.array(x).astype(np.int64) ** 2).sum()), dtype


def test_norm_of_many_gradients(extension):
    """More than share a dispatch, of mixed dtypes, empty ones among them; and of none."""
    rng = np.random.default_rng(1)
    gradients = [
        random(rng, (int(rng.integers(0, 300)),), DTYPES[i % 3]) for i in range(40)
    ] + [lay_out(random(rng, (20, 30)), "strided"), mx.zeros((0, 4))]  # fmt: skip
    total = sum_of_squares(extension, gradients).item()
    np.testing.assert_allclose(total, exact_norm(gradients) ** 2, rtol=2e-6)
    assert sum_of_squares(extension, []).item() == 0
    assert sum_of_squares(extension, [mx.ones(3)] * 300).item() == 900  # partial sums, each in its place
    assert sum_of_squares(extension, [mx.zeros((0, 4))]).item() == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e20])
@pytest.mark.parametrize("layout", ["linear", "column-major", "strided"])
def test_one_bad_element_anywhere_is_seen(extension, bad, layout):
    """1e20 too: its square is beyond float32."""
    size = 90 * 380
    for at in (0, 1, 31, 32, size // 2 + 5, size - 33, size - 1):
        x = mx.where(mx.arange(size) == at, bad, 1.0).reshape(90, 380)
        total = sum_of_squares(extension, [mx.ones(5), lay_out(x, layout), mx.ones(40000)])
        assert not math.isfinite(total.item()), at


def test_a_sum_beyond_float32_is_infinite(extension):
    """The squares are float32, one by one and in parts."""
    for count in (4, 70001):
        x = mx.full((count,), 1.5e19)
        assert sum_of_squares(extension, [x, x]).item() == math.inf
    x = mx.full((2,), 1e19)
    assert math.isfinite(sum_of_squares(extension, [x]).item())


def test_small_gradients_beside_a_large_one_count(extension):
    """In one gradient, in units of their own, and in one of any layout: float32 would lose 1 beside 2**24."""
    ones = [mx.ones(1) for _ in range(1000)]
    np.testing.assert_allclose(sum_of_squares(extension, [mx.array([4096.0]), *ones]).item(), 2**24 + 1000, rtol=1e-6)
    for shape in ((65536,), (256, 300), (1000, 64)):
        x = mx.where(mx.arange(int(np.prod(shape))) == 0, 4096.0, 1.0).reshape(shape)
        for layout in LAYOUTS[:4] if len(shape) > 1 else ("linear", "strided"):
            total = sum_of_squares(extension, [lay_out(x, layout)]).item()
            np.testing.assert_allclose(total, 2**24 + x.size - 1, rtol=1e-5, err_msg=f"{shape}, {layout}")


@pytest.mark.cpu_only
def test_gradients_of_other_dtypes_count_by_their_size(extension):
    """Which mlx.optimizers train: complex, float64 and integers."""
    three = {mx.complex64: mx.array([3 + 4j, 0, 1j]), mx.float64: mx.array([3, 4, 1], mx.float64)}
    three[mx.int32] = mx.array([3, -4, 1])
    for dtype, x in three.items():
        assert x.dtype == dtype
        assert sum_of_squares(extension, [x]).item() == 26, dtype
        assert sum_of_squares(extension, [x, mx.ones(2), x]).item() == 54, dtype


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_kernel_the_squares_are_float32_too(extension, dtype):
    gradients = [random(np.random.default_rng(1), shape, dtype) for shape in [(70, 90), (7,), ()]]
    total = extension.sum_of_squares(gradients, uses_kernel=lambda _: False)
    np.testing.assert_allclose(total.item(), exact_norm(gradients) ** 2, rtol=1e-5)


@pytest.mark.cpu_only
def test_threads_change_no_bit(extension):
    rng = np.random.default_rng(2)
    gradients = [random(rng, (1000, 999)), lay_out(random(rng, (700, 301)), "strided")]
    gradients += [random(rng, (300_001,), mx.bfloat16)]
    before = extension.num_threads()
    found = set()
    try:
        for threads in (1, 2, 3, 8):
            extension.set_num_threads(threads)
            for _ in range(5):
                found.add(sum_of_squares(extension, gradients).item())
    finally:
        extension.set_num_threads(before)
    assert len(found) == 1, found


def test_derivatives_and_vmap_of_the_norm(extension):
    def total(*xs):
        return sum_of_squares(extension, list(xs))

    rng = np.random.default_rng(3)
    a, b = random(rng, (5, 7)), random(rng, (9,))
    for got, x in zip(mx.grad(total, argnums=(0, 1))(a, b), (a, b), strict=True):
        np.testing.assert_allclose(np.array(got), 2 * np.array(x), rtol=1e-6)
    _, (tangent,) = mx.jvp(total, [a, b], [mx.ones_like(a), mx.zeros_like(b)])
    np.testing.assert_allclose(tangent.item(), 2 * np.array(a).sum(), rtol=1e-4)
    rows = mx.vmap(lambda row: total(row))(a)
    np.testing.assert_allclose(np.array(rows), (np.array(a) ** 2).sum(axis=1), rtol=1e-6)


# ---- Clipping ----


def run(optimizer, parameters, steps, is_compiled=False):
    """The parameters after these gradients; nothing else holds the old ones."""
    optimizer.init(parameters)
    fresh = [tree_map(lambda x: x + 0, parameters)]
    mx.eval(fresh, optimizer.state)
    return train(optimizer, fresh.pop(), steps, is_compiled)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_clipping_equals_clip_grad_norm_and_mlx_optimizers(name, compiled, has_exact_scalars):
    rng = np.random.default_rng(4)
    start = tree(rng)
    settings = (SETTINGS if name == "AdamW" else {}) | {"bias_correction": has_exact_scalars}
    optimizer = getattr(fused, name)(1e-2, **settings, max_grad_norm=10.0)
    reference = getattr(optim, name)(1e-2, **settings)
    # Clipped, not clipped, and all zeros.
    steps = [tree(rng), tree(rng, scale=1e-3), tree(rng, scale=5), tree(rng, scale=0)]
    parameters = run(optimizer, start, steps, compiled)
    clipped = []
    for gradients in steps:
        scaled, norm = optim.clip_grad_norm(gradients, 10.0)
        clipped.append(scaled)
    expected = run(reference, start, clipped)
    np.testing.assert_allclose(optimizer.state["grad_norm"].item(), norm.item(), rtol=1e-5)
    for (path, x), (_, y) in zip(tree_flatten(parameters), tree_flatten(expected), strict=True):
        np.testing.assert_allclose(np.array(x), np.array(y), rtol=2e-5, atol=2e-6, err_msg=path)


@pytest.mark.parametrize("options", [
    {}, {"state_dtype": "int8"}, {"stochastic_rounding": True}, {"master_weights": True},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
def test_clipping_is_the_update_of_scaled_gradients(dtype, options, is_hostile):
    """Bit for bit, the product in float32 being the only one: also where gradients have 16 bits."""
    if is_hostile:
        pytest.skip("a hostile GPU may form the scale of a step in another way")
    rng = np.random.default_rng(5)
    start, gradients = tree(rng, dtype), tree(rng, dtype)
    options = SETTINGS | options
    optimizer = fused.AdamW(1e-2, **options, max_grad_norm=3.0)
    parameters = run(optimizer, start, [gradients])
    norm = optimizer.state["grad_norm"]
    np.testing.assert_allclose(norm.item(), exact_norm(gradients), rtol=1e-6)
    scale = mx.minimum(3.0 / (norm + 1e-6), 1.0)
    scaled = tree_map(lambda g: g.astype(mx.float32) * scale, gradients)
    reference = fused.AdamW(1e-2, **options)
    expected = run(reference, start, [scaled])
    assert_same_training(parameters, optimizer, expected, reference)


@pytest.mark.parametrize("limit", [1e-6, 1e-7])
def test_the_norm_s_eps_is_that_of_clip_grad_norm(limit):
    """It counts where norms are as small."""
    gradients = {"w": mx.full(4, 1e-6)}
    optimizer = fused.Adam(1e-2, max_grad_norm=limit)
    run(optimizer, gradients, [gradients])
    clipped, _ = optim.clip_grad_norm(gradients, limit)
    np.testing.assert_allclose(np.array(optimizer.state["w"]["m"]), 0.1 * np.array(clipped["w"]), rtol=1e-5)


@pytest.mark.parametrize("options", [{"max_grad_norm": 1e9}, {"skip_nonfinite": True}], ids=str)
def test_what_needs_no_clipping_changes_no_bit(options):
    rng = np.random.default_rng(6)
    start, steps = tree(rng), [tree(rng) for _ in range(3)]
    optimizer, reference = fused.AdamW(1e-2, **SETTINGS, **options), fused.AdamW(1e-2, **SETTINGS)
    found, expected = run(optimizer, start, steps), run(reference, start, steps)
    assert_same_training(found, optimizer, expected, reference)


def test_the_norm_is_of_all_gradients_before_clipping():
    rng = np.random.default_rng(7)
    start, gradients = tree(rng), tree(rng)
    optimizer = fused.Adam(1e-2, max_grad_norm=0.5)
    assert optimizer.state["grad_norm"].item() == 0
    assert optimizer.state["grad_norm"].dtype == mx.float32
    run(optimizer, start, [gradients])
    np.testing.assert_allclose(optimizer.state["grad_norm"].item(), exact_norm(gradients), rtol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_copy_of_a_gradient_is_made(dtype):
    """Neither squares nor clipped gradients: a step with both options allocates what a plain one does, and scalars."""
    peaks = []
    for options in ({}, {"max_grad_norm": 1.0, "skip_nonfinite": True}):
        parameters, gradients = {"w": mx.ones((512, 512), dtype)}, {"w": mx.ones((512, 512), dtype)}
        optimizer = fused.Adam(1e-3, **options)
        optimizer.init(parameters)
        mx.eval(parameters, gradients, optimizer.state)
        for _ in range(2):
            mx.synchronize()  # a GPU's handlers hold what the step before has used
            mx.reset_peak_memory()
            before = mx.get_active_memory()
            parameters = optimizer.apply_gradients(gradients, parameters)
            mx.eval(parameters, optimizer.state)
            peak = mx.get_peak_memory() - before
        peaks.append(peak)
    assert peaks[1] - peaks[0] < 4096, peaks


# ---- Steps that are not applied ----

BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "too large": 3e19}
FORMATS = [
    (mx.float32, {}), (mx.float32, {"state_dtype": "int8"}), (mx.float32, {"state_dtype": "bfloat16"}),
    (mx.bfloat16, {}), (mx.bfloat16, {"stochastic_rounding": True}), (mx.bfloat16, {"master_weights": True}),
    (mx.bfloat16, {"state_dtype": "int8", "master_weights": True}), (mx.float16, {}),
    (mx.bfloat16, {"master_weights": True, "master_weight_bits": 24, "state_dtype": "int4"}),
    (mx.float16, {"state_dtype": "int8", "stochastic_rounding": True}),
]  # fmt: skip


def spoilt(gradients, path, bad):
    """With one bad element in the middle of one gradient."""

    def spoil(name, x):
        if name != path:
            return x
        at = mx.arange(x.size).reshape(x.shape) == x.size // 2
        return mx.where(at, mx.array(bad, x.dtype), x)

    leaves = [(name, spoil(name, x)) for name, x in tree_flatten(gradients)]
    return tree_unflatten(leaves)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize(("dtype", "options"), FORMATS, ids=str)
def test_a_bad_step_is_as_if_it_had_not_been(dtype, options, compiled):
    """Between good ones, first and last: every bit of parameters and state is that of a run without it."""
    rng = np.random.default_rng(8)
    start, good = tree(rng, dtype), [tree(rng, dtype) for _ in range(2)]
    paths = [path for path, _ in tree_flatten(start)]
    bad = [spoilt(good[0], path, math.nan) for path in paths]
    optimizer = fused.AdamW(1e-2, **SETTINGS, **options, skip_nonfinite=True)
    reference = fused.AdamW(1e-2, **SETTINGS, **options)
    steps = [bad[0], good[0], *bad[1:], good[1], bad[-1]]
    found, expected = run(optimizer, start, steps, compiled), run(reference, start, good, compiled)
    assert_same_training(found, optimizer, expected, reference)
    skipped = optimizer.state["skipped"]
    assert skipped.item() == len(bad) + 1 and skipped.dtype == mx.uint64


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("layout", ["column-major", "strided", "reversed"])
@pytest.mark.parametrize("options", [{}, {"state_dtype": "int8"}, {"state_dtype": "int4"}], ids=str)
def test_a_bad_step_with_gradients_in_any_layout(options, layout, bad):
    """Old arrays that somebody holds, and parameters that are not row-major themselves."""
    rng = np.random.default_rng(9)
    parameters = {
        "w": random(rng, (66, 70)),
        "t": lay_out(random(rng, (70, 66)), "column-major"),
        "s": lay_out(random(rng, (70, 66)), "strided"),
    }
    gradients = {k: lay_out(random(rng, x.shape), layout) for k, x in parameters.items()}
    optimizer = fused.Adam(1e-2, **options, skip_nonfinite=True, max_grad_norm=1.0)
    optimizer.init(parameters)
    mx.eval(parameters, gradients, optimizer.state)
    held, state = dict(parameters), copied(optimizer.state)
    before = all_bits([held, state], RECORDS)
    gradients["t"] = mx.where(mx.arange(66) == 65, BAD[bad], gradients["t"])
    new = optimizer.apply_gradients(gradients, parameters)
    mx.eval(new, optimizer.state)
    assert_same_bits(all_bits([new, optimizer.state], RECORDS), before)
    assert_same_bits(all_bits([held, state], RECORDS), before)
    assert not math.isfinite(optimizer.state["grad_norm"].item())


def test_a_skipped_step_is_in_place():
    parameters, gradients = {"w": mx.ones((300, 300))}, {"w": mx.full((300, 300), math.nan)}
    optimizer = fused.Adam(1e-2, skip_nonfinite=True)
    optimizer.init(parameters)
    mx.eval(parameters, gradients, optimizer.state)

    def addresses():
        return [address(x) for x in (parameters["w"], *optimizer.state["w"].values())]

    before = addresses()
    mx.synchronize()
    parameters = optimizer.apply_gradients(gradients, parameters)
    mx.eval(parameters, optimizer.state)
    assert addresses() == before


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_schedules_do_not_advance(compiled):
    rng = np.random.default_rng(10)
    start, good = {"w": random(rng, (40, 50))}, [{"w": random(rng, (40, 50))} for _ in range(3)]
    bad = {"w": mx.full((40, 50), math.inf)}
    schedule = optim.exponential_decay(0.1, 0.5)
    optimizer, reference = fused.Adam(schedule, skip_nonfinite=True), fused.Adam(schedule)
    found = run(optimizer, start, [good[0], good[1], bad, bad], compiled)
    expected = run(reference, start, good[:2], compiled)
    # The learning rate too stays that of the last step that was applied.
    assert_same_training(found, optimizer, expected, reference)
    found = run(optimizer, found, [good[2]], compiled)
    expected = run(reference, expected, [good[2]], compiled)
    assert_same_training(found, optimizer, expected, reference)


def test_a_schedule_may_return_a_number_and_its_value_may_be_missing():
    """mlx.optimizers takes both: a state that was set without a learning rate, say."""
    optimizer = fused.Adam(lambda step: 0.1, skip_nonfinite=True)
    del optimizer.state["learning_rate"]
    parameters = {"w": mx.ones(3)}
    new = optimizer.apply_gradients(parameters, parameters)
    expected = fused.Adam(0.1).apply_gradients(parameters, parameters)
    assert mx.array_equal(new["w"], expected["w"])
    optimizer.apply_gradients({"w": mx.full((3,), math.nan)}, new)
    np.testing.assert_allclose(float(optimizer.learning_rate), 0.1)
    assert optimizer.step.item() == optimizer.state["skipped"].item() == 1


def test_accumulated_gradients_are_judged_as_a_whole():
    """As a loop with gradient accumulation has it: the mean of what several passes gave, one of them bad."""
    model = nn.Linear(8, 4)
    mx.eval(model.parameters())
    optimizer = fused.AdamW(1e-2, max_grad_norm=1.0, skip_nonfinite=True)
    optimizer.init(model.trainable_parameters())
    before = all_bits([model.parameters(), optimizer.state], RECORDS)
    loss_and_grad = nn.value_and_grad(model, lambda m, x: m(x).square().mean())
    total = None
    for x in (mx.ones((2, 8)), mx.full((2, 8), math.inf), mx.ones((2, 8))):
        _, gradients = loss_and_grad(model, x)
        total = gradients if total is None else tree_map(mx.add, total, gradients)
    optimizer.update(model, tree_map(lambda g: g / 3, total))
    mx.eval(model.parameters(), optimizer.state)
    assert_same_bits(all_bits([model.parameters(), optimizer.state], RECORDS), before)
    assert optimizer.state["skipped"].item() == 1


@pytest.mark.cpu_only
@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_parameters_that_fall_back_obey_too(name):
    """float64 beside float32: both count for the norm, both are clipped, both stay as they are in a bad step."""
    rng = np.random.default_rng(11)
    start = {"double": mx.array(rng.normal(size=9), mx.float64), "single": random(rng, (9,))}
    gradients = {"double": mx.array(rng.normal(size=9), mx.float64), "single": random(rng, (9,))}
    optimizer = getattr(fused, name)(1e-2, max_grad_norm=0.1, skip_nonfinite=True)
    found = run(optimizer, start, [gradients])
    norm = exact_norm(gradients)
    np.testing.assert_allclose(optimizer.state["grad_norm"].item(), norm, rtol=1e-6)
    clipped = tree_map(lambda g: g * (0.1 / norm), gradients)
    expected = run(getattr(optim, name)(1e-2), start, [clipped])
    for path, x in expected.items():
        assert found[path].dtype == x.dtype
        np.testing.assert_allclose(np.array(found[path]), np.array(x), rtol=1e-6, err_msg=path)
    before = all_bits([found, optimizer.state], RECORDS)
    for path in start:
        bad = gradients | {path: mx.full((9,), math.nan, start[path].dtype)}
        found = run(optimizer, found, [bad])
        assert_same_bits(all_bits([found, optimizer.state], RECORDS), before)
    assert optimizer.state["skipped"].item() == 2


@pytest.mark.cpu_only
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float32, mx.int32], ids=str)
def test_gradients_of_parameters_that_fall_back_are_clipped_in_their_own_dtype(dtype):
    """As clip_grad_norm does, here to a number that bfloat16 rounds; integers become float32."""
    parameters, gradients = {"w": mx.array([1.0], mx.float64)}, {"w": mx.array([3.0], dtype)}
    optimizer = fused.Adam(1e-2, max_grad_norm=0.7)
    run(optimizer, parameters, [gradients])
    scaled = gradients["w"] * (mx.array(0.7) / (3 + mx.array(1e-6)))
    reference = optim.Adam(1e-2)
    run(reference, parameters, [{"w": scaled if dtype == mx.int32 else scaled.astype(dtype)}])
    assert_same_bits(optimizer.state["w"], reference.state["w"])


def test_filtered_decay_clips_and_skips_as_a_whole():
    rng = np.random.default_rng(12)
    start, gradients = tree(rng), tree(rng)
    options = SETTINGS | {"max_grad_norm": 2.0, "skip_nonfinite": True}
    found = run(fused.AdamW(1e-2, **options, decay_filter="weight"), start, [gradients])
    whole = run(fused.AdamW(1e-2, **options), start, [gradients])
    none = run(fused.AdamW(1e-2, **options | {"weight_decay": 0.0}), start, [gradients])
    for path, x in tree_flatten(found):
        expected = dict(tree_flatten(whole if "weight" in path else none))[path]
        assert mx.array_equal(x, expected), path
    optimizer = fused.AdamW(1e-2, **options, decay_filter="weight")
    optimizer.init(start)
    before = all_bits([start, optimizer.state], RECORDS)
    for path, _ in tree_flatten(start):
        new = run(optimizer, start, [spoilt(gradients, path, math.inf)])
        assert_same_bits(all_bits([new, optimizer.state], RECORDS), before)


# ---- The rest of the optimizer ----


def test_without_a_kernel_mlx_operations_do_the_same():
    """MLX_FUSED_ADAM_BACKEND=stock: norm, clipping and skipping by MLX's operations."""
    program = """
import math, mlx.core as mx, mlx_fused_adam as fused
options = {"max_grad_norm": 1.0, "skip_nonfinite": True, "stochastic_rounding": False}
optimizer = fused.AdamW(1e-2, bias_correction=True, **options)
parameters = {"w": mx.ones((3, 4)), "h": mx.ones(5, mx.bfloat16)}
gradients = {"w": mx.full((3, 4), 2.0), "h": mx.full((5,), 3.0, mx.bfloat16)}
parameters = optimizer.apply_gradients(gradients, parameters)
print(optimizer.backend, optimizer.state["grad_norm"].item())
new = optimizer.apply_gradients(gradients | {"w": mx.full((3, 4), math.nan)}, parameters)
for name in parameters:
    assert mx.array_equal(new[name], parameters[name]), name
print(optimizer.step.item(), optimizer.state["skipped"].item())
print(*[x.astype(mx.float32).mean().item() for x in parameters.values()])
"""
    results = []
    for forced in ("stock", ""):
        output = output_of_python("-c", program, MLX_FUSED_ADAM_BACKEND=forced)
        results.append(output.splitlines())
    assert results[0][0].startswith("stock (MLX_FUSED_ADAM_BACKEND=stock)")
    norms = [float(lines[0].split()[-1]) for lines in results]
    np.testing.assert_allclose(norms, math.sqrt(12 * 4 + 5 * 9), rtol=1e-6)
    assert results[0][1] == results[1][1] == "1 1"
    means = [[float(x) for x in lines[2].split()] for lines in results]
    np.testing.assert_allclose(means[0], means[1], rtol=1e-6)


def test_derivatives_go_through_clipping():
    """The new parameter by the gradient's size: with the norm at 3 and a limit of 1, the direction alone counts."""
    w, m, v = mx.array([1.0, 2.0]), mx.array([0.1, 0.2]), mx.array([0.3, 0.4])

    def updated(size):
        optimizer = fused.Adam(0.1, max_grad_norm=1.0)
        optimizer.state["w"] = {"m": m, "v": v}
        new = optimizer.apply_gradients({"w": size * mx.array([0.6, 0.8])}, {"w": w})
        return new["w"].sum()

    assert abs(mx.grad(updated)(mx.array(3.0)).item()) < 1e-6
    assert abs(mx.grad(updated)(mx.array(0.5)).item()) > 1e-2


def test_a_rule_of_ones_own_is_rejected():
    class Doubled(fused.Adam):
        def apply_single(self, gradient, parameter, state):
            return super().apply_single(gradient * 2, parameter, state)

    parameters = {"w": mx.ones(3)}
    optimizer = Doubled(1e-2, max_grad_norm=1.0)
    with pytest.raises(ValueError, match=r"\[Adam\] apply_single must be the package's own with"):
        optimizer.apply_gradients(parameters, parameters)
    assert optimizer.step.item() == 0
    Doubled(1e-2).apply_gradients(parameters, parameters)


@pytest.mark.parametrize(("name", "options"), [("grad_norm", {"max_grad_norm": 1.0}),
                                               ("skipped", {"skip_nonfinite": True})])  # fmt: skip
def test_a_parameter_of_the_records_name_is_rejected(name, options):
    parameters = {name: mx.ones(3)}
    optimizer = fused.Adam(1e-2, **options)
    with pytest.raises(ValueError, match=rf"\[Adam\] parameters must not be named '{name}'"):
        optimizer.apply_gradients(parameters, parameters)
    assert optimizer.state[name].size == 1 and optimizer.step.item() == 0
    # Without the option it is a parameter like any other, in later inits too.
    plain = fused.Adam(1e-2)
    plain.apply_gradients(parameters, parameters)
    plain.init(parameters)
    assert mx.all(plain.state[name]["m"] > 0) and mx.all(fused.stock_state(plain)[name]["m"] > 0)
    # Further down it stands in nobody's way.
    nested = {"inner": parameters}
    optimizer.apply_gradients(nested, nested)


def test_the_records_come_and_go_with_their_options():
    """At the assignment, so that a logger may read them before the next update."""
    optimizer = fused.Adam(1e-2)
    optimizer.max_grad_norm, optimizer.skip_nonfinite = 1.0, True
    assert optimizer.state["grad_norm"].item() == optimizer.state["skipped"].item() == 0
    optimizer.max_grad_norm = None
    assert "grad_norm" not in optimizer.state and "skipped" in optimizer.state


def test_a_state_of_mlx_optimizers_is_adopted_and_given_back():
    rng = np.random.default_rng(13)
    start, gradients = tree(rng), tree(rng)
    reference = optim.AdamW(1e-2)
    parameters = run(reference, start, [gradients])
    optimizer = fused.AdamW(1e-2, max_grad_norm=1e9, skip_nonfinite=True)
    optimizer.state = copied(reference.state)
    new = optimizer.apply_gradients(gradients, parameters)
    assert optimizer.state["skipped"].item() == 0 and optimizer.state["grad_norm"].item() > 0
    given = fused.stock_state(optimizer)
    assert set(given) == set(reference.state)
    plain = fused.AdamW(1e-2)
    plain.state = copied(optimizer.state)
    plain.init(parameters)
    assert set(plain.state) == set(reference.state)
    assert mx.array_equal(new["head"], reference.apply_gradients(gradients, parameters)["head"])


def test_checkpoints_hold_norm_and_count(tmp_path):
    rng = np.random.default_rng(14)
    start, good = tree(rng), [tree(rng) for _ in range(3)]
    bad = spoilt(good[0], "head", math.nan)
    options = SETTINGS | {"max_grad_norm": 2.0, "skip_nonfinite": True, "state_dtype": "int8"}
    optimizer = fused.AdamW(1e-2, **options)
    parameters = run(optimizer, start, [good[0], bad, good[1]])
    fused.save_optimizer(tmp_path / "o.safetensors", optimizer)
    resumed = fused.AdamW(1e-2, **options)
    fused.load_optimizer(tmp_path / "o.safetensors", resumed)
    assert resumed.state["skipped"].item() == 1
    assert resumed.state["grad_norm"].item() == optimizer.state["grad_norm"].item()
    found, expected = run(resumed, parameters, [good[2]]), run(optimizer, parameters, [good[2]])
    assert_same_training(found, resumed, expected, optimizer)
    other = fused.AdamW(1e-2, **options | {"max_grad_norm": 3.0})
    with pytest.raises(ValueError, match=r"max_grad_norm \(file: 2.0, optimizer: 3.0\)"):
        fused.load_optimizer(tmp_path / "o.safetensors", other)
    for side, limit in (("file", 2.0), ("optimizer", 3.0)):
        fused.load_optimizer(tmp_path / "o.safetensors", other, hyperparameters=side)
        assert other._options.max_grad_norm == limit
        other = fused.AdamW(1e-2, **options | {"max_grad_norm": 3.0})
    plain = fused.AdamW(1e-2, **SETTINGS, state_dtype="int8")
    plain.init(parameters)
    fused.load_optimizer(tmp_path / "o.safetensors", plain, hyperparameters="optimizer")
    assert not {"grad_norm", "skipped"} & set(plain.state)
    fused.load_optimizer(tmp_path / "o.safetensors", plain, hyperparameters="file")
    assert {"grad_norm", "skipped"} <= set(plain.state)


def test_pickled_with_clipping_and_skipping():
    rng = np.random.default_rng(15)
    start, gradients = tree(rng), tree(rng)
    optimizer = fused.AdamW(1e-2, max_grad_norm=1.0, skip_nonfinite=True)
    parameters = run(optimizer, start, [gradients])
    copy = pickle.loads(pickle.dumps(optimizer))
    found, expected = run(copy, parameters, [gradients]), run(optimizer, parameters, [gradients])
    assert_same_training(found, copy, expected, optimizer)


def test_a_group_of_one_changes_nothing():
    """The whole world of a single process."""
    rng = np.random.default_rng(16)
    start, gradients = tree(rng), tree(rng)
    options = SETTINGS | {"max_grad_norm": 1.0, "skip_nonfinite": True}
    group = mx.distributed.init()
    optimizer = fused.AdamW(1e-2, **options, shard_group=group)
    reference = fused.AdamW(1e-2, **options)
    found, expected = run(optimizer, start, [gradients]), run(reference, start, [gradients])
    assert_same_training(found, optimizer, expected, reference)
    with pytest.raises(TypeError, match="cannot be pickled; use save_optimizer"):
        pickle.dumps(optimizer)
