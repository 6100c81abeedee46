"""The Metal emulator itself: MLX's own kernels run on it and agree with MLX, and it sees each kind of fault planted here."""

from __future__ import annotations

import math
import re
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

if sys.platform != "linux":
    pytest.skip("the emulator runs on Linux", allow_module_level=True)

from emulator import build, msl, translate

INCLUDE_DIRS = [str(build.HERE / "calibration"), str(Path(mx.__file__).parent / "include")]
KERNELS = "mlx/backend/metal/kernels/"


@pytest.fixture(scope="module")
def emulator():
    return build.load_emulator()


# ---- Calibration: kernels of MLX, from the headers in its wheel


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


@pytest.mark.parametrize(
    "kernel,width,threads", [("logsumexp", 999, 256), ("logsumexp_looped", 9001, 1024)]
)
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
    source = mlx_source(
        ["scan.h"], name, "contiguous_scan", "int32_t", "int32_t", "CumSum<int32_t>", "4", *flags
    )
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
    sizes = [
        np.array([n], t)
        for n, t in [(width, np.int32), *[(1, np.int64)] * 2, *[(width, np.int64)] * 2]
    ]
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


@pytest.mark.parametrize(
    "operation,expected", [("Sqrt", np.sqrt), ("Exp", np.exp), ("Log", np.log)]
)
def test_unary(emulator, operation, expected):
    x = np.random.default_rng(5).random(1001).astype(np.float32) + 0.1
    out = np.zeros_like(x)
    headers = ["unary_ops.h", "unary.h"]
    source = mlx_source(headers, operation, "unary_v", "float", "float", operation)
    buffers = [(0, x, "input"), (1, out, "output"), (2, np.array([x.size], np.uint32), "bytes")]
    emulator.run(source, operation, buffers, (501, 1, 1), (256, 1, 1), [], INCLUDE_DIRS)
    np.testing.assert_allclose(out, expected(x), rtol=1e-6)


# ---- Faults: each of these kernels has one, and each must be seen and named

