"""Norms, clipped gradients and steps that are not applied on Metal: against the CPU's kernels, and with faults planted.

The shaders are run by the emulator (emulator/README.md); with FUSED_ADAM_EMULATOR_HOSTILE=1, as a GPU may run them
otherwise.
"""

from __future__ import annotations

import sys
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest

if sys.platform != "linux":
    pytest.skip("the emulator runs on Linux", allow_module_level=True)

from support.arrays import assert_same_bits, lay_out
from support.stored_tensors import DTYPES, FORMATS, make, named, sum_of_squares, update

pytestmark = pytest.mark.usefixtures("on_the_cpu_stream")

LAYOUTS = {  # of the gradient; the shapes that bring each kernel to its edges
    "linear": [(64, 96), (5, 33, 45), (4097,), (3, 1), (64,)],
    "column-major": [(64, 96), (130, 70), (3, 40, 45)],
    "strided": [(13, 70), (5, 33, 45), (4097,)],
}


@pytest.fixture(autouse=True)
def two_orders(monkeypatch) -> None:
    monkeypatch.setenv("FUSED_ADAM_EMULATOR_ORDERS", "forward,shuffled")


def laid_out(extension, formats, layout, of="gradient"):
    tensors = [make(extension, shape, formats, i) for i, shape in enumerate(LAYOUTS[layout])]
    for tensor in tensors:
        tensor[of] = lay_out(tensor[of], layout)
    mx.eval(tensors)
    return tensors


def copied(tensor):
    """With buffers of its own, which an update may reuse; strides stay."""
    copy = {name: x if name == "gradient" or not x.size else x + mx.zeros_like(x) for name, x in tensor.items()}
    mx.eval(copy)
    return copy


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("formats", FORMATS, ids=named)
def test_clipped_gradients(cpu_extension, emulated_extension, formats, layout):
    tensors = laid_out(cpu_extension, formats, layout)
    scale = {"gradient_scale": mx.array(0.37)}
    expected = update(cpu_extension, tensors, **scale)
    unclipped = update(cpu_extension, tensors)
    for got, want, other in zip(update(emulated_extension, tensors, **scale), expected, unclipped, strict=True):
        assert_same_bits(got, want)
        assert not all(mx.array_equal(got[k], other[k]) for k in ("m", "m_scale") if k in got)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("formats", FORMATS, ids=named)
@pytest.mark.parametrize("which", ["cpu", "emulated"])
def test_a_step_that_is_not_applied(cpu_extension, emulated_extension, which, formats, layout):
    """Into fresh buffers, since the old arrays are held, and in place; NaN in the gradient or not."""
    extension = {"cpu": cpu_extension, "emulated": emulated_extension}[which]
    tensors = laid_out(cpu_extension, formats, layout)
    settings = {"gradient_scale": mx.array(mx.nan), "is_applied": mx.array(False)}
    for got, want in zip(update(extension, tensors, **settings), tensors, strict=True):
        assert_same_bits(got, want, "held: ")
    copies = [copied(t) for t in tensors]
    results = update(extension, [copies.pop(0) for _ in tensors], **settings)
    for got, want in zip(results, tensors, strict=True):
        assert_same_bits(got, want, "in place: ")
    applied = update(extension, tensors, gradient_scale=mx.array(1.0), is_applied=mx.array(True))
    for got, want in zip(applied, update(extension, tensors), strict=True):
        assert_same_bits(got, want, "applied: ")


@pytest.mark.parametrize("which", ["cpu", "emulated"])
@pytest.mark.parametrize("layout", ["column-major", "strided"])
@pytest.mark.parametrize("formats", [f for f in FORMATS if f[2] != "float32"], ids=named)
def test_parameters_that_are_not_row_major_stay(cpu_extension, emulated_extension, which, formats, layout):
    extension = {"cpu": cpu_extension, "emulated": emulated_extension}[which]
    tensors = laid_out(cpu_extension, formats, layout, of="parameter")
    results = update(extension, tensors, is_applied=mx.array(False))
    for got, want in zip(results, tensors, strict=True):
        assert_same_bits(got, want)


# ---- Norms ----


def total(extension: ModuleType, gradients: list[mx.array]) -> float:
    return sum_of_squares(extension, gradients).item()


def many(count: int) -> list[mx.array]:
    """More than a dispatch takes, and more partial sums than norm_total has threads; one in four between vectors.

    Whole numbers, so that all sums are exact.
    """
    kinds = (mx.float32, mx.bfloat16, mx.float16)
    gradients = [mx.full(1 + i % 17, 1 + i % 11, kinds[i % len(kinds)]) for i in range(60 * count)]
    return [lay_out(g, "between vectors" if i % 4 == 1 else "linear") for i, g in enumerate(gradients)]


def test_the_norm_of_many_gradients(emulated_extension):
    gradients = many(5)
    assert total(emulated_extension, gradients) == sum(g.size * g[0].item() ** 2 for g in gradients)


