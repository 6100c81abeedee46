"""The memory accesses of the kernels, counted under emulation: what is published holds, and bad accesses show.

emulator/traffic.py says what is counted; --write publishes it in docs/metal.md.
"""

import re
import subprocess
import sys

import numpy as np
import pytest

if sys.platform != "linux":
    pytest.skip("the emulator runs on Linux", allow_module_level=True)

from emulator import traffic, translate

version = subprocess.run([*translate.compiler(), "--version"], capture_output=True, text=True).stdout
if "clang" in version:
    pytest.skip("clang instruments the elements of a vector one by one", allow_module_level=True)
pytestmark = pytest.mark.usefixtures("on_the_cpu_stream")

NUMBER = re.compile(r"\d+\.\d\d")


@pytest.fixture(autouse=True)
def one_order(monkeypatch, not_hostile):
    monkeypatch.setenv("FUSED_ADAM_EMULATOR_ORDERS", "forward")


@pytest.fixture
def count(emulated_extension, emulator):
    """count(format, case): the named case of docs/metal.md."""

    def count(name: str, case: str) -> traffic.Count:
        shape, layout = traffic.CASES[case]
        return traffic.count(emulated_extension, emulator, [shape], traffic.FORMATS[name], layout)

    return count


def test_the_published_table_is_what_is_counted(emulated_extension, emulator):
    advice = "run python tests/emulator/traffic.py --write"
    for line, counted in zip(traffic.published("traffic"), traffic.table(emulated_extension, emulator), strict=True):
        assert NUMBER.sub("", line) == NUMBER.sub("", counted), advice
        # Compilers differ in which accesses they merge at an edge.
        published, found = ([float(x) for x in NUMBER.findall(text)] for text in (line, counted))
        np.testing.assert_allclose(found, published, rtol=0.02, err_msg=f"{line}: {advice}")


def is_quantized(name: str) -> bool:
    return name.endswith("state 8 bits") or name.endswith("state 4 bits")


@pytest.mark.parametrize("name", traffic.FORMATS)
def test_row_major(count, name):
    c = count(name, "row-major")
    assert c.kernel == "adam_linear"
    # Scales are loaded by half lines.
    assert c.by_access <= (1.05 if is_quantized(name) else 1.00)
    assert c.by_threadgroup <= 1.02
    assert c.bytes == 128 * 128 * traffic.bytes_of_element(traffic.FORMATS[name])
    unaligned = count(name, "row-major, unaligned")
    assert unaligned.kernel == ("adam_general" if is_quantized(name) else "adam_linear")
    assert unaligned.by_threadgroup <= 1.10
    assert unaligned.by_access <= (4.8 if is_quantized(name) else 2.1)


@pytest.mark.parametrize("name", traffic.FORMATS)
def test_column_major(count, name):
    c = count(name, "column-major")
    assert c.kernel == "adam_tiled"
    assert c.by_threadgroup <= 1.10
    # A row of a tile of 4-bit state is half a line: wider tiles exceed threadgroup memory.
    assert c.by_access <= (1.34 if name == "bfloat16, state 4 bits" else 1.10)
    # The gradient itself, whatever the other arrays are.
    by_access, by_threadgroup, own = c.gradient
    assert by_threadgroup == own
    assert by_access == own
    assert c.conflicts == 1
    unaligned = count(name, "column-major, unaligned")
    assert unaligned.by_threadgroup <= 1.6
    assert unaligned.by_access <= 4.1


@pytest.mark.parametrize("name", traffic.FORMATS)
def test_scattered_gradients_move_their_own_lines(count, name):
    c = count(name, "every second")
    assert c.kernel == "adam_general"
    by_access, by_threadgroup, own = c.gradient
    assert by_access == by_threadgroup == own
    assert c.by_access <= (1.3 if is_quantized(name) else 2.3)


def test_small_tensors_together(emulated_extension, emulator):
    shapes = [(64, 32), (32, 32), (1024,), (64, 64)]
    for name in ("float32", "bfloat16"):
        tensors = traffic.count(emulated_extension, emulator, shapes, traffic.FORMATS[name])
        assert tensors.kernel == "adam_group"
        assert 1 <= tensors.by_access <= 1.02


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("layout", ["linear", "column-major"])
def test_the_norm_reads_each_line_once(emulated_extension, emulator, dtype, layout):
    assert traffic.count_norm(emulated_extension, emulator, dtype, layout) == (1, 1)


# ---- Faults that change no result ----

LEAP = "thread_in_grid / 256 * 256 + thread_in_grid % 32 * 8 + thread_in_grid / 32 % 8"


def test_lanes_that_leap_are_seen(count, plant):
    plant("      thread_in_grid,\n      args.first_element,", f"      {LEAP},\n      args.first_element,")
    c = count("float32", "row-major")
    assert c.by_access > 7 and c.by_threadgroup == 1