FAULTS = """
#include <metal_stdlib>
using namespace metal;

constant float table[2] = {1.0f, 2.0f};

#define KERNEL(name) \\
  kernel void name(device const float* in, device float* out, constant uint& n, \\
                   uint i [[thread_position_in_grid]], \\
                   uint t [[thread_index_in_threadgroup]], \\
                   uint lane [[thread_index_in_simdgroup]])

KERNEL(correct) {
  threadgroup float tile[64];
  tile[t] = in[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[i] = tile[63 - t];
}
KERNEL(reads_past_the_end) { out[i] = in[i + 1]; }
KERNEL(reads_before_the_start) { out[i] = in[int(i) - 1]; }
KERNEL(reads_far_away) { out[i] = in[i + (1 << 24)]; }
KERNEL(writes_past_the_end) { out[i + 1] = in[i]; }
KERNEL(writes_an_input) { ((device float*)in)[i] = 1; out[i] = 1; }
KERNEL(reads_an_output) { out[i] += in[i]; }
KERNEL(skips_an_element) { if (i != 7) out[i] = in[i]; }
KERNEL(lacks_a_barrier) {
  threadgroup float tile[64];
  tile[t] = in[i];
  out[i] = tile[63 - t];
}
KERNEL(lacks_a_second_barrier) {
  threadgroup float tile[64];
  tile[t] = in[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  float mirrored = tile[63 - t];
  tile[t] = mirrored;
  out[i] = mirrored;
}
KERNEL(has_a_barrier_for_device_memory_only) {
  threadgroup float tile[64];
  tile[t] = in[i];
  threadgroup_barrier(mem_flags::mem_device);
  out[i] = tile[63 - t];
}
KERNEL(has_a_barrier_for_the_simdgroup_only) {
  threadgroup float tile[64];
  tile[t] = in[i];
  simdgroup_barrier(mem_flags::mem_threadgroup);
  out[i] = tile[63 - t];
}
KERNEL(has_a_barrier_that_some_skip) {
  if (t < 40) threadgroup_barrier(mem_flags::mem_threadgroup);
  out[i] = in[i];
}
KERNEL(has_two_barriers_for_one) {
  if (t < 40) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  } else {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  out[i] = in[i];
}
KERNEL(divides_a_simdgroup) {
  out[i] = in[i];
  if (lane < 5) {
    out[i] = simd_sum(in[i]);
  } else {
    threadgroup_barrier(mem_flags::mem_none);
  }
}
KERNEL(writes_one_element_twice) { out[i] = in[i]; if (i == 5) out[4] = 1; }
KERNEL(reads_what_others_write) { out[i] = in[i]; out[i] = out[i ^ 1]; }
KERNEL(loads_a_misaligned_vector) {
  out[i] = in[i];
  if (i == 0) {
    float4 v = *(device const float4*)(in + 1);
    out[0] = v.x + v.y + v.z + v.w;
  }
}
KERNEL(reads_uninitialised_threadgroup_memory) {
  threadgroup float tile[64];
  if (t < 60) tile[t] = in[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[i] = tile[63 - t];
}
KERNEL(runs_past_a_threadgroup_variable) {
  threadgroup float tile[63];
  tile[t] = in[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[i] = tile[t];
}
KERNEL(writes_a_constant) { ((thread float*)table)[t & 1] = in[i]; out[i] = in[i]; }
KERNEL(follows_a_wild_pointer) { out[i] = *(device const float*)(ulong(i) + 4096 * 4); }

kernel void depends_on_the_order(device atomic_uint* counter, device uint* out,
                                 uint i [[thread_position_in_grid]]) {
  out[atomic_fetch_add_explicit(counter, 1u, memory_order_relaxed)] = i;
}
kernel void adds_atomically(device atomic_uint* counter, uint i [[thread_position_in_grid]]) {
  atomic_fetch_add_explicit(counter, i, memory_order_relaxed);
}
kernel void sized_by_the_host(device float* out, threadgroup float* memory [[threadgroup(0)]],
                              uint i [[thread_position_in_threadgroup]]) {
  memory[i] = i;
  out[i] = memory[i];
}
kernel void many(device float* a [[buffer(31)]]) { a[0] = 1; }
struct Arguments { uint n; float4 x; };
kernel void takes_a_struct(constant Arguments& arguments, device float* out) { out[0] = arguments.x.y; }
kernel void where(device uint* out, uint3 at [[thread_position_in_grid]],
                  uint3 local [[thread_position_in_threadgroup]], uint3 group [[threadgroup_position_in_grid]],
                  uint3 size [[threads_per_threadgroup]], uint2 grid [[threads_per_grid]],
                  ushort index [[thread_index_in_threadgroup]]) {
  out[at.y * grid.x + at.x] =
      ((((group.x * 10 + group.y) * 10 + local.x) * 10 + size.x) * 10 + size.y) * 100 + index;
}
"""
COUNT = 128


def run_fault(emulator, kernel: str, out_use: str = "output") -> np.ndarray:
    x = np.arange(COUNT, dtype=np.float32)
    out = np.zeros(COUNT, np.float32)
    buffers = [(0, x, "input"), (1, out, out_use), (2, np.array([COUNT], np.uint32), "bytes")]
    emulator.run(FAULTS, kernel, buffers, (COUNT, 1, 1), (64, 1, 1))
    return out


def line_of(kernel: str, text: str) -> int:
    start = FAULTS.index(f"({kernel})")
    return FAULTS[: FAULTS.index(text, start)].count("\n") + 1


def test_a_correct_kernel_passes(emulator):
    expected = np.arange(COUNT, dtype=np.float32).reshape(2, 64)[:, ::-1].reshape(-1)
    np.testing.assert_array_equal(run_fault(emulator, "correct"), expected)


