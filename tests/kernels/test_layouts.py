"""Any memory layout of any input gives the result of the same values laid out row-major."""

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import mlx_fused_adam as fused
from support import oracle
from support.arrays import DTYPES, random

pytestmark = pytest.mark.usefixtures("device")

SETTINGS = oracle.Settings(weight_decay=0.1, bias_correction=True)


def values(rng, shape, dtype, positive=False) -> mx.array:
    x = random(rng, shape, dtype)
    return mx.abs(x) if positive else x


def transposed(rng, shape, dtype, positive):
    """Axes in memory in a random order."""
    order = rng.permutation(len(shape))
    x = values(rng, [shape[i] for i in order], dtype, positive)
    return mx.transpose(x, [int(i) for i in np.argsort(order)])


def sliced(rng, shape, dtype, positive):
    """Every axis a part, with a step, of a larger one."""
    steps = [int(s) for s in rng.integers(1, 4, len(shape))]
    x = values(rng, [n * s + 2 for n, s in zip(shape, steps, strict=True)], dtype, positive)
    at = tuple(slice(1, 1 + n * s, s) for n, s in zip(shape, steps, strict=True))
    return x[at] if at else x


def reversed_axes(rng, shape, dtype, positive):
    x = values(rng, shape, dtype, positive)
    return x[tuple(slice(None, None, -1) for _ in shape)] if shape else x


def broadcast(rng, shape, dtype, positive):
    kept = [n if rng.random() < 0.5 else 1 for n in shape]
    return mx.broadcast_to(values(rng, kept, dtype, positive), shape)


def offset(rng, shape, dtype, positive):
    """Row-major, but not at the beginning of its buffer, so not aligned for vector loads."""
    size = int(np.prod(shape))
    return values(rng, size + 3, dtype, positive)[3:].reshape(shape)


def row_major(rng, shape, dtype, positive):
    return values(rng, shape, dtype, positive)


# Around the tiles of the CPU back end, wherever in a cache line buffers begin: whole rows in one tile and in several,
# rows so short that many lie in a tile, and so long that they are cut, whatever the cache.
EDGES = [
    *((rows, columns) for rows in (15, 64, 260) for columns in (254, 509, 1023, 1024, 1027, 2050)),
    (33, 4130),
    *((rows, columns) for rows in (130, 331) for columns in (128, 256, 512, 1536)),  # lines that crowd in a cache
    (3000, 5),
    (2100, 12),
    (15, 33727),  # a cut that only the shift of the grid makes
    (64, 16600),
    (150, 16641),
]

LAYOUTS = [row_major, transposed, sliced, reversed_axes, broadcast, offset]


def check(assert_equal, w, g, m, v):
    before = [oracle.to_numpy(x) for x in (w, g, m, v)]
    results = fused.adam_update(w, g, m, v, **SETTINGS.arguments(3))
    expected = oracle.adam(*before, 3, SETTINGS, oracle.stepwise)
    slacks = (oracle.slack_on_gpu(before[0], expected[0], 3, SETTINGS), 0.0, 0.0)
    for name, actual, reference, slack in zip("wmv", results, expected, slacks, strict=True):
        assert_equal(actual, reference, name, slack)
    for name, x, old in zip("wgmv", (w, g, m, v), before, strict=True):
        assert_equal(x, old, f"the input {name}, which is still held")


@given(
    shape=st.lists(st.sampled_from([1, 2, 3, 5, 8, 17, 33]), max_size=4).map(tuple),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 4),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_layout_of_any_input(assert_equal, shape, layouts, dtype, seed):
    if np.prod(shape) > 20000:
        shape = shape[:2]
    rng = np.random.default_rng(seed)
    w, g, m, v = (
        layout(rng, shape, dtype, positive)
        for layout, positive in zip(layouts, (False, False, False, True), strict=True)
    )
    check(assert_equal, w, g, m, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape",
    [
        (4, 4),
        (31, 33),
        (32, 32),
        (64, 128),
        (65, 129),
        (63, 127),
        (7, 300),
        (300, 7),
        (23, 24, 25),
        *EDGES,
    ],
    ids=str,
)
def test_column_major_gradients_at_tile_edges(assert_equal, shape, dtype):
    """nn.Linear's case, at sizes around the tiles of both back ends; the last axes swapped in a batch."""
    rng = np.random.default_rng(0)
    g = values(rng, (*shape[:-2], shape[-1], shape[-2]), dtype).swapaxes(-1, -2)
    w, m, v = (values(rng, shape, dtype, positive) for positive in (False, False, True))
    check(assert_equal, w, g, m, v)


