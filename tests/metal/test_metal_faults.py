"""The project's own shader on its own host path, with faults planted in the shader's text: each must be seen."""

from __future__ import annotations

import functools
import math
import re
import sys
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest

if sys.platform != "linux":
    pytest.skip("the emulator runs on Linux", allow_module_level=True)

from emulator import hostile
from mlx_fused_adam import _ext, _self_check
from support import rounding_reference, stored_tensors
from support.arrays import assert_same_bits, bits, lay_out

pytestmark = pytest.mark.usefixtures("on_the_cpu_stream")


STEP = 7
SEED = 2**40 + 5
ALL = "all"


@pytest.fixture
def update(emulated_extension):
    """adam_update of the emulated extension on one tensor, with plain settings."""
    return functools.partial(run_update, emulated_extension)


def run_updates(extension, *lists: list[mx.array], numbers: Sequence[int] = (), **rounding) -> list[list[mx.array]]:
    step = extension.AdamStep(mx.array(0.1), mx.array(STEP) if rounding else None, betas=(0.9, 0.99), **rounding)
    return stored_tensors.update_lists(extension, lists, step, numbers)


def run_update(extension, *tensor: mx.array, **rounding) -> list[mx.array]:
    return [result[0] for result in run_updates(extension, *([x] for x in tensor), **rounding)]


def tensors(shape: tuple[int, ...], layout: str = "linear", dtype=mx.float32) -> list[mx.array]:
    """Parameter, gradient, m, v; the layout is the gradient's."""
    rng = np.random.default_rng(6)
    w, g, m, v = (mx.array(rng.random(shape).astype(np.float32)).astype(dtype) for _ in range(4))
    g = lay_out(g, layout)
    mx.eval(w, g, m, v)
    return [w, g, m, v]


SHAPES = {
    "linear": (1001,),
    "column-major": (70, 139),  # more than a tile either way, and no whole runs
    "column-major, padded": (40, 72),
    "all axes reversed": (300, 70),  # bands of tiles
    "column-major, other batches": (4, 6, 20, 24),
    "strided": (3, 4, 5, 6),
}
# The layout whose kernel it hits, the text replaced, the replacement, and what must be seen of it.
PLANTED = {
    "buffers swapped": ("linear", "device typename Format<S>::m* m [[buffer(kM)]]",
        "device typename Format<S>::m* m [[buffer(kV)]]", "differs"),
    "tail one too long": ("linear", "element < row_length)", "element < row_length + 1u)", "ends at"),
    "tail one too short": ("linear", "element < row_length)", "element + 1u < row_length)",
        "no thread writes|differs"),
    "vectors where none fit": ("linear", "vectors && count == N", "true", "ends at"),
    "one access of two": ("linear",
        "start < N; start += V::elements) {\n    typename V::type words = typename V::type(0)",
        "start + V::elements < N; start += V::elements) {\n    typename V::type words = typename V::type(0)",
        "no thread writes|differs"),
    "no barrier": ("column-major", "threadgroup_barrier(mem_flags::mem_threadgroup);\n    if (Format", "if (Format",
        "tile, which is uninitialised|tile, .*no barrier between"),
    "no barrier, with vectors": ("column-major, padded",
        "threadgroup_barrier(mem_flags::mem_threadgroup);\n      }", "}",
        "tile, which is uninitialised|tile, .*no barrier between"),
    "barrier for the wrong memory": ("column-major", "(mem_flags::mem_threadgroup);\n    if (Format",
        "(mem_flags::mem_device);\n    if (Format", "no barrier between"),
    "tile too narrow": ("column-major", "G tile[T::size]", "G tile[T::size - T::rows]",
        "threadgroup memory tile, which (ends at|another thread)"),
    "wrong stride": ("column-major", "from[k * column_stride", "from[k * (column_stride + 1)",
        "ends at|differs"),
    "bottom edge of the tile forgotten": ("column-major", "row < args.rows && first_column + k",
        "first_column + k", "ends at|data race|uninitialised"),
    "right edge of the tile forgotten": ("column-major", "k < columns && row < rows",
        "row < rows", "ends at"),
    "last elements of a line forgotten": ("column-major", "args.rows && first_column + k < args",
        "args.rows && first_column + k + 1u < args", "no thread writes|differs"),
    "bands of tiles": ("all axes reversed", "tile_in_grid.x >> args.band", "tile_in_grid.x",
        "no thread writes|differs"),
    "vectors past the end of a column": ("column-major, padded", "k < columns && start < rows", "k < columns",
        "ends at|differs|tile"),
    "no vectors in the tile's second half": ("column-major, padded", "T::at(k, start + i)",
        "T::at(k, start + i % 2)", "uninitialised|differs"),
    "batches not divided": ("column-major, other batches", "batch /= size;", "", "no thread writes|data race|differs"),
    "batch stride of the gradient": ("column-major, other batches", "gradient_matrix += i * gradient_strides[axis]",
        "gradient_matrix += i * parameter_strides[axis]", "differs"),
    "axes swapped": ("strided", "axis == last ?", "axis != last ?", "ends at|differs"),
    "outer axes not divided": ("strided", "outer /= size;", "", "differs"),
    "wrong place in the output": ("strided", "place.z * rows +", "place.z * grid.x +", "ends at|data race"),
    "strides of m for v": ("strided", "v_at += i * Index(v_strides[axis])", "v_at += i * Index(gradient_strides[axis])",
        "ends at|differs"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16], ids=str)