PROBLEMS = {
    "reads_past_the_end": r"thread \(63, 0, 0\) of threadgroup \(1, 0, 0\) reads 4 bytes at byte 512 of "
    r"buffer 0 \(input\), which ends at 512 \[shader.metal:\d+\]",
    "reads_before_the_start": "reads 4 bytes 4 bytes before the start of buffer 0",
    "reads_far_away": "reads 4 bytes at byte 67108864 of buffer 0 .* ends at 512",
    "writes_past_the_end": "writes 4 bytes at byte 512 of buffer 1 .* ends at 512",
    "writes_an_input": "writes 4 bytes at byte 0 of buffer 0 .*not declared as output",
    "reads_an_output": "reads 4 bytes at byte 0 of buffer 1 .*not declared as input and not yet written",
    "skips_an_element": "no thread writes byte 28 of buffer 1",
    "lacks_a_barrier": "threadgroup memory tile, which is uninitialised|tile, .* no barrier between",
    "lacks_a_second_barrier": "threadgroup memory tile, .* no barrier between: a data race",
    "has_a_barrier_for_device_memory_only": "threadgroup memory tile, .* no barrier between",
    "has_a_barrier_for_the_simdgroup_only": "tile, which is uninitialised|no barrier between",
    "has_a_barrier_that_some_skip": "which other threads never reach",
    "has_two_barriers_for_one": "other threads at that in line",
    "divides_a_simdgroup": "other threads of its simdgroup in line",
    "writes_one_element_twice": "buffer 1 .*another thread writes too: a data race",
    "reads_what_others_write": "buffer 1 .*not yet written|buffer 1 .*another thread",
    "loads_a_misaligned_vector": "reads 16 bytes at an address that is not a multiple of 16",
    "reads_uninitialised_threadgroup_memory": "threadgroup memory tile, which is uninitialised",
    "runs_past_a_threadgroup_variable": "byte 252 of threadgroup memory tile, which ends at 252",
    "writes_a_constant": "writes 4 bytes of a program-scope constant",
    "follows_a_wild_pointer": "reads 4 bytes outside every buffer",
}


@pytest.mark.parametrize("kernel", PROBLEMS)
def test_a_fault_is_seen_and_named(emulator, kernel):
    with pytest.raises(RuntimeError, match=f"{kernel}: .*({PROBLEMS[kernel]})"):
        run_fault(emulator, kernel)


def test_every_fault_is_in_the_list():
    faulty = set(re.findall(r"^KERNEL\((\w+)\)", FAULTS, re.MULTILINE)) - {"correct"}
    assert faulty == set(PROBLEMS)


def test_the_message_names_the_line(emulator):
    with pytest.raises(RuntimeError) as raised:
        run_fault(emulator, "lacks_a_second_barrier")
    line = line_of("lacks_a_second_barrier", "float mirrored")
    assert f"[shader.metal:{line}]" in str(raised.value)


def test_reading_an_output_that_is_also_an_input_is_right(emulator):
    np.testing.assert_array_equal(
        run_fault(emulator, "reads_an_output", "both"), np.arange(COUNT, dtype=np.float32)
    )


def test_the_order_of_execution_must_not_matter(emulator):
    counter, out = np.zeros(1, np.uint32), np.zeros(COUNT, np.uint32)
    with pytest.raises(RuntimeError, match="byte 0 of buffer 1 .* depends on the order"):
        buffers = [(0, counter, "both"), (1, out, "output")]
        emulator.run(FAULTS, "depends_on_the_order", buffers, (COUNT, 1, 1), (64, 1, 1))
    emulator.run(FAULTS, "adds_atomically", [(0, counter, "both")], (COUNT, 1, 1), (64, 1, 1))
    assert counter[0] == COUNT * (COUNT - 1) // 2


