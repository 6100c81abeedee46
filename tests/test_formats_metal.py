"""Codes of 8 bits and master weights on Metal: every bit of parameters, state and extras is that of the CPU's kernel.

The shader is run by the emulator (emulator/README.md); with FUSED_ADAM_EMULATOR_HOSTILE=1, as a GPU may run it otherwise.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from types import ModuleType

import mlx.core as mx
import numpy as np
import pytest

if sys.platform != "linux":
    pytest.skip("the emulator runs on Linux", allow_module_level=True)

from mlx_fused_adam import _ext

pytestmark = pytest.mark.usefixtures("on_the_cpu_stream")

DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
ROUNDINGS = {"v": (False, False, True), "all": (True, True, True), "none": (False, False, False)}
# Parameter, gradient, m and v; "master" is bfloat16 with a remainder.
FORMATS = [
    (parameter, parameter.replace("master", "bfloat16"), state)
    for parameter in ("float32", "bfloat16", "float16", "master")
    for state in ("bfloat16", "float32", "int8")
]
MIXED = [("float32", "bfloat16", "int8"), ("master", "float32", "float32")]
MIXED += [("master", "float32", "int8"), ("float16", "float32", "int8")]
# Whole vectors and not, whole blocks and not, rows that share no block, a block's last code alone.
ROW_MAJOR = [(64, 96), (64, 100), (130, 70), (5, 33, 45), (4097,), (2, 4096), (3, 1), (31, 33)]
TILED = [(64, 96), (64, 104), (130, 70), (129, 257), (3, 40, 45), (2, 3, 32, 64)]
GENERAL = [(64, 96), (13, 70), (5, 33, 45), (4097,), (2, 3, 5, 36), (7, 5, 1)]


@pytest.fixture(scope="session")
def cpu_extension(emulated_extension) -> ModuleType:
    """The extension whose kernels are the CPU's: for DEVICE=emulated the installed one, beside the package's."""
    if _ext is not emulated_extension:
        return _ext
    files = importlib.metadata.files("mlx-fused-adam") or []
    installed = next(f for f in files if f.match("mlx_fused_adam/_ext*.so")).locate()
    spec = importlib.util.spec_from_file_location("mlx_fused_adam_installed._ext", installed)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def lay_out(x: mx.array, layout: str) -> mx.array:
    """The same values, lying otherwise in memory."""
    if layout == "column-major":
        return mx.contiguous(x.swapaxes(-1, -2)).swapaxes(-1, -2)
    if layout == "other batches":
        return mx.contiguous(x.transpose(1, 0, 3, 2)).transpose(1, 0, 3, 2)
    if layout == "strided":
        for axis in range(x.ndim):
            x = mx.repeat(x, 2, axis=axis)
        return x[tuple(slice(None, None, 2) for _ in x.shape)]
    if layout == "reversed":
        back = tuple(slice(None, None, -1) for _ in x.shape)
        return mx.contiguous(x[back])[back]
    if layout == "broadcast":
        return mx.broadcast_to(x[:1], x.shape)
    if layout == "broadcast columns":
        return mx.broadcast_to(x[..., :1], x.shape)
    if layout == "between vectors":
        return mx.concatenate([mx.zeros(1, x.dtype), x.reshape(-1)])[1:].reshape(x.shape)
    assert layout == "row-major"
    return x


Tensor = dict[str, mx.array]
PARTS = ("parameter", "gradient", "m", "v", "remainder", "m_scale", "v_scale")


def make(
    extension: ModuleType, shape: tuple[int, ...], formats: tuple[str, str, str], seed: int = 4
) -> Tensor:
    """Values of many sizes within a block, among them 0."""
    rng = np.random.default_rng(seed)

    def values(spread: float, scale: float) -> mx.array:
        x = rng.normal(size=shape) * np.exp(rng.normal(size=shape) * spread) * scale
        x.reshape(-1)[:: rng.integers(5, 9)] = 0
        return mx.array(x.astype(np.float32))

    parameter, gradient, state = formats
    tensor = {
        "parameter": values(0, 1).astype(DTYPES.get(parameter, mx.bfloat16)),
        "gradient": values(1.5, 0.1).astype(DTYPES[gradient]),
    }
    if parameter == "master":
        remainder = rng.integers(-(2**15), 2**15, size=shape, dtype=np.int16)
        tensor["remainder"] = mx.array(remainder)
    for name, x in (("m", values(1.5, 0.1)), ("v", mx.square(values(1.5, 0.1)))):
        if state == "int8":
            tensor[name], tensor[f"{name}_scale"] = extension.encode_moment(x, name == "v")
        else:
            tensor[name] = x.astype(DTYPES[state])
    mx.eval(tensor)
    return tensor


def update(
    extension: ModuleType,
    tensors: list[Tensor],
    *,
    rounding: str = "all",
    step: int = 5,
    **settings,
) -> list[Tensor]:
    """The tensors after a step, lazily."""
    lists = [[t[part] for t in tensors] for part in PARTS[:4]]
    extras = [tuple(map(t.get, PARTS[4:])) for t in tensors]
    has_extras = any(x is not None for extra in extras for x in extra)
    *new, new_extras = extension.adam_update(
        *lists,
        mx.array(0.01),
        mx.array(step),
        beta1=0.9,
        beta2=0.99,
        eps=1e-8,
        weight_decay=0.1,
        bias_correction=False,
        rounding=ROUNDINGS[rounding],
        seed=2**40 + 5,
        numbers=[3 + 5 * i for i in range(len(tensors))],
        is_fused=lambda *dtypes: True,
        name=str,
        extras=extras if has_extras else [],
        **settings,
    )
    results = []
    for i, tensor in enumerate(tensors):
        values = dict(zip(("parameter", "m", "v"), (x[i] for x in new), strict=True))
        if has_extras:
            values |= zip(PARTS[4:], new_extras[i], strict=True)
        results.append(tensor | {name: x for name, x in values.items() if x is not None})
    return results


def bits(x: mx.array) -> np.ndarray:
    kinds = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}
    return np.array(mx.contiguous(x).view(kinds[x.dtype.size]))


def assert_same_bits(actual: Tensor, expected: Tensor, what: str = "") -> None:
    assert set(actual) == set(expected)
    for name, x in expected.items():
        assert actual[name].dtype == x.dtype and actual[name].shape == x.shape, name
        np.testing.assert_array_equal(bits(actual[name]), bits(x), f"{what}{name}")


def steps(
    extension: ModuleType,
    tensors: list[Tensor],
    layout: str,
    count: int = 2,
    of: str = "gradient",
    **settings,
) -> list[Tensor]:
    """Each step on the results of the one before, in place where that may be."""
    tensors = [dict(t) for t in tensors]
    for t in tensors:
        t[of] = lay_out(t[of], layout)
    for step in range(1, count + 1):
        tensors = update(extension, tensors, step=step, **settings)
        mx.eval(tensors)
    return tensors


def check(extensions, shapes, formats, layout: str, **settings) -> None:
    cpu, emulated = extensions
    tensors = [make(cpu, shape, formats, i) for i, shape in enumerate(shapes)]
    expected = steps(cpu, tensors, layout, **settings)
    for shape, got, want in zip(
        shapes, steps(emulated, tensors, layout, **settings), expected, strict=True
    ):
        assert_same_bits(got, want, f"{shape}: ")
        assert not np.array_equal(bits(got["parameter"]), bits(tensors[shapes.index(shape)]["parameter"]))


@pytest.fixture
def extensions(cpu_extension, emulated_extension, monkeypatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.setenv("FUSED_ADAM_EMULATOR_ORDERS", "forward,shuffled")
    return cpu_extension, emulated_extension


def named(formats: tuple[str, str, str]) -> str:
    return "-".join(formats)


@pytest.mark.parametrize("formats", FORMATS + MIXED, ids=named)
def test_row_major(extensions, formats):
    """Alone and in company, in one node and in several."""
    check(extensions, ROW_MAJOR, formats, "row-major")


@pytest.mark.parametrize("formats", FORMATS + MIXED, ids=named)
def test_column_major_gradients(extensions, formats):
    check(extensions, TILED, formats, "column-major")


@pytest.mark.parametrize("formats", FORMATS + MIXED, ids=named)
def test_strided_gradients(extensions, formats):
    check(extensions, GENERAL, formats, "strided")


WITH_EXTRAS = [("bfloat16", "bfloat16", "int8"), ("master", "bfloat16", "bfloat16")]
WITH_EXTRAS += [("master", "bfloat16", "int8")]


@pytest.mark.parametrize("formats", WITH_EXTRAS, ids=named)
@pytest.mark.parametrize(
    "layout", ["between vectors", "reversed", "broadcast", "broadcast columns", "other batches"]
)
def test_other_layouts_of_gradients(extensions, formats, layout):
    shapes = [(2, 3, 33, 40), (2, 2, 32, 64)] if layout == "other batches" else [(64, 96), (33, 45)]
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
        assert_same_bits(update(emulated, [moved])[0], update(cpu, [tensor])[0] | {"gradient": tensor["gradient"]})


@pytest.mark.parametrize("formats", WITH_EXTRAS, ids=named)
@pytest.mark.parametrize("rounding", ["v", "none"])
def test_roundings(extensions, formats, rounding):
    check(extensions, [(33, 45)], formats, "row-major", rounding=rounding)


@pytest.mark.parametrize("formats", WITH_EXTRAS, ids=named)
def test_indices_of_64_bits(extensions, formats):
    cpu, emulated = extensions
    tensor = make(cpu, (13, 70), formats)
    expected = steps(cpu, [tensor], "strided")[0]
    assert_same_bits(steps(emulated, [tensor], "strided", wide_indices=True)[0], expected)


@pytest.mark.parametrize("formats", WITH_EXTRAS, ids=named)
def test_many_steps(extensions, formats):
    """Codes at whose scales a row's blocks have long been apart, and a block that is all zeros."""
    cpu, emulated = extensions
    tensor = make(cpu, (3, 77), formats)
    tensor["gradient"] = mx.where(mx.arange(77) < 32, 0, tensor["gradient"]).astype(mx.bfloat16)
    expected = steps(cpu, [tensor], "row-major", count=50)[0]
    assert_same_bits(steps(emulated, [tensor], "row-major", count=50)[0], expected)


