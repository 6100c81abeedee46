"""The project's own shader on its own host path, with faults planted in the shader's text: each must be seen."""

from __future__ import annotations

import re
import sys

import mlx.core as mx
import numpy as np
import pytest

if sys.platform != "linux":
    pytest.skip("the emulator runs on Linux", allow_module_level=True)

from emulator import build


@pytest.fixture
def update():
    """adam_update of the emulated extension on one tensor, with plain settings."""
    extension = build.load_extension()
    device = mx.default_device()
    mx.set_default_device(mx.cpu)

    def update(parameter: mx.array, gradient: mx.array, m: mx.array, v: mx.array) -> list[mx.array]:
        return run_update(extension, parameter, gradient, m, v)

    yield update
    mx.set_default_device(device)


def run_update(extension, parameter, gradient, m, v) -> list[mx.array]:
    settings = {
        "beta1": 0.9,
        "beta2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.0,
        "bias_correction": False,
    }
    lists = [[x] for x in (parameter, gradient, m, v)]
    rate = mx.array(0.1)
    results = extension.adam_update(*lists, rate, None, name=lambda i: "x", **settings)
    return [result[0] for result in results]


@pytest.fixture
def plant(emulator):
    yield emulator.replace_in_shaders
    emulator.replace_in_shaders("", "")


def tensors(shape: tuple[int, ...], layout: str) -> list[mx.array]:
    rng = np.random.default_rng(6)
    w, g, m, v = (mx.array(rng.random(shape).astype(np.float32)) for _ in range(4))
    if layout == "column-major":
        g = mx.contiguous(g.T).T
    if layout == "strided":
        g = mx.repeat(g, 2, axis=0)[::2]
    mx.eval(w, g, m, v)
    return [w, g, m, v]