def test_orders_can_be_chosen(emulator, monkeypatch):
    monkeypatch.setenv("FUSED_ADAM_EMULATOR_ORDERS", "forward")
    counter, out = np.zeros(1, np.uint32), np.zeros(COUNT, np.uint32)
    buffers = [(0, counter, "both"), (1, out, "output")]
    emulator.run(FAULTS, "depends_on_the_order", buffers, (COUNT, 1, 1), (64, 1, 1))
    np.testing.assert_array_equal(out, np.arange(COUNT))


def test_threadgroup_memory_that_the_host_sizes(emulator):
    out = np.zeros(32, np.float32)
    arguments = (FAULTS, "sized_by_the_host", [(0, out, "output")], (32, 1, 1), (32, 1, 1))
    emulator.run(*arguments, [(0, 128)])
    np.testing.assert_array_equal(out, np.arange(32))
    with pytest.raises(
        RuntimeError, match="byte 124 of threadgroup memory argument 0, which ends at 124"
    ):
        emulator.run(*arguments, [(0, 124)])
    with pytest.raises(ValueError, match="threadgroup memory 0 has no length"):
        emulator.run(*arguments)
    with pytest.raises(ValueError, match="32769 bytes of threadgroup memory; at most 32768"):
        emulator.run(*arguments, [(0, 32769)])