def test_the_norm_of_nothing(emulated_extension):
    assert total(emulated_extension, [mx.zeros((0, 3)), mx.zeros(0, mx.bfloat16)]) == 0


# The emulated build cuts gradients into pieces of 2^17 elements.
LARGE = {
    "rows": ((3, 2**17), "strided"),
    "long rows": ((2, 2**17 + 300), "strided"),
    "one axis": ((2**17 + 301,), "strided"),
    "linear": ((2**18 + 301,), "linear"),
    "linear, between vectors": ((2**17 + 301,), "between vectors"),
}


@pytest.mark.parametrize("name", LARGE)
def test_the_norm_of_a_gradient_in_pieces(emulated_extension, monkeypatch, name):
    monkeypatch.setenv("FUSED_ADAM_EMULATOR_ORDERS", "forward")
    shape, layout = LARGE[name]
    values = np.random.default_rng(3).integers(-3, 4, size=shape)
    gradient = lay_out(mx.array(values).astype(mx.bfloat16), layout)
    mx.eval(gradient)
    assert total(emulated_extension, [gradient]) == np.square(values).sum()


def test_the_norm_of_a_gradient_spread_over_more_than_2_32_elements(emulator, emulated_extension, no_memory_limit):
    far = emulator.sparse_zeros((40, 2**27), mx.float16)
    np.array(far, copy=False)[:, 0] = np.arange(40)
    for gradient in (far[:, 0], far[::-1, 0]):
        assert total(emulated_extension, [gradient]) == np.square(np.arange(40)).sum()


def queue_slow_work() -> mx.array:
    """A GPU runs a dispatch long after the host has encoded it; here, once this is done."""
    x = mx.full((1000, 1000), 1e-3)
    for _ in range(8):
        x = x @ x
    mx.async_eval(x)
    return x


def test_buffers_are_kept_until_the_gpu_has_read_them(cpu_extension, emulated_extension):
    """Partial sums between their dispatches, and what an update alone still held."""
    slow = queue_slow_work()
    assert total(emulated_extension, dense(3)) == pytest.approx(total(cpu_extension, dense(3)), rel=1e-6)
    tensors = [make(cpu_extension, (64, 96), ("float32", "bfloat16", "int8"))]
    expected = update(cpu_extension, tensors)
    mx.eval(expected, slow)
    slow = queue_slow_work()
    results = update(emulated_extension, [dict(tensors.pop())])
    for part in ("parameter", "m", "v"):
        assert_same_bits(results[0][part], expected[0][part])
    mx.eval(slow)


@pytest.fixture
def small_threadgroups(emulator):
    emulator.set_largest_threadgroup(128)
    yield
    emulator.set_largest_threadgroup(1024)
    emulator.settle()


TOO_FEW = "(?s)failed to load Metal kernel {} of .*this GPU supports only 128 threads per threadgroup, 256 needed"


def test_a_gpu_with_too_few_threads_leaves_everything_as_it_was(
    cpu_extension, emulated_extension, emulator, small_threadgroups
):
    tensors = [make(cpu_extension, (64, 96), ("float32",) * 3)]
    expected = update(cpu_extension, tensors)
    mx.eval(expected)
    results = update(emulated_extension, tensors)
    with pytest.raises(RuntimeError, match=TOO_FEW.format("adam_linear")):
        mx.eval(results)
    with pytest.raises(RuntimeError, match=TOO_FEW.format("norm_dense")):
        total(emulated_extension, [tensors[0]["gradient"]])
    emulator.set_largest_threadgroup(256)
    assert_same_bits(results, expected)


# ---- Faults ----


def dense(count: int, size: int = 20000) -> list[mx.array]:
    return [mx.sin(mx.arange(size + 7 * i) * 0.7) + 1.5 + i for i in range(count)]


def between(count: int) -> list[mx.array]:
    return [lay_out(x, "between vectors") for x in dense(count)]


def strided(count: int) -> list[mx.array]:
    return [lay_out(x[:9000].reshape(90, 100), "strided") for x in dense(count)]