@pytest.mark.parametrize("axes", [(2, 0, 1), (1, 2, 0), (2, 1, 0), (1, 0, 2), (0, 2, 1)], ids=str)
def test_permuted_batches(assert_equal, axes):
    """The gradient's unit stride along any axis, as convolutions and mixtures of experts have it."""
    rng = np.random.default_rng(0)
    shape = (9, 40, 35)
    in_memory = [shape[i] for i in axes]
    g = mx.transpose(values(rng, in_memory, mx.float32), [int(i) for i in np.argsort(axes)])
    assert g.shape == shape
    w, m, v = (values(rng, shape, mx.float32, positive) for positive in (False, False, True))
    check(assert_equal, w, g, m, v)


@pytest.mark.parametrize("axes", [(1, 0, 3, 2), (0, 1, 3, 2), (3, 1, 0, 2), (2, 1, 0, 4, 3)], ids=str)
def test_permuted_batches_of_several_axes(assert_equal, axes):
    """Tiles around which axes are left that no array lets merge."""
    rng = np.random.default_rng(0)
    shape = (2, 3, 4, 14, 17)[-len(axes) :]
    in_memory = [shape[i] for i in axes]
    g = mx.transpose(values(rng, in_memory, mx.float32), [int(i) for i in np.argsort(axes)])
    w, m, v = (values(rng, shape, mx.float32, positive) for positive in (False, False, True))
    check(assert_equal, w, g, m, v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape, axes",
    [
        ((70, 3, 5, 130), (3, 1, 2, 0)),  # a transposed convolution's
        ((33, 2, 256), (2, 1, 0)),
        ((130, 4, 128), (1, 2, 0)),
        ((2, 65, 3, 64), (0, 3, 2, 1)),
        ((20, 70, 530), (1, 2, 0)),  # rows too long for a tile
    ],
    ids=str,
)
def test_matrices_beside_each_other(assert_equal, shape, axes, dtype):
    """The gradient's unit stride is along an axis that is not next to the last: with the axes between, rows of the
    parameter are longer. Some of those axes run backwards.
    """
    rng = np.random.default_rng(0)
    g = mx.transpose(values(rng, [shape[i] for i in axes], dtype), [int(i) for i in np.argsort(axes)])
    g = g[:, ::-1] if len(shape) == 3 else g[:, :, ::-1]
    assert g.shape == shape
    w, m, v = (values(rng, shape, dtype, positive) for positive in (False, False, True))
    check(assert_equal, w, g, m, v)


@pytest.mark.parametrize("layout", [sliced, reversed_axes])
@pytest.mark.parametrize("of", range(4))
def test_pieces_around_which_several_axes_are_left(assert_equal, layout, of):
    """More than a thousand elements in the last two."""
    rng = np.random.default_rng(of)
    shape = (3, 4, 35, 36)
    arrays = [values(rng, shape, mx.float32, positive) for positive in (False, False, False, True)]
    arrays[of] = layout(rng, shape, mx.float32, of == 3)
    check(assert_equal, *arrays)


@pytest.mark.cpu_only
@pytest.mark.parametrize("layout", [row_major, transposed, sliced])
@pytest.mark.parametrize("threads", [1, 3])
def test_hundreds_of_units_of_work(assert_equal, layout, threads):
    rng = np.random.default_rng(1)
    shape = {row_major: (2_300_000,), transposed: (1500, 1501), sliced: (901, 900)}[layout]
    w, m, v = (values(rng, shape, mx.float32, positive) for positive in (False, False, True))
    g = values(rng, shape[::-1], mx.float32).T if layout is transposed else layout(rng, shape, mx.float32, False)
    before = fused.num_threads()
    try:
        fused.set_num_threads(threads)
        check(assert_equal, w, g, m, v)
    finally:
        fused.set_num_threads(before)


def test_linear_weight_gradients_are_column_major():
    """The premise of the tiled kernels: what MLX's autograd hands over for nn.Linear."""
    import mlx.nn as nn

    layer = nn.Linear(6, 4)
    gradient = mx.grad(lambda w: (mx.ones((5, 6)) @ w.T).sum())(layer.weight)
    mx.eval(gradient)
    assert memoryview(gradient).strides == (4, 16)


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 4, 5)], ids=str)
def test_zero_size(shape):
    x = mx.zeros(shape)
    results = fused.adam_update(x, x, x, x, 0.1)
    mx.eval(results)
    assert [r.shape for r in results] == [shape] * 3


def test_the_same_array_in_several_places(assert_equal):
    """Parameter, gradient, m and v may be one array; it stays as it was."""
    x = mx.abs(values(np.random.default_rng(0), (300,), mx.float32))
    check(assert_equal, x, x, x, x)


def test_more_elements_than_one_unit_of_work(assert_equal):
    rng = np.random.default_rng(0)
    w, g, m, v = (values(rng, (70001,), mx.float32, positive) for positive in (0, 0, 0, 1))
    check(assert_equal, w, g, m, v)