def test_a_missing_vector_is_seen(count, plant):
    plant("vectors && count == N", "false")
    assert count("float32", "row-major").by_access > 3.5
    assert count("bfloat16", "row-major").by_access > 7


def test_threadgroups_that_leap_are_seen(count, plant):
    """Every threadgroup updates runs all over the tensor."""
    plant("      thread_in_grid,\n      args.first_element,",
          "      thread_in_grid % 256 * 16 + thread_in_grid / 256,\n      args.first_element,")  # fmt: skip
    c = count("float32", "row-major")
    assert c.by_threadgroup > 7


def test_a_missing_pad_is_seen(count, plant):
    plant("column * (rows + word) +", "column * rows +")
    assert count("float32", "column-major").conflicts > 3


def test_runs_of_a_tile_in_the_same_banks_are_seen(count, plant):
    plant("+ column / length * pad", "")
    assert count("bfloat16, state 8 bits", "column-major").conflicts > 1.3


def test_elements_that_their_owners_move_are_seen(count, plant):
    """Instead of neighbours taking neighbouring elements."""
    plant("return k * spread.lanes + spread.lane;", "return spread.lane * N + k;")
    assert count("bfloat16, state 8 bits", "row-major, unaligned").by_access > 7


# ---- The counter itself ----

KERNELS = """
#include <metal_stdlib>
using namespace metal;
kernel void strided(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                    constant uint* stride [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  out[i] = in[i * stride[0] + stride[1]];
}
kernel void vectors(device const float4* in [[buffer(0)]], device float4* out [[buffer(1)]],
                    uint i [[thread_position_in_grid]]) {
  out[i] = in[i];
}
kernel void twice(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                  uint i [[thread_position_in_grid]]) {
  float sum = 0;
#pragma GCC unroll 0
  for (uint k = 0; k < 2; ++k) sum += in[i];
  out[i] = i % 2 == 0 ? sum : 0;
}
kernel void shared_memory(device const float* in [[buffer(0)]], device float* out [[buffer(1)]],
                          constant uint* stride [[buffer(2)]], uint i [[thread_position_in_grid]]) {
  threadgroup float values[64 * 33];
  values[i * stride[0]] = in[i];
  threadgroup_barrier(mem_flags::mem_threadgroup);
  out[i] = values[(63 - i) * stride[0]];
}
"""


def run(emulator, kernel: str, stride: tuple[int, int] = (1, 0), threads: int = 64) -> dict:
    source, out = np.ones(64 * 64, np.float32), np.empty(threads * (4 if kernel == "vectors" else 1), np.float32)
    buffers = [(0, source, "input"), (1, out, "output")]
    if kernel in ("strided", "shared_memory"):
        buffers.append((2, np.array(stride, np.uint32), "bytes"))
    emulator.start_counting()
    emulator.run(KERNELS, kernel, buffers, (threads, 1, 1), (64, 1, 1))
    return emulator.stop_counting()[kernel]


@pytest.mark.parametrize(
    ("stride", "lines"),
    [((1, 0), 2), ((1, 1), 4), ((2, 0), 4), ((32, 0), 64), ((33, 0), 64), ((0, 0), 2)],
    ids=["neighbours", "one element too far", "every second", "a line each", "more", "all the same"],
)
def test_lines_of_a_simdgroup(emulator, stride, lines):
    counts = run(emulator, "strided", stride)
    assert counts["reads"][0][0] == lines
    assert counts["writes"] == {1: (2, 2, 2)}
    assert set(counts["reads"]) == {0}, "what fits a line is not counted"


def test_lines_are_counted_by_access_threadgroup_and_dispatch(emulator):
    assert run(emulator, "strided", (0, 0), 256)["reads"] == {0: (8, 4, 1)}
    assert run(emulator, "strided", (1, 1), 256)["reads"] == {0: (16, 12, 9)}
    assert run(emulator, "vectors", threads=64)["reads"] == {0: (8, 8, 8)}


@pytest.mark.parametrize(("stride", "cycles"), [(1, 4), (2, 8), (32, 128), (33, 4)])
def test_bank_conflicts(emulator, stride, cycles):
    """Two simdgroups write and read once each."""
    assert run(emulator, "shared_memory", (stride, 0))["cycles"] == (cycles, 4)


def test_nothing_is_counted_unasked(emulator):
    run(emulator, "vectors")
    emulator.run(KERNELS, "vectors", [(0, np.ones(256, np.float32), "input"), (1, np.ones(256, np.float32), "output")],
                 (64, 1, 1), (64, 1, 1))  # fmt: skip
    assert emulator.stop_counting() == {}
