"""Codes of 8 bits and master weights on Metal: every bit of parameters, state and extras is that of the CPU's kernel.

The shader is run by the emulator (emulator/README.md); with FUSED_ADAM_EMULATOR_HOSTILE=1, as a GPU may run it
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

import mlx_fused_adam as fused
from mlx_fused_adam import _backends, _self_check
from support.arrays import address, assert_same_bits, bits, lay_out
from support.extension import use_extension
from support.stored_tensors import DTYPES, FORMATS, PARTS, make, named, steps, update
from support.training import train

pytestmark = pytest.mark.usefixtures("on_the_cpu_stream")

MIXED = [("float32", "bfloat16", "int8"), ("master", "float32", "float32")]
MIXED += [("master", "float32", "int8"), ("float16", "float32", "int8"), ("master24", "float16", "int8")]
MIXED += [("float16", "bfloat16", "int4"), ("master", "float32", "int4")]
# Whole vectors and not, whole blocks and not, rows that share no block, a block's last code alone.
ROW_MAJOR = [(64, 96), (64, 100), (130, 70), (5, 33, 45), (4097,), (2, 4096), (3, 1), (31, 33)]
TILED = [(64, 96), (64, 104), (130, 70), (129, 257), (3, 40, 45), (2, 3, 32, 64)]
GENERAL = [(64, 96), (13, 70), (5, 33, 45), (4097,), (2, 3, 5, 36), (7, 5, 1)]


def check(extensions, shapes, formats, layout: str, **settings) -> None:
    cpu, emulated = extensions
    tensors = [make(cpu, shape, formats, i) for i, shape in enumerate(shapes)]
    expected = steps(cpu, tensors, layout, **settings)
    for shape, got, want in zip(shapes, steps(emulated, tensors, layout, **settings), expected, strict=True):
        assert_same_bits(got, want, f"{shape}: ")
        assert not np.array_equal(bits(got["parameter"]), bits(tensors[shapes.index(shape)]["parameter"]))


@pytest.fixture
def extensions(cpu_extension, emulated_extension, monkeypatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.setenv("FUSED_ADAM_EMULATOR_ORDERS", "forward,shuffled")
    return cpu_extension, emulated_extension


@pytest.mark.parametrize("formats", FORMATS + MIXED, ids=named)
def test_row_major(extensions, formats):
    """Alone and in company, in one node and in several."""
    check(extensions, ROW_MAJOR, formats, "linear")


@pytest.mark.parametrize("formats", FORMATS + MIXED, ids=named)
def test_column_major_gradients(extensions, formats):
    check(extensions, TILED, formats, "column-major")


@pytest.mark.parametrize("formats", FORMATS + MIXED, ids=named)
def test_strided_gradients(extensions, formats):
    check(extensions, GENERAL, formats, "strided")


WITH_EXTRAS = [("bfloat16", "bfloat16", "int8"), ("master", "bfloat16", "bfloat16")]
WITH_EXTRAS += [("master", "bfloat16", "int8"), ("master24", "bfloat16", "int8")]
WITH_EXTRAS += [("float32", "float32", "int4"), ("master24", "bfloat16", "int4")]


@pytest.mark.parametrize("formats", WITH_EXTRAS, ids=named)
@pytest.mark.parametrize(
    "layout",
    [
        "between vectors",
        "reversed",
        "broadcast",
        "broadcast columns",
        "column-major, other batches",
    ],
)
def test_other_layouts_of_gradients(extensions, formats, layout):
    shapes = [(2, 3, 33, 40), (2, 2, 32, 64)] if layout == "column-major, other batches" else [(64, 96), (33, 45)]
    check(extensions, shapes, formats, layout)


@pytest.mark.parametrize("formats", WITH_EXTRAS, ids=named)
@pytest.mark.parametrize("layout", ["column-major", "strided", "between vectors"])
def test_layouts_of_parameters(extensions, formats, layout):
    check(extensions, [(64, 96), (33, 45)], formats, layout, of="parameter")


@pytest.mark.parametrize("formats", WITH_EXTRAS, ids=named)
def test_arrays_between_vectors(extensions, formats):
    """Which MLX's own results never are: views of others, which nothing may update in place."""
    cpu, emulated = extensions
    tensor = make(cpu, (32, 64), formats)
    for part in set(tensor) - {"gradient"}:
        moved = tensor | {part: lay_out(tensor[part], "between vectors")}
        mx.eval(moved)
        assert_same_bits(
            update(emulated, [moved])[0],
            update(cpu, [tensor])[0] | {"gradient": tensor["gradient"]},
        )


@pytest.mark.parametrize("formats", WITH_EXTRAS, ids=named)
@pytest.mark.parametrize("rounding", ["parameter_and_v", "nearest"])
def test_roundings(extensions, formats, rounding):
    check(extensions, [(33, 45)], formats, "linear", rounding=rounding)