# The layout whose kernel it hits, the text replaced, the replacement, and what must be seen of it.
PLANTED = {
    "buffers swapped": (
        "linear",
        "device S* m [[buffer(kM)]]",
        "device S* m [[buffer(kV)]]",
        "bound twice|differs|nothing is bound",
    ),
    "tail one too long": (
        "linear",
        "min(size, start + kElementsPerThread)",
        "start + kElementsPerThread",
        "ends at",
    ),
    "tail one too short": (
        "linear",
        "min(size, start + kElementsPerThread)",
        "min(size - 1, start + kElementsPerThread)",
        "differs",
    ),
    "vectors where none fit": (
        "linear",
        "if (vectors && size - start >= kElementsPerThread)",
        "if (true)",
        "ends at",
    ),
    "no barrier": (
        "column-major",
        "threadgroup_barrier(mem_flags::mem_threadgroup);",
        "",
        "uninitialised|no barrier between",
    ),
    "barrier for the wrong memory": (
        "column-major",
        "threadgroup_barrier(mem_flags::mem_threadgroup)",
        "threadgroup_barrier(mem_flags::mem_device)",
        "no barrier between",
    ),
    "tile too narrow": (
        "column-major",
        "tile[kTile][kTile + 1]",
        "tile[kTile][kTile - 1]",
        "tile",
    ),
    "wrong stride": (
        "column-major",
        "column * column_stride",
        "column * (column_stride + 1)",
        "ends at|differs",
    ),
    "edge of the tile forgotten": (
        "column-major",
        "if (row < args.rows && column < args.columns)",
        "if (row < args.rows)",
        "ends at|race|bytes",
    ),
    "wrong axis": (
        "strided",
        "Index size = Index(shape[axis]);",
        "Index size = Index(shape[0]);",
        "ends at|differs|race",
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_a_fault_planted_in_the_shader_is_seen(update, plant, name):
    from mlx_fused_adam import _ext

    layout, text, replacement, problem = PLANTED[name]
    shape = (1001,) if layout == "linear" else (37, 70)
    expected = run_update(_ext, *tensors(shape, layout))
    right = update(*tensors(shape, layout))
    for got, want in zip(right, expected, strict=True):
        np.testing.assert_array_equal(np.array(got).view(np.uint32), np.array(want).view(np.uint32))
    plant(text, replacement)
    try:
        wrong = update(*tensors(shape, layout))
        mx.eval(wrong)
        same = all(bool(mx.array_equal(a, b)) for a, b in zip(wrong, expected, strict=True))
        seen = "" if same else "differs"
    except RuntimeError as error:
        assert "does not compile" not in str(error)
        seen = str(error)
    assert re.search(problem, seen), f"{name}: {seen or 'not seen'}"


def test_a_tensor_that_starts_between_vectors(update):
    """MLX's buffers start at pages on Metal, so an array's own offset decides whether vectors fit."""
    from mlx_fused_adam import _ext

    sliced = [x[1:] for x in tensors((1001,), "linear")]
    mx.eval(sliced)
    expected = run_update(_ext, *sliced)
    for got, want in zip(update(*sliced), expected, strict=True):
        assert mx.array_equal(got, want)


LARGE = (2**16 + 1, 2**16)  # more than 2^32 elements
TAIL = 64


def large_tensors(emulator, layout: str) -> list[mx.array]:
    """Half-precision tensors, not zero in their last elements only, that exist only where they are touched."""
    transposed = layout == "column-major"
    step = 2 if layout == "strided" else 1
    shapes = [LARGE, (LARGE[0], LARGE[1] * step), LARGE, LARGE]
    w, g, m, v = (emulator.sparse_zeros(s, mx.float16) for s in shapes)
    if transposed:
        g = emulator.sparse_zeros(LARGE[::-1], mx.float16)
    views = [np.array(x, copy=False) for x in (w, g, m, v)]
    views[1] = views[1].T if transposed else views[1][:, ::step]
    for view, value in zip(views, (1.0, 0.5, 0.25, 0.125), strict=True):
        view[-1, -TAIL:] = value * np.arange(1, TAIL + 1)
    return [w, g.T if transposed else g[:, ::step], m, v]


# The threadgroups that update the last elements, by what eval_metal.cpp chooses: of each dispatch of 2^30 elements the
# first 64, which hold all of the last dispatch; the last tiles; the end of the last row of 2^20 threads.
LAST_THREADGROUPS = {
    "linear": (0, 64),
    "column-major": (2048 * 2049 - TAIL // 32, 2048 * 2049),
    "strided": (4096 * 4096 + 255, 4096 * 4096 + 256),
}
OVERFLOWS = {
    "column-major": ("int64_t at = matrix", "int at = matrix"),
    "strided": ("Index at = Index(thread_in_grid.y)", "Index at = thread_in_grid.y"),
}


@pytest.fixture
def no_memory_limit():
    """Results this large pass MLX's limit, upon which it may wait for tasks that failed in another test, for ever."""
    before = mx.set_memory_limit(1 << 50)
    yield
    mx.set_memory_limit(before)


def last_elements(emulator, update, layout: str) -> list[np.ndarray]:
    emulator.run_only_threadgroups(*LAST_THREADGROUPS[layout])
    try:
        results = update(*large_tensors(emulator, layout))
        mx.eval(results)
    finally:
        emulator.run_all_threadgroups()
    return [np.array(x, copy=False)[-1, -TAIL:].copy() for x in results]


@pytest.mark.usefixtures("no_memory_limit")
@pytest.mark.parametrize("layout", LAST_THREADGROUPS)
def test_tensors_of_more_than_2_32_elements(emulator, update, layout):
    from mlx_fused_adam import _ext

    values = [mx.arange(1, TAIL + 1).astype(mx.float16) * x for x in (1.0, 0.5, 0.25, 0.125)]
    expected = run_update(_ext, *values)
    for got, want in zip(last_elements(emulator, update, layout), expected, strict=True):
        np.testing.assert_array_equal(got, np.array(want))


@pytest.mark.usefixtures("no_memory_limit")
@pytest.mark.parametrize("layout", OVERFLOWS)
def test_an_index_of_32_bits_is_seen(emulator, update, plant, layout):
    right = last_elements(emulator, update, layout)
    plant(*OVERFLOWS[layout])
    try:
        wrong = last_elements(emulator, update, layout)
    except RuntimeError as error:
        assert "before the start" in str(error) or "outside every buffer" in str(error)
    else:
        assert any(not np.array_equal(a, b) for a, b in zip(right, wrong, strict=True))
