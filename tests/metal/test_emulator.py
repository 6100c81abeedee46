"""The Metal emulator itself: kernels with one fault each, every one seen and named; limits, translation, orders."""

from __future__ import annotations

import re
import sys

import numpy as np
import pytest

if sys.platform != "linux":
    pytest.skip("the emulator runs on Linux", allow_module_level=True)

from emulator import msl, translate

pytestmark = pytest.mark.usefixtures("not_hostile")

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
    np.testing.assert_array_equal(run_fault(emulator, "reads_an_output", "both"), np.arange(COUNT, dtype=np.float32))


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
    with pytest.raises(RuntimeError, match="byte 124 of threadgroup memory argument 0, which ends at 124"):
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
    with pytest.raises(RuntimeError, match="large.* 32772 bytes of threadgroup memory; at most 32768"):
        emulator.run(source, "large", [], (1, 1, 1), (1, 1, 1))


@pytest.mark.parametrize("index_type,is_right", [("ulong", True), ("uint", False)])
def test_an_overflow_shows_beyond_2_32_elements(emulator, index_type, is_right):
    """Only the last threadgroup of a dispatch over more than 2^32 elements runs, and only its pages exist."""
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