@pytest.mark.parametrize("name", PLANTED)
def test_a_fault_planted_in_the_shader_is_seen(update, plant, name, dtype):
    layout, text, replacement, problem = PLANTED[name]
    inputs = tensors(SHAPES[layout], layout, dtype)
    expected = run_update(_ext, *inputs)
    assert_same_bits(update(*inputs), expected)
    plant(text, replacement)
    try:
        wrong = update(*inputs)
        mx.eval(wrong)
        same = all(bool(mx.array_equal(a, b)) for a, b in zip(wrong, expected, strict=True))
        seen = "" if same else "differs"
    except RuntimeError as error:
        assert "does not compile" not in str(error)
        seen = str(error)
    assert re.search(problem, seen), f"{name}: {seen or 'not seen'}"


# For each kernel, the shapes and layouts of tensors that it updates with stochastic rounding, whole runs and single
# elements.
ROUNDED = {
    "linear": [((1003,), "linear")],
    "linear, unaligned": [((1007,), "between vectors")],
    "group": [((1003,), "linear"), ((64,), "linear"), ((37, 5), "linear")],
    "tiled": [((70, 139), "column-major")],
    "tiled, vectors": [((136, 72), "column-major")],
    "general": [((3, 4, 5, 6), "strided")],
}
# Which of ROUNDED, which results are rounded stochastically, the text replaced and the replacement.
PLANTED_IN_ROUNDING = {
    "one draw for a run": ("linear", ALL, "element_rounding(step.rounding, at.element + k)",
        "element_rounding(step.rounding, at.element)"),
    "one draw for single elements": ("linear, unaligned", ALL, "first_element + element, step", "first_element, step"),
    "one number for a group": ("group", ALL, "args.numbers[which]", "args.numbers[0]"),
    "no number": ("linear", ALL, "args.number, scalars", "0u, scalars"),
    "no number of a tile": ("tiled, vectors", ALL, "tensor_step = load_step(args.step, args.number",
        "tensor_step = load_step(args.step, 0u"),
    "no number of single elements": ("general", ALL, "args.number, scalars, step, Format<S>::is_quantized);\n  Run run",
        "0u, scalars, step, Format<S>::is_quantized);\n  Run run"),
    "column for element of a tile": ("tiled", ALL, "uint(element),\n            tensor_step",
        "k,\n            tensor_step"),
    "column for element of a tile's runs": ("tiled, vectors", ALL, "true, uint(element[j]))", "true, column)"),
    "element of the gradient's layout": ("general", ALL, "args.first_element + uint(element)",
        "args.first_element + uint(at.gradient)"),
    "one draw for all steps": ("linear", ALL, "step[0], number", "0u, number"),
    "half the seed": ("linear", ALL, "mixed(seed_low) ^ seed_high", "mixed(seed_low)"),
    "the bits of v for m": ("linear", ALL, "random_half(of_state, 16u,", "random_half(of_state, 0u,"),
    "m with v": ("linear", "parameter_and_v", "results & kRoundM) != 0u, r", "results & kRoundV) != 0u, r"),
    "v with m": ("linear", "parameter_and_v", "results & kRoundV) != 0u, r", "results & kRoundM) != 0u, r"),
    "parameter with m": ("linear", "parameter_and_v", "results & kRoundParameter) != 0u, of",
        "results & kRoundM) != 0u, of"),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16], ids=str)
@pytest.mark.parametrize("name", PLANTED_IN_ROUNDING)
def test_a_fault_planted_in_the_rounding_is_seen(emulated_extension, plant, name, dtype):
    which, results, text, replacement = PLANTED_IN_ROUNDING[name]
    each = [tensors(shape, layout, dtype) for shape, layout in ROUNDED[which]]
    lists = list(map(list, zip(*each, strict=True)))
    how = {"rounding": results, "seed": SEED, "numbers": [3 + 5 * i for i in range(len(each))]}
    expected = run_updates(_ext, *lists, **how)
    assert_same_bits(run_updates(emulated_extension, *lists, **how), expected)
    plant(text, replacement)
    wrong = run_updates(emulated_extension, *lists, **how)
    mx.eval(wrong)
    pairs = zip(sum(wrong, []), sum(expected, []), strict=True)
    assert not all(bool(mx.array_equal(x, y)) for x, y in pairs)