def test_limits_of_metal(emulator):
    x = np.zeros(COUNT, np.float32)
    n = np.array([COUNT], np.uint32)
    buffers = [(0, x, "input"), (1, x.copy(), "output"), (2, n, "bytes")]
    for wrong, group, message in [
        (buffers[:2], 64, "nothing is bound to buffer 2"),
        ([*buffers, (31, x, "input")], 64, "buffer index 31; the highest is 30"),
        ([*buffers, (2, n, "bytes")], 64, "buffer 2 is bound twice"),
        (buffers, 1025, "1025 threads in a threadgroup; at most 1024"),
        (buffers, 0, "the grid or threadgroup is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            emulator.run(FAULTS, "correct", wrong, (COUNT, 1, 1), (group, 1, 1))
    with pytest.raises(ValueError, match="2\\^32 - 1 fit"):
        emulator.run(FAULTS, "correct", buffers, (2**32, 1, 1), (64, 1, 1))
    with pytest.raises(ValueError, match="a parameter at buffer index 31"):
        emulator.run(FAULTS, "many", [(0, x, "both")], (1, 1, 1), (1, 1, 1))
    short = [(0, np.zeros(4, np.float32), "bytes"), (1, x, "output")]
    with pytest.raises(ValueError, match="buffer 0 holds 16 bytes, the kernel expects 32"):
        emulator.run(FAULTS, "takes_a_struct", short, (1, 1, 1), (1, 1, 1))


def test_positions_and_smaller_threadgroups_at_the_edge(emulator):
    width, height = 7, 5
    out = np.zeros(width * height, np.uint32)
    emulator.run(FAULTS, "where", [(0, out, "output")], (width, height, 1), (4, 3, 1))
    for y in range(height):
        for x in range(width):
            group, local = (x // 4, y // 3), (x % 4, y % 3)
            size = (min(4, width - group[0] * 4), min(3, height - group[1] * 3))
            digits = [*group, local[0], *size]
            index = local[1] * size[0] + local[0]
            expected = int("".join(map(str, digits))) * 100 + index
            assert out[y * width + x] == expected, (x, y)


def test_a_source_that_does_not_compile_gives_the_compiler_error(emulator):
    source = "#include <metal_stdlib>\nkernel void broken(device float* x) { x[0] = undefined; }\n"
    with pytest.raises(RuntimeError, match=r"shader.metal:2:.*'?undefined"):
        emulator.run(source, "broken", [], (1, 1, 1), (1, 1, 1))


def test_host_headers_are_out_of_reach(emulator):
    with pytest.raises(RuntimeError, match="vector: No such file"):
        emulator.run("#include <vector>\n", "x", [], (1, 1, 1), (1, 1, 1))


def test_too_much_threadgroup_memory_of_a_kernel(emulator):
    source = """#include <metal_stdlib>
    using namespace metal;
    kernel void large(device float* x, uint i [[thread_position_in_grid]]) {
      threadgroup float a[8193];
      a[i] = 1;
      threadgroup_barrier(mem_flags::mem_threadgroup);
      x[i] = a[i + 1];
    }"""
    with pytest.raises(
        RuntimeError, match="large.* 32772 bytes of threadgroup memory; at most 32768"
    ):
        emulator.run(source, "large", [], (1, 1, 1), (1, 1, 1))


@pytest.mark.parametrize("index_type,is_right", [("ulong", True), ("uint", False)])
def test_an_overflow_shows_beyond_2_32_elements(emulator, index_type, is_right):
    """Of a dispatch over more than 2^32 elements only the last threadgroup runs, and only its pages exist."""
    source = f"""#include <metal_stdlib>
    using namespace metal;
    kernel void add_one(device const ushort* in, device ushort* out,
                        uint2 at [[thread_position_in_grid]], uint2 grid [[threads_per_grid]]) {{
      {index_type} i = {index_type}(at.y) * grid.x + at.x;
      out[i] = in[i] + 1;
    }}"""
    width, height, group = 2**20, 2**12 + 1, 64
    count = width * height
    x, out = np.zeros(count, np.uint16), np.zeros(count, np.uint16)
    x[-group:] = 7
    groups = count // group
    emulator.run_only_threadgroups(groups - 1, groups)
    try:
        buffers = [(0, x, "input"), (1, out, "output")]
        emulator.run(source, "add_one", buffers, (width, height, 1), (group, 1, 1))
    finally:
        emulator.run_all_threadgroups()
    assert np.all(out[-group:] == 8) == is_right


# ---- The translation


def test_parameters_are_found():
    source = """
    #include <metal_stdlib>
    #define INDEX(n) [[buffer(n)]]
    namespace inner {
    enum { kOut = 3 };
    template <typename T, int N = (1 > 0) ? 2 : 3>
    [[kernel, max_total_threads_per_threadgroup(64)]] void f(device const T* a INDEX(1), constant T& b,
        device T* c [[buffer(kOut)]], threadgroup T* d, uint3 e [[thread_position_in_grid]]) {}
    template [[host_name("f_float")]] [[kernel]] decltype(f<float, 2>) f<float, 2>;
    }
    kernel void g(device float* x, uint i [[thread_index_in_simdgroup]]) {}
    """
    shader = msl.tokenize(translate.flatten(source))
    found = {kernel.host_name: kernel for kernel in msl.find_kernels(shader)}
    assert set(found) == {"f_float", "g"}
    f = found["f_float"]
    assert (f.expression, f.namespaces) == ("f<float, 2>", ("inner",))
    assert f.roles == [
        *[("buffer", "1"), ("buffer", "-1"), ("buffer", "kOut"), ("threadgroup", "-1")],
        ("builtin", "thread_position_in_grid"),
    ]


# ---- The project's own shader and host path, with faults planted in the shader's text


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


def last_elements(emulator, update, layout: str) -> list[np.ndarray]:
    emulator.run_only_threadgroups(*LAST_THREADGROUPS[layout])
    try:
        results = update(*large_tensors(emulator, layout))
        mx.eval(results)
    finally:
        emulator.run_all_threadgroups()
    return [np.array(x, copy=False)[-1, -TAIL:].copy() for x in results]


@pytest.mark.parametrize("layout", LAST_THREADGROUPS)
def test_tensors_of_more_than_2_32_elements(emulator, update, layout):
    from mlx_fused_adam import _ext

    values = [mx.arange(1, TAIL + 1).astype(mx.float16) * x for x in (1.0, 0.5, 0.25, 0.125)]
    expected = run_update(_ext, *values)
    for got, want in zip(last_elements(emulator, update, layout), expected, strict=True):
        np.testing.assert_array_equal(got, np.array(want))


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