@pytest.mark.parametrize("formats", WITH_EXTRAS, ids=named)
def test_indices_of_64_bits(extensions, emulator, formats):
    cpu, emulated = extensions
    before = emulator.dispatches().get("adam_general", 0)
    tensor = make(cpu, (13, 70), formats)
    expected = steps(cpu, [tensor], "strided")[0]
    assert_same_bits(steps(emulated, [tensor], "strided", wide_indices=True)[0], expected)
    assert emulator.dispatches()["adam_general"] == before + 2


@pytest.mark.parametrize("formats", WITH_EXTRAS, ids=named)
def test_many_steps(extensions, formats):
    """Codes at whose scales a row's blocks have long been apart, and a block that is all zeros."""
    cpu, emulated = extensions
    tensor = make(cpu, (3, 77), formats)
    tensor["gradient"] = mx.where(mx.arange(77) < 32, 0, tensor["gradient"]).astype(mx.bfloat16)
    expected = steps(cpu, [tensor], "linear", count=50)[0]
    assert_same_bits(steps(emulated, [tensor], "linear", count=50)[0], expected)


@pytest.mark.parametrize("formats", WITH_EXTRAS, ids=named)
def test_special_values(extensions, formats):
    cpu, emulated = extensions
    tensor = make(cpu, (4, 40), formats)
    gradient = np.array(tensor["gradient"].astype(mx.float32))
    gradient[0, 3], gradient[1, 4], gradient[2, 39] = np.nan, np.inf, -np.inf
    tensor["gradient"] = mx.array(gradient).astype(mx.bfloat16)
    for layout in ("linear", "column-major", "strided"):
        expected = steps(cpu, [tensor], layout)[0]
        assert_same_bits(steps(emulated, [tensor], layout)[0], expected)


@pytest.mark.parametrize("formats", FORMATS + MIXED, ids=named)
def test_the_self_check_passes(extensions, formats):
    parameter, gradient, state = formats
    of_codes = {"int8": mx.int8, "int4": mx.uint8}
    dtypes = (DTYPES.get(parameter, mx.bfloat16), DTYPES[gradient], (DTYPES | of_codes)[state])
    if parameter.startswith("master"):
        dtypes = (*dtypes, mx.int8 if parameter == "master24" else mx.int16)
    for rounding in ("nearest", "parameter_and_v"):
        assert _self_check.run(extensions[1], mx.cpu, dtypes, rounding) is None


@pytest.mark.parametrize(("stochastic", "state_dtype"), [(None, "int8"), (True, "int8"), (None, "int4")])
def test_optimizer(extensions, monkeypatch, stochastic, state_dtype):
    """From its first step on, on parameters that have codes, remainders, both or neither."""
    cpu, emulated = extensions
    start = {
        "linear": make(cpu, (64, 100), ("master", "bfloat16", "float32")),
        "embedding": make(cpu, (70, 64), ("bfloat16", "bfloat16", "float32"), 1),
        "norm": make(cpu, (64,), ("bfloat16", "bfloat16", "float32"), 2),
        "head": make(cpu, (4097,), ("float32", "float32", "float32"), 3),
    }
    parameters = {name: tensor["parameter"] for name, tensor in start.items()}
    gradients = {name: tensor["gradient"] for name, tensor in start.items()}
    gradients["linear"] = lay_out(gradients["linear"], "column-major")
    results = []
    for extension, name in ((cpu, "cpu"), (emulated, "metal (emulated)")):
        use_extension(monkeypatch, extension)
        monkeypatch.setattr(_backends, "_known", {})
        options = dict(state_dtype=state_dtype, stochastic_rounding=stochastic, master_weights=True, seed=7)
        optimizer = fused.AdamW(1e-2, **options)
        new = train(optimizer, parameters, [gradients] * 3)
        assert optimizer.backend == name
        results.append({path: {"parameter": new[path]} | optimizer.state[path] for path in start})
    assert set(results[0]["linear"]) == {"parameter", *PARTS[2:]}
    for path, expected in results[0].items():
        assert_same_bits(results[1][path], expected, f"{path}: ")


def test_an_update_is_in_place_and_spares_what_is_held(extensions):
    """The same buffers, unless somebody still has the old arrays."""
    tensor = make(extensions[0], (64, 100), ("master", "bfloat16", "int8"))
    before = {name: bits(x).copy() for name, x in tensor.items()}
    new = update(extensions[1], [tensor])[0]
    mx.eval(new)
    for name, x in tensor.items():
        np.testing.assert_array_equal(bits(x), before[name], name)
    own = [name for name in new if name != "gradient"]
    addresses = {name: address(new[name]) for name in own}
    del tensor, x
    state = [new]
    del new
    mx.synchronize()  # the handlers of the first update
    state = update(extensions[1], [state.pop()], step=6)
    mx.eval(state)
    for name in own:
        assert address(state[0][name]) == addresses[name], name