@pytest.mark.parametrize("formats", WITH_EXTRAS, ids=named)
def test_special_values(extensions, formats):
    cpu, emulated = extensions
    tensor = make(cpu, (4, 40), formats)
    gradient = np.array(tensor["gradient"].astype(mx.float32))
    gradient[0, 3], gradient[1, 4], gradient[2, 39] = np.nan, np.inf, -np.inf
    tensor["gradient"] = mx.array(gradient).astype(mx.bfloat16)
    for layout in ("row-major", "column-major", "strided"):
        expected = steps(cpu, [tensor], layout)[0]
        assert_same_bits(steps(emulated, [tensor], layout)[0], expected)


def test_an_update_is_in_place_and_spares_what_is_held(extensions):
    """The same buffers, unless somebody still has the old arrays."""
    tensor = make(extensions[0], (64, 100), ("master", "bfloat16", "int8"))
    before = {name: bits(x).copy() for name, x in tensor.items()}
    new = update(extensions[1], [tensor])[0]
    mx.eval(new)
    for name, x in tensor.items():
        np.testing.assert_array_equal(bits(x), before[name], name)
    own = [name for name in new if name != "gradient"]
    addresses = {name: np.array(new[name].view(mx.uint8), copy=False).ctypes.data for name in own}
    del tensor, x
    state = [new]
    del new
    state = update(extensions[1], [state.pop()], step=6)
    mx.eval(state)
    for name in own:
        found = np.array(state[0][name].view(mx.uint8), copy=False).ctypes.data
        assert found == addresses[name], name