CODES = ("bfloat16", "bfloat16", "int8")
PACKED = ("bfloat16", "bfloat16", "int4")
MASTER = ("master", "bfloat16", "bfloat16")
MASTER24 = ("master24", "bfloat16", "bfloat16")
# Before the first, a thread's own elements are there; before the second, nobody needs the last ones.
EXCHANGED = "  UNROLLED\n  for (uint k = 0; k < M; ++k) {\n    if (k < count) {\n      values"
NEXT = "  spread.starts[spread.lane] = start;\n  spread.counts[spread.lane] = count;\n  UNROLLED"
# Formats, shape, which array has which layout; the text replaced, the replacement, and what must be seen of it.
PLANTED_IN_FORMATS = {
    "a shuffle left out": (CODES, (64, 96), ("gradient", "linear"), "x = max(x, simd_shuffle_xor(x, apart));",
        "", "differs"),
    "a shuffle with another block": (CODES, (64, 96), ("gradient", "linear"), "max(x, simd_shuffle_xor(x, apart))",
        "max(x, simd_shuffle_xor(x, 2 * apart))", "differs"),
    "scales not handed on": (CODES, (64, 96), ("gradient", "linear"), "x |= simd_shuffle_xor(x, apart);",
        "", "differs"),
    "a thread beyond its row's end that leaves": (CODES, (64, 72), ("gradient", "linear"),
        "    run.uses_vectors = true;\n    if",
        "    if (run.count == 0u) return;\n    run.uses_vectors = true;\n    if",
        "waits"),
    "scales written by all threads of a block": (CODES, (64, 96), ("gradient", "linear"),
        "at.has_scales) {", "at.count > 0u) {",
        "data race|no barrier between"),
    "scales read by all threads of a block": (CODES, (64, 96), ("gradient", "linear"), "at.has_scales ?",
        "at.count > 0u ?",
        "data race|no barrier between"),
    "scale of the block before": (CODES, (64, 96), ("gradient", "linear"), "new_m_scale[block] =",
        "new_m_scale[block > 0 ? block - 1 : 0] =", "data race|no thread writes|differs"),
    "scale of v for m": (CODES, (64, 96), ("gradient", "linear"), "load_m_of(format, run.m, k, old_m_scale)",
        "load_m_of(format, run.m, k, old_v_scale)", "differs"),
    "rows not told apart": (CODES, (64, 72), ("gradient", "linear"), "row = thread_in_tensor / row_threads;",
        "row = 0u;", "no thread writes|ends at|differs"),
    "row length off by one": (CODES, (64, 72), ("gradient", "linear"), "row * row_length + column",
        "row * (row_length + 1) + column", "not a multiple|ends at|no thread writes|differs"),
    "row without its last block": (CODES, (64, 72), ("gradient", "linear"),
        "(row_length + kBlockElements - 1) / kBlockElements", "row_length / kBlockElements",
        "ends at|no thread writes|data race|differs"),
    "tail one too long": (CODES, (64, 70), ("gradient", "linear"), "min(N, columns - column)",
        "min(N, columns - column + 1u)", "ends at|data race"),
    "tail one too short": (CODES, (64, 70), ("gradient", "linear"), "min(N, columns - column)",
        "min(N, columns - column - 1u)", "no thread writes|differs"),
    "codes past the end of a row": (CODES, (64, 70), ("gradient", "linear"),
        "if (k < count) {\n      values[k] = as_type", "if (true) {\n      values[k] = as_type", "uninitialised"),
    "half of the codes of a vector": (CODES, (64, 96), ("gradient", "linear"),
        "word_of(words, k / V::elements_per_word)", "word_of(words, 0)", "differs"),
    "codes that do not go on from step to step": (CODES, (64, 96), ("gradient", "linear"), "tensor.advance)", "0u)",
        "differs"),
    "codes with the draws of floats": (CODES, (64, 96), ("gradient", "linear"),
        "number, scalars, step, Format<S>::is_quantized", "number, scalars, step, false", "differs"),
    "one draw for a run of codes": (CODES, (64, 96), ("gradient", "linear"),
        "element + k);\n    store_m_of", "element);\n    store_m_of", "differs"),
    "scales of the threadgroup before": (CODES, (64, 96), ("gradient", "linear"),
        "(thread_in_grid - thread_in_group) / each + thread_in_group", "thread_in_group",
        "data race|no thread writes|differs"),
    "scales beyond the last block": (CODES, (13, 70), ("gradient", "strided"), "&& place.block < place.blocks", "",
        "ends at"),
    "new scales not awaited": (CODES, (64, 96), ("gradient", "linear"),
        "    threadgroup_barrier(mem_flags::mem_threadgroup);\n  }\n  if (moves_scales)",
        "  }\n  if (moves_scales)", "no barrier between|data race"),
    "one block for all columns of a tile": (CODES, (70, 96), ("gradient", "column-major"),
        "row * T::blocks + column / kBlockElements", "row * T::blocks",
        "no barrier between|data race|uninitialised|differs"),
    "scales of a strip's first tile": (CODES, (70, 304), ("gradient", "column-major"),
        "(line_of_run, column - strip_column)", "(line_of_run, column - first_column)",
        "no barrier between|data race|uninitialised|differs"),
    "scales of the strip before": (CODES, (70, 1100), ("gradient", "column-major"),
        "first_block = strip_column / kBlockElements", "first_block = 0", "data race|no thread writes|differs"),
    "scales of the strip after": (CODES, (70, 1100), ("gradient", "column-major"), "&& block < row_blocks", "",
        "data race|ends at|differs"),
    "a tile written while it is read": (CODES, (70, 300), ("gradient", "column-major"),
        "threadgroup_barrier(mem_flags::mem_threadgroup);  // all", "// all", "no barrier between|data race"),
    "one tile of a strip": (CODES, (70, 300), ("gradient", "column-major"),
        "min(args.columns, strip_column + args.strip * T::columns)",
        "min(args.columns, strip_column + T::columns)", "no thread writes|differs"),
    "rows of a tile": (CODES, (40, 3, 70), ("gradient", "all axes reversed"), "parameter_strides[2 * args.axes + 1]",
        "1",
        "data race|no thread writes|differs"),
    "blocks of a batch": (CODES, (3, 40, 70), ("gradient", "column-major"),
        "first_of_rows += i * parameter_strides[args.axes + 1 + axis];", "", "data race|no thread writes|differs"),
    "halves exchanged": (PACKED, (64, 96), ("gradient", "linear"), "packed[k / 2] >> (4 * (k % 2))",
        "packed[k / 2] >> (4 - 4 * (k % 2))", "differs"),
    "halves of one byte alone": (PACKED, (64, 96), ("gradient", "column-major"),
        "k % 2 == 0 ? 0u : uint(packed[k / 2])", "0u", "differs"),
    "a packed row without its last byte": (PACKED, (64, 71), ("gradient", "strided"),
        "row * Index((columns + neighbours - 1) / neighbours)", "row * Index(columns / neighbours)",
        "data race|no thread writes|differs"),
    "the byte of the second column": (PACKED, (64, 70), ("gradient", "column-major"), "Index(column / neighbours)",
        "Index(column)", "ends at|data race|no thread writes|differs"),
    "half of a last byte not stored": (PACKED, (13, 71), ("gradient", "linear"),
        "return (run.count + neighbours - 1) / neighbours", "return run.count / neighbours",
        "no thread writes|differs"),
    "four bytes as two": (PACKED, (64, 96), ("gradient", "linear"),
        "typedef uint type;\n};\ntemplate <>\nstruct Words<2>",
        "typedef vec<uint, 2> type;\n};\ntemplate <>\nstruct Words<2>",
        "not a multiple of 8"),
    "packed codes to nearest": (PACKED, (64, 70), ("gradient", "linear"),
        "store_int4(x, inverse, rounding)", "store_int4(x, inverse, Rounding{false, 0u})", "differs"),
    "a packed v that becomes 0": (PACKED, (64, 70), ("gradient", "linear"),
        "store_uint4(x, inverse, rounding)", "0", "differs"),
    "stride of the gradient": (CODES, (13, 70), ("gradient", "strided"), "at.gradient, gradient_strides[last]",
        "at.gradient, int64_t(1)", "differs"),
    "stride of the parameter": (CODES, (13, 70), ("parameter", "strided"), "at.parameter, parameter_strides[last]",
        "at.parameter, int64_t(1)", "differs"),
    "elements exchanged with nobody": (CODES, (13, 70), ("gradient", "strided"), "spread.items[owner * pitch",
        "spread.items[spread.lane * pitch", "uninitialised|no barrier between|differs"),
    "elements past the end of an exchanged run": (CODES, (13, 70), ("gradient", "linear"),
        "if (place % M < spread.counts[owner]) {\n      spread", "if (true) {\n      spread", "ends at|data race"),
    "lanes that a simdgroup lacks": (CODES, (13, 70), ("gradient", "linear"),
        "min(uint(kLanes), threads_left + lane)", "uint(kLanes)", "no thread writes|uninitialised|differs"),
    "exchanged before it is there": (CODES, (13, 70), ("gradient", "linear"),
        "  simdgroup_barrier(mem_flags::mem_threadgroup);\n" + EXCHANGED, EXCHANGED,
        "no barrier between|uninitialised"),
    "exchanged too early for the next array": (CODES, (13, 70), ("gradient", "linear"),
        "  simdgroup_barrier(mem_flags::mem_threadgroup);\n" + NEXT, NEXT,
        "no barrier between"),
    "a tile's state exchanged from its start": (CODES, (70, 70), ("gradient", "column-major"),
        "tensor, element, int64_t(1), element, item, run)", "tensor, matrix, int64_t(1), element, item, run)",
        "data race|differs"),
    "state of general rows in vectors that do not fit": (CODES, (13, 70), ("gradient", "linear"),
        "column, columns, (args.vectors & kStateVectors) != 0u, args", "column, columns, true, args",
        "not a multiple of"),
    "last elements of a tile's codes": (CODES, (70, 70), ("gradient", "column-major"), "i < count ? float",
        "i + 1u < count ? float", "differs"),
    "neighbours that leap": (("bfloat16",) * 3, (9, 111), ("m", "between vectors"), "threads + lane - thread_in_tensor",
        "uint(kLanes)", "no thread writes|differs"),
    "a gradient's vectors by the state's": (("bfloat16",) * 3, (9, 111), ("gradient", "between vectors"),
        "(vectors & kGradientVectors) != 0u", "(vectors & kStateVectors) != 0u", "not a multiple"),
    "corrections of a run not stored": (MASTER, (64, 96), ("gradient", "linear"),
        "store_vectors<N>(t.auxiliary.new_correction, stored.correction);", "", "no thread writes|differs"),
    "exchanged correction not stored": (("master", "bfloat16", "int8"), (64, 70), ("gradient", "strided"),
        "store_spread<N>(spread, t.auxiliary.new_correction, element, run.count, stored.correction);", "",
        "no thread writes|differs"),
    "correction not stored": (MASTER, (64, 96), ("gradient", "strided"),
        "store_elements<N>(t.auxiliary.new_correction, run.count, stored.correction);", "", "no thread writes|differs"),
    "corrections of a run not read": (MASTER, (64, 96), ("gradient", "linear"),
        "join(run.parameter[k], run.correction[k])",
        "join(run.parameter[k], 0)", "differs"),
    "correction not read": (MASTER, (64, 96), ("gradient", "strided"), "t.auxiliary.correction, run.count,",
        "t.auxiliary.correction, 0u,", "differs"),
    "correction at the parameter's place": (MASTER, (64, 96), ("parameter", "strided"),
        "here.parameter = parameter + at.parameter;",
        "here.parameter = parameter + at.parameter;\n  here.auxiliary.correction = correction + at.parameter;",
        "ends at|differs"),
    "correction of 8 bits read as 16": (MASTER24, (64, 96), ("gradient", "linear"),
        "join_24(run.parameter[k], run.correction[k])", "join(run.parameter[k], run.correction[k])", "differs"),
    "24 bits to nearest": (MASTER24, (64, 70), ("gradient", "column-major"),
        "split_24(x, rounding)", "split_24(x, Rounding{false, 0u})", "differs"),
    "24 bits by other random bits": (MASTER24, (13, 70), ("gradient", "strided"),
        "rounding.random >> 8 :", "(rounding.random & 0xFFu) :", "differs"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED_IN_FORMATS)
def test_a_fault_planted_in_a_format_is_seen(cpu_extension, emulated_extension, plant, name):
    formats, shape, (which, layout), text, replacement, problem = PLANTED_IN_FORMATS[name]
    tensor = stored_tensors.make(cpu_extension, shape, formats)
    expected = stored_tensors.steps(cpu_extension, [tensor], layout, of=which)[0]

    def run() -> dict[str, mx.array]:
        return stored_tensors.steps(emulated_extension, [tensor], layout, of=which)[0]

    assert_same_bits(run(), expected)
    plant(text, replacement)
    try:
        wrong = run()
        pairs = [(bits(wrong[x]), bits(expected[x])) for x in wrong]
        seen = "" if all(np.array_equal(x, y) for x, y in pairs) else "differs"
    except RuntimeError as error:
        assert "does not compile" not in str(error)
        seen = str(error)
    assert re.search(problem, seen), f"{name}: {seen or 'not seen'}"


ARRAYS = ("w", "g", "m", "v")
LAYOUTS = ("column-major", "strided", "reversed", "between vectors")


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("which", range(4), ids=ARRAYS)
def test_one_array_in_another_layout(update, which, layout, dtype):
    """The verdict on a layout, the strides handed over, and the alignment, each depend on all four arrays.

    "between vectors": MLX's buffers start at pages on Metal, so an array's own offset decides whether vectors fit.
    """
    inputs = tensors((24, 40), dtype=dtype)
    expected = run_update(_ext, *inputs)
    inputs[which] = lay_out(inputs[which], layout)
    mx.eval(inputs)
    assert_same_bits(update(*inputs), expected)


@pytest.mark.parametrize("which", range(4), ids=ARRAYS)
def test_one_array_of_a_tiled_update_between_vectors(update, which):
    inputs = tensors((24, 40), "column-major")
    expected = run_update(_ext, *inputs)
    if which == 1:
        inputs[1] = lay_out(mx.contiguous(inputs[1].T), "between vectors").T
    else:
        inputs[which] = lay_out(inputs[which], "between vectors")
    mx.eval(inputs)
    assert_same_bits(update(*inputs), expected)


def test_matrices_of_a_tiled_update_between_vectors(update):
    """But for the first; their lines are aligned to each other."""
    inputs = tensors((3, 32, 40))
    expected = run_update(_ext, *inputs)
    padded = mx.pad(inputs[1].swapaxes(1, 2).reshape(3, -1), [(0, 0), (0, 1)])
    inputs[1] = mx.as_strided(padded, (3, 32, 40), (32 * 40 + 1, 1, 32))
    mx.eval(inputs)
    assert_same_bits(update(*inputs), expected)


@pytest.mark.parametrize("sizes", [(0,), (0, 0), (0, 5), (5, 0, 0, 7)], ids=str)
def test_empty_tensors(emulated_extension, sizes):
    """Alone and in company: a dispatch of no threads is an error on Metal."""
    each = [tensors((n,)) for n in sizes]
    results = run_updates(emulated_extension, *map(list, zip(*each, strict=True)))
    assert_same_bits(list(zip(*results, strict=True)), [tuple(run_update(_ext, *x)) for x in each])


@pytest.mark.parametrize("which", range(4), ids=ARRAYS)
def test_a_group_of_an_aligned_and_an_offset_tensor(emulated_extension, which):
    both = [tensors((1001,)), tensors((999,))]
    expected = [run_update(_ext, *inputs) for inputs in both]
    both[1][which] = lay_out(both[1][which], "between vectors")
    mx.eval(both)
    for order in (both, both[::-1]):
        results = run_updates(emulated_extension, *map(list, zip(*order, strict=True)))
        wanted = expected if order is both else expected[::-1]
        assert_same_bits(list(zip(*results, strict=True)), wanted)


@pytest.mark.parametrize("shape", [(2**20 + 5,), (5, 2**10 + 3, 7)], ids=str)
def test_a_strided_gradient_of_more_than_one_row_of_threads(update, shape, monkeypatch):
    monkeypatch.setenv("FUSED_ADAM_EMULATOR_ORDERS", "forward")
    inputs = tensors(shape, "strided")
    assert_same_bits(update(*inputs), run_update(_ext, *inputs))


@pytest.mark.parametrize("which", [None, "parameter", "gradient", "m and v"])
def test_each_combination_of_dtypes_has_kernels_of_its_own(update, which):
    """In one process, one combination after the other, so that a library kept under too short a name is seen."""
    inputs = tensors((1001,))
    for i, name in enumerate(("parameter", "gradient", "m and v", "m and v")):
        if name == which:
            inputs[i] = inputs[i].astype(mx.float16)
    assert_same_bits(update(*inputs), run_update(_ext, *inputs))


def test_one_call_with_gradients_of_two_dtypes(emulated_extension):
    w, g, m, v = tensors((100,))
    other = g.astype(mx.bfloat16)
    actual = run_updates(emulated_extension, [w, w], [g, other], [m, m], [v, v])
    for i, gradient in enumerate((g, other)):
        assert_same_bits([xs[i] for xs in actual], run_update(_ext, w, gradient, m, v))


@pytest.mark.parametrize("missing", ["adam_group", "adam_tiled", "adam_general"])
def test_a_kernel_that_is_missing_leaves_everything_as_it_was(emulated_extension, emulator, missing):
    """Also where other tensors of the node could be updated in place: the failed evaluation can be tried again."""

    def lists() -> list[list[mx.array]]:
        each = [
            tensors((1001,)),
            tensors((999,)),
            tensors((37, 70), "column-major"),
            tensors((3, 4, 5, 6), "strided"),
        ]
        return list(map(list, zip(*each, strict=True)))

    expected = run_updates(_ext, *lists())
    results = run_updates(emulated_extension, *lists())
    emulator.replace_in_shaders(f"void {missing}(", "void another(")
    try:
        with pytest.raises(RuntimeError) as raised:
            mx.eval(results)
    finally:
        emulator.replace_in_shaders("", "")
    message = str(raised.value)
    assert f"failed to load Metal kernel {missing} of fused_adam<float, float, float>" in message
    assert "no kernel" in message and "MLX_FUSED_ADAM_BACKEND" in message
    assert_same_bits(results, expected)


def test_a_gpu_without_bfloat_names_what_it_lacks(update):
    inputs = tensors((1001,))
    with hostile.relaxed("no_bfloat"):
        assert_same_bits(update(*inputs), run_update(_ext, *inputs))
        with pytest.raises(RuntimeError, match="(?s)adam_linear of .*<bfloat, .* no type bfloat"):
            mx.eval(update(*tensors((1001,), dtype=mx.bfloat16)))


LARGE = (2**16 + 1, 2**16)  # more than 2^32 elements
TAIL = 64


def large_tensors(emulator, layout: str) -> list[mx.array]:
    """Half-precision tensors, not zero in their last elements only, that exist only where they are touched."""
    shapes = {"batches": (5, 2**15, 2**15), "padded": (2**17 + 1, 2**14)}
    shapes["three pieces"] = (2**15 + 1, 2**16)  # the last does not begin at a multiple of 2^32
    shape = shapes.get(layout, LARGE)
    in_memory, view_of = shape, lambda x: x
    if layout in ("column-major", "batches"):
        in_memory, view_of = (*shape[:-2], shape[-1], shape[-2]), lambda x: x.swapaxes(-1, -2)
    if layout == "strided":
        in_memory, view_of = (shape[0], shape[1] * 2), lambda x: x[:, ::2]
    if layout == "padded":
        in_memory, view_of = (shape[0], shape[1] + 8), lambda x: x[:, : shape[1]]
    shapes = [shape, in_memory, shape, shape]
    arrays = [emulator.sparse_zeros(s, mx.float16) for s in shapes]
    for i, (x, value) in enumerate(zip(arrays, (1.0, 0.5, 0.25, 0.125), strict=True)):
        view = np.array(x, copy=False)
        last = (view_of(view) if i == 1 else view)[(-1,) * (view.ndim - 1)]
        last[-TAIL:] = value * np.arange(1, TAIL + 1)
    arrays[1] = view_of(arrays[1])
    return arrays


# The threadgroups that update the last elements, by what csrc/metal/adam.cpp chooses: of each dispatch of 2^30 elements
# the first 32, which hold all of the last dispatch; the last tile of 64 x 64, in bands of four rows; the end of the
# last of eight equal pieces; of pieces with 65536, 32768 and 32769 rows of 64 threadgroups, the last row of the last.
LAST_THREADGROUPS = {
    "linear": (0, 32),
    "three pieces": (0, 32),
    "column-major": (256 * 4096 + 4 * 1023, 256 * 4096 + 4 * 1023 + 1),
    "strided": (2**21 + 31, 2**21 + 32),
    "padded": (64 * 32769 - 1, 64 * 32769),
    "batches": (5 * 512 * 512 - 1, 5 * 512 * 512),
}
OVERFLOWS = {
    "column-major": ("+ row * row_stride + column", "+ int(row * row_stride) + column"),
    "batches": ("int64_t matrix = 0", "int matrix = 0"),
}


def last_elements(emulator, update, layout: str, **rounding) -> list[np.ndarray]:
    emulator.run_only_threadgroups(*LAST_THREADGROUPS[layout])
    try:
        results = update(*large_tensors(emulator, layout), **rounding)
        mx.eval(results)
    finally:
        emulator.run_all_threadgroups()
    return [np.array(x, copy=False).reshape(-1)[-TAIL:].copy() for x in results]


@pytest.mark.usefixtures("no_memory_limit")
@pytest.mark.parametrize("layout", LAST_THREADGROUPS)
def test_tensors_of_more_than_2_32_elements(emulator, update, layout):
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


# Elements beyond 2^32, or a piece that the host cut, counted anew from 0.
COUNTED_ANEW = {
    "three pieces": ("first_element + element)", "element)"),
    "strided": ("args.first_element + uint(element)", "uint(element)"),
}


@pytest.mark.usefixtures("no_memory_limit")
@pytest.mark.parametrize("layout", LAST_THREADGROUPS)
def test_rounding_of_tensors_of_more_than_2_32_elements(emulator, update, plant, layout):
    """Their draws are those of the row-major index modulo 2^32, in each of the dispatches that the host makes."""
    values = [mx.arange(1, TAIL + 1).astype(mx.float32) * x for x in (1.0, 0.5, 0.25, 0.125)]
    unrounded = np.array(run_update(_ext, *values)[2])
    shape = large_tensors(emulator, layout)[0].shape
    first, second = rounding_reference.key_of(SEED, STEP, 0)
    start = np.uint32((math.prod(shape) - TAIL) % 2**32)
    bits = rounding_reference.random_bits(first + start, second, TAIL) & 0xFFFF
    expected = rounding_reference.rounded(unrounded, bits, mx.float16)
    how = {"rounding": "parameter_and_v", "seed": SEED, "numbers": [0]}
    found = last_elements(emulator, update, layout, **how)[2]
    np.testing.assert_array_equal(found.astype(np.float64), expected)
    if layout in COUNTED_ANEW:
        plant(*COUNTED_ANEW[layout])
        wrong = last_elements(emulator, update, layout, **how)[2]
        assert not np.array_equal(wrong.astype(np.float64), expected)


# Shapes of codes, the gradient's stride, how many of the last elements the last dispatch has in these of its
# threadgroups: a dispatch takes 16386 such rows, so two and one row for a third, or the last of four that halving
# makes; or a part of a row.
LARGE_ROWS = {
    "rows": ((2 * 16386 + 1, 2**16 - 8), 1, 2**16 - 8, (0, 32)),
    "one row": ((2**30 + 72,), 1, 72, (0, 1)),
    "long rows": ((2, 2**30 + 72), 1, 72, (0, 1)),
    "odd row": ((2**30 + 70,), 1, 38, (2**18, 2**18 + 1)),
    "strided rows": ((2 * 16386 + 1, 2**16 - 8), 2, 2**16 - 8, (32 * 8193, 32 * 8194)),
    "reversed row": ((2**30 + 70,), -1, 38, (2**18, 2**18 + 1)),
}


@pytest.mark.usefixtures("no_memory_limit")
@pytest.mark.parametrize("bits_of_codes", [8, 4])
@pytest.mark.parametrize("name", LARGE_ROWS)
def test_quantized_state_of_more_than_one_dispatch(cpu_extension, emulated_extension, emulator, name, bits_of_codes):
    """Their last elements, from zeros: values, and the scales that the last dispatch writes at its place."""
    shape, stride, end, threadgroups = LARGE_ROWS[name]
    dtypes = {"parameter": mx.float16, "gradient": mx.float16}
    dtypes |= {"m": mx.int8 if bits_of_codes == 8 else mx.uint8, "v": mx.uint8}
    bits_of = {"m": bits_of_codes, "v": bits_of_codes}

    def columns(part: str, count: int) -> int:
        return -(-count * bits_of.get(part, 8) // 8)

    tensor = {
        part: emulator.sparse_zeros((*shape[:-1], columns(part, shape[-1])), dtype) for part, dtype in dtypes.items()
    }
    scales = (*shape[:-1], -(-shape[-1] // 32))
    for part in ("m_scale", "v_scale"):
        tensor[part] = emulator.sparse_zeros(scales, mx.bfloat16)
    values = np.zeros(end, np.float16)
    values[-TAIL:] = np.arange(1, TAIL + 1)[:end]
    in_memory = (*shape[:-1], shape[-1] * abs(stride))
    tensor["gradient"] = emulator.sparse_zeros(in_memory, mx.float16)
    np.array(tensor["gradient"], copy=False).reshape(-1)[::stride][-end:] = values
    tensor["gradient"] = tensor["gradient"][..., ::stride]
    small = {part: mx.zeros(columns(part, end), dtype) for part, dtype in dtypes.items()}
    small |= {f"{x}_scale": mx.zeros(-(-end // 32), mx.bfloat16) for x in "mv"}
    expected = stored_tensors.update(cpu_extension, [small | {"gradient": mx.array(values)}], rounding="nearest")[0]
    emulator.run_only_threadgroups(*threadgroups)
    try:
        found = stored_tensors.update(emulated_extension, [tensor], rounding="nearest")[0]
        mx.eval(found)
    finally:
        emulator.run_all_threadgroups()
    for part in ("parameter", "m", "v", "m_scale", "v_scale"):
        want = bits(expected[part])
        kind = {1: mx.uint8, 2: mx.uint16}[want.itemsize]
        last = np.array(found[part].view(kind), copy=False).reshape(-1)[-want.size :]
        np.testing.assert_array_equal(last, want, part)
        assert want.any()


FAR_APART = 2**26
SPREAD = 40  # elements, so that 32-bit indices end before the last


def spread_tensors(emulator) -> list[mx.array]:
    """A gradient of few elements, walked backwards with a stride of -2^26."""
    w, _, m, v = tensors((SPREAD,), dtype=mx.float16)
    far = emulator.sparse_zeros((SPREAD, FAR_APART), mx.float16)
    np.array(far, copy=False)[:, 0] = np.arange(1, SPREAD + 1)
    return [w, far[::-1, 0], m, v]


@pytest.mark.usefixtures("no_memory_limit")
def test_negative_strides_count_in_the_choice_of_64_bits(emulator, update, plant):
    expected = run_update(_ext, *spread_tensors(emulator))
    assert_same_bits(update(*spread_tensors(emulator)), expected)
    plant("i * Index(gradient_strides[axis])", "int(i) * int(gradient_strides[axis])")
    try:
        wrong = update(*spread_tensors(emulator))
        mx.eval(wrong)
    except RuntimeError as error:
        assert "outside every buffer" in str(error) or "ends at" in str(error)
    else:
        assert not mx.array_equal(wrong[0], expected[0])


def test_the_self_check_tries_indices_of_64_bits(emulated_extension, on_the_cpu_stream, plant):
    plant("at = places_of<int64_t>(", "at = places_of<uchar>(")
    verdict = _self_check.run(emulated_extension, mx.cpu, (mx.float32,) * 3)
    assert verdict is not None and "the strided, 64-bit kernel is off" in verdict