# The text replaced, the replacement, and the gradients that are summed.
NORM_FAULTS = {
    "a gradient's last elements": (dense, "min(at + length, count)", "min(at + length, count - 1)"),
    "spans from the first gradient's": (dense, "(group - first_group) * kNormSpan", "group * kNormSpan"),
    "the next gradient's first span": (dense, "group >= args.group_ends[which]", "group > args.group_ends[which]"),
    "one gradient in two": (dense, "case 3: gradient = gradient_3", "case 3: gradient = gradient_2"),
    "no other gradient": (dense, "case 1: gradient = gradient_1", "case 1: gradient = gradient_0"),
    "one partial sum for all": (dense, "partials[group] = total", "partials[0] = total"),
    "no barrier": (dense, "threadgroup_barrier(mem_flags::mem_threadgroup);\n    if (thread_index", "if (thread_index"),
    "half the threads": (dense, "uint half_of = kNormThreads / 2", "uint half_of = kNormThreads / 4"),
    "not squared": (dense, "float square = x * x", "float square = x"),
    "vectors at any address": (between, "args.vectors[which] != 0 && at", "at"),
    "half a span": (dense, "at += kNormThreads * length", "at += 2 * kNormThreads * length"),
    "rows not counted down": (strided, "rest /= size;\n    }\n    sum", "}\n    sum"),
    "strides of one axis": (strided, "at += int64_t(rest % size) * strides[axis]",
        "at += int64_t(rest % size) * strides[0]"),
    "one thread too few": (strided, "i < end; i += kNormThreads", "i + 1 < end; i += kNormThreads"),
    "another gradient's last": (many, "case 7: gradient = gradient_7", "case 7: gradient = gradient_6"),
    "a span from the wrong slot": (many, "args.group_ends[which - 1]", "args.group_ends[which / 2]"),
    "as many partials as threads": (many, "i < args.partials; i +=", "i < min(args.partials, 256u); i +="),
    "partials left out": (dense, "i < args.partials; i += kNormThreads", "i + 1 < args.partials; i += kNormThreads"),
}  # fmt: skip


@pytest.mark.parametrize("name", NORM_FAULTS)
def test_a_fault_planted_in_the_norm_is_seen(not_hostile, cpu_extension, emulated_extension, plant, name):
    make_gradients, text, replacement = NORM_FAULTS[name]
    gradients = make_gradients(5)
    mx.eval(gradients)
    expected = total(cpu_extension, gradients)
    np.testing.assert_allclose(total(emulated_extension, gradients), expected, rtol=1e-6)
    plant(text, replacement)
    try:
        found = total(emulated_extension, gradients)
    except RuntimeError as error:
        assert "[emulator]" in str(error)
        return
    assert not abs(found / expected - 1) < 1e-6, f"{name}: not seen"


KEEP = {"is_applied": False}
# Formats, layout of what, settings, what is replaced, by what.
# Each stores something else: what is left unwritten may hold the right values by chance.
FAULTS = {
    "not clipped": (("float32",) * 3, ("gradient", "linear"), {"gradient_scale": 0.37},
                    "scalars[2], scalars[3]};", "scalars[2], 1.0f};"),
    "applied in any case": (("float32",) * 3, ("gradient", "linear"), KEEP,
                            "tensor.is_applied = scalars[4] != 0.0f;", ""),
    "m of v": (("float32",) * 3, ("gradient", "linear"), KEEP, "store_vectors<items>(t.new_m, stored.m)",
             "store_vectors<items>(t.new_m, stored.v)"),
    "v of m": (("float32",) * 3, ("gradient", "strided"), KEEP, "t.new_v, items_of<S>(run), stored.v",
        "t.new_v, items_of<S>(run), stored.m"),
    "no correction": (("master", "bfloat16", "bfloat16"), ("gradient", "linear"), KEEP,
                     "load_vectors<N>(t.auxiliary.correction, stored", "load_vectors<N>(t.parameter, stored"),
    "parameter from where the result goes": (("bfloat16", "bfloat16", "int8"), ("parameter", "strided"), KEEP,
                                             "t.parameter, parameter_at, parameter_stride,",
                                             "t.parameter, element, Index(1),"),
    "one code for a run": (("bfloat16", "bfloat16", "int8"), ("gradient", "column-major"), KEEP,
                           "load_vectors<items>(t.m, stored.m);",
                           "load_vectors<items>(t.m, stored.m);\n    stored.m[1] = stored.m[0];"),
    "scale of v from m": (("bfloat16", "bfloat16", "int8"), ("gradient", "linear"), KEEP,
                          "uint(t.auxiliary.v_scale[block]) << 16",
                          "uint(t.auxiliary.m_scale[block]) << 16"),
    "scale of another block": (("bfloat16", "bfloat16", "int8"), ("gradient", "strided"), KEEP,
                               "uint(t.auxiliary.m_scale[block])",
                               "uint(t.auxiliary.m_scale[0])"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_planted_in_clipping_or_skipping_is_seen(cpu_extension, emulated_extension, plant, name):
    formats, (part, layout), settings, text, replacement = FAULTS[name]
    assert formats[1] in DTYPES
    tensor = make(cpu_extension, (64, 96), formats)
    tensor[part] = lay_out(tensor[part], layout)
    mx.eval(tensor)
    settings = {key: mx.array(x) for key, x in settings.items()}
    expected = update(cpu_extension, [tensor], **settings)[0]
    assert_same_bits(update(emulated_extension, [tensor], **settings)[0], expected)
    plant(text, replacement)
    with pytest.raises((AssertionError, RuntimeError), match=r"\[emulator\]|Not equal|Arrays are"):
        assert_same_bits(update(emulated_extension, [tensor], **settings)[0], expected)
