"""The emulator runs real MSL: kernels of MLX, from the headers in its wheel, agree with MLX's own results."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

if sys.platform != "linux":
    pytest.skip("the emulator runs on Linux", allow_module_level=True)

from emulator import build

pytestmark = pytest.mark.usefixtures("not_hostile")

INCLUDE_DIRS = [str(build.HERE / "calibration"), str(Path(mx.__file__).parent / "include")]
KERNELS = "mlx/backend/metal/kernels/"


def mlx_source(headers: list[str], name: str, template: str, *arguments: str) -> str:
    """A source as MLX's own run-time compilation puts it together."""
    includes = "".join(f'#include "{KERNELS}{header}"\n' for header in ["utils.h", *headers])
    kernel = f"{template}<{', '.join(arguments)}>"
    return includes + f'template [[host_name("{name}")]] [[kernel]] decltype({kernel}) {kernel};\n'


def in_dtype(x: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """As the bytes that a kernel sees: bfloat16 has no NumPy dtype."""
    array = mx.array(x).astype(dtype)
    return np.array(array.view(mx.uint16) if dtype == mx.bfloat16 else array)


def from_dtype(x: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    array = mx.array(x)
    return np.array((array.view(mx.bfloat16) if dtype == mx.bfloat16 else array).astype(mx.float32))


TYPE_NAMES = {mx.float32: "float", mx.float16: "half", mx.bfloat16: "bfloat16_t"}
TOLERANCES = {mx.float32: 1e-5, mx.float16: 1e-3, mx.bfloat16: 8e-3}


@pytest.mark.parametrize("dtype", TYPE_NAMES, ids=str)
@pytest.mark.parametrize("kernel,width", [("softmax_single_row", 1), ("softmax_single_row", 517)])
def test_softmax_of_one_row_a_threadgroup(emulator, kernel, width, dtype):
    check_softmax(emulator, kernel, width, dtype, math.ceil(width / 4 / 32) * 32)


@pytest.mark.parametrize("dtype", TYPE_NAMES, ids=str)
def test_softmax_of_long_rows(emulator, dtype):
    check_softmax(emulator, "softmax_looped", 4999, dtype, 1024)


def check_softmax(emulator, kernel: str, width: int, dtype: mx.Dtype, threads: int) -> None:
    rows = 3
    x = np.random.default_rng(1).normal(size=(rows, width)).astype(np.float32) * 4
    source = mlx_source(["softmax.h"], kernel, kernel, TYPE_NAMES[dtype], "float")
    given = in_dtype(x, dtype)
    out = np.zeros_like(given)
    buffers = [(0, given, "input"), (1, out, "output"), (2, np.array([width], np.int32), "bytes")]
    emulator.run(source, kernel, buffers, (rows * threads, 1, 1), (threads, 1, 1), [], INCLUDE_DIRS)
    with mx.stream(mx.cpu):
        expected = mx.softmax(mx.array(x).astype(dtype).astype(mx.float32), axis=-1)
    tolerance = TOLERANCES[dtype]
    np.testing.assert_allclose(from_dtype(out, dtype), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernel,width,threads", [("logsumexp", 999, 256), ("logsumexp_looped", 9001, 1024)])
def test_logsumexp(emulator, kernel, width, threads):
    x = np.random.default_rng(2).normal(size=(4, width)).astype(np.float32)
    out = np.zeros(4, np.float32)
    source = mlx_source(["logsumexp.h"], kernel, kernel, "float")
    buffers = [(0, x, "input"), (1, out, "output"), (2, np.array([width], np.int32), "bytes")]
    emulator.run(source, kernel, buffers, (4 * threads, 1, 1), (threads, 1, 1), [], INCLUDE_DIRS)
    with mx.stream(mx.cpu):
        np.testing.assert_allclose(out, mx.logsumexp(mx.array(x), axis=-1), rtol=1e-6)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("inclusive", [False, True])
def test_scan(emulator, inclusive, reverse):
    """Barriers in a loop, prefix sums over simdgroups, shuffles."""
    width, rows = 9001, 2
    x = np.random.default_rng(3).integers(-50, 50, size=(rows, width)).astype(np.int32)
    out = np.zeros_like(x)
    name = f"scan_{inclusive}_{reverse}"
    flags = [str(flag).lower() for flag in (inclusive, reverse)]
    source = mlx_source(["scan.h"], name, "contiguous_scan", "int32_t", "int32_t", "CumSum<int32_t>", "4", *flags)
    buffers = [(0, x, "input"), (1, out, "output"), (2, np.array([width], np.uint64), "bytes")]
    emulator.run(source, name, buffers, (1024, rows, 1), (1024, 1, 1), [], INCLUDE_DIRS)
    with mx.stream(mx.cpu):
        expected = mx.cumsum(mx.array(x), axis=-1, reverse=reverse, inclusive=inclusive)
        np.testing.assert_array_equal(out, expected)


def test_sort(emulator):
    """Threadgroup memory behind pointers, merges of many rounds."""
    width = 1000
    x = np.random.default_rng(4).normal(size=(3, width)).astype(np.float32)
    out = np.zeros_like(x)
    source = mlx_source(["sort.h"], "sort", "block_sort", "float", "float", "false", "256", "4")
    sizes = [np.array([n], t) for n, t in [(width, np.int32), *[(1, np.int64)] * 2, *[(width, np.int64)] * 2]]
    buffers = [(0, x, "input"), (1, out, "output")]
    buffers += [(2 + i, size, "bytes") for i, size in enumerate(sizes)]
    emulator.run(source, "sort", buffers, (256, 3, 1), (256, 1, 1), [], INCLUDE_DIRS)
    np.testing.assert_array_equal(out, np.sort(x, axis=-1))


@pytest.mark.parametrize("dtype", TYPE_NAMES, ids=str)
def test_arange(emulator, dtype):
    count = 77
    out = np.zeros(count, np.float32 if dtype == mx.float32 else np.uint16)
    source = mlx_source(["arange.h"], "arange", "arange", TYPE_NAMES[dtype])
    start, step = (in_dtype(np.array([v], np.float32), dtype) for v in (-3.0, 0.5))
    buffers = [(0, start, "bytes"), (1, step, "bytes"), (2, out, "output")]
    emulator.run(source, "arange", buffers, (count, 1, 1), (32, 1, 1), [], INCLUDE_DIRS)
    got = from_dtype(out.view(np.float16) if dtype == mx.float16 else out, dtype)
    np.testing.assert_array_equal(got, np.arange(count, dtype=np.float32) * 0.5 - 3)


@pytest.mark.parametrize("operation,expected", [("Sqrt", np.sqrt), ("Exp", np.exp), ("Log", np.log)])
def test_unary(emulator, operation, expected):
    x = np.random.default_rng(5).random(1001).astype(np.float32) + 0.1
    out = np.zeros_like(x)
    headers = ["unary_ops.h", "unary.h"]
    source = mlx_source(headers, operation, "unary_v", "float", "float", operation)
    buffers = [(0, x, "input"), (1, out, "output"), (2, np.array([x.size], np.uint32), "bytes")]
    emulator.run(source, operation, buffers, (501, 1, 1), (256, 1, 1), [], INCLUDE_DIRS)
    np.testing.assert_allclose(out, expected(x), rtol=1e-6)
