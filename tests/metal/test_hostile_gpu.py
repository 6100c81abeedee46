"""On a GPU that uses every freedom Metal gives it, float32 updates are still the CPU's, bit for bit; and the freedoms
bite.

The relaxations are those of emulator/hostile.py; with FUSED_ADAM_EMULATOR_HOSTILE=1 the whole suite runs under them.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import pytest

if sys.platform != "linux":
    pytest.skip("the emulator runs on Linux", allow_module_level=True)

from emulator import hostile
from mlx_fused_adam import _ext
from support import stored_tensors, tools
from support.arrays import bits

SETTINGS = {"betas": (0.9, 0.999), "eps": 1e-8}
NOT_SCALARS = sorted(hostile.DEFAULT - {"scalars"})


# clang contracts as Metal's compiler may
pytestmark = [pytest.mark.usefixtures("on_the_cpu_stream"), tools.module_needs("ziglang")]


KERNELS = """
#include <metal_stdlib>
using namespace metal;
kernel void within(device const float* a, device const float* b, device float* out, uint i [[thread_position_in_grid]])
{
  out[i] = a[i] * b[i] + b[i];
}
kernel void across(device const float* a, device const float* b, device float* out, uint i [[thread_position_in_grid]])
{
  float product = a[i] * b[i];
  out[i] = product + b[i];
}
kernel void root(device const float* a, device const float* b, device float* out, uint i [[thread_position_in_grid]]) {
  out[i] = sqrt(a[i]);
}
kernel void precise_root(device const float* a, device const float* b, device float* out,
                         uint i [[thread_position_in_grid]]) {
  out[i] = precise::sqrt(a[i]);
}
kernel void quotient(device const float* a, device const float* b, device float* out, uint i
[[thread_position_in_grid]]) {
  out[i] = a[i] / b[i];
}
kernel void doubled(device const float* a, device const float* b, device float* out, uint i [[thread_position_in_grid]])
{
  out[i] = a[i] + a[i];
}
"""
PRAGMA = "#pragma METAL fp contract(off)\n"


def run(emulator, kernel: str, source: str = KERNELS, scale: float = 1.0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(8)
    a, b = (rng.random(1000).astype(np.float32) * np.float32(scale) for _ in range(2))
    out = np.empty_like(a)
    buffers = [(0, a, "input"), (1, b, "input"), (2, out, "output")]
    emulator.run(source, kernel, buffers, (a.size, 1, 1), (250, 1, 1))
    return a, b, out


@pytest.mark.parametrize("pragma", ["", PRAGMA], ids=["plain", "pragma"])
@pytest.mark.parametrize("kernel", ["within", "across"])
def test_contraction(emulator, kernel, pragma):
    """Only separate statements under the pragma are safe: that is the worst that is reported of Apple's compiler."""
    with hostile.relaxed("contraction"):
        a, b, out = run(emulator, kernel, pragma + KERNELS)
    is_safe = kernel == "across" and pragma
    assert np.array_equal(out, a * b + b) == bool(is_safe)
    with hostile.relaxed():
        assert np.array_equal(run(emulator, kernel)[2], a * b + b)


def test_functions(emulator):
    with hostile.relaxed("functions"):
        a, _, root = run(emulator, "root")
        assert np.array_equal(run(emulator, "precise_root")[2], np.sqrt(a))
        a, b, quotient = run(emulator, "quotient")
    ulps = np.abs(root.view(np.int32) - np.sqrt(a).view(np.int32))
    assert set(ulps) == {0, 1, 2, 3}
    assert np.array_equal(quotient, a / b)


def test_subnormals(emulator):
    """Below 2^-126 both what is read and what comes out is zero."""
    smallest = np.finfo(np.float32).tiny
    with hostile.relaxed("subnormals"):
        a, _, doubled = run(emulator, "doubled", scale=float(smallest))
        assert not doubled.any()
        a, _, doubled = run(emulator, "doubled", scale=float(smallest) * 2)
    assert np.array_equal(doubled, np.where(a < smallest, 0, a + a))
    assert (a < smallest).any()


def test_a_gpu_without_bfloat(emulator):
    with hostile.relaxed("no_bfloat"):
        run(emulator, "within")
        with pytest.raises(RuntimeError, match="no type bfloat"):
            run(emulator, "within", KERNELS + "kernel void f(device bfloat* x) { x[0] = 0; }")


def test_the_variable_is_checked(monkeypatch):
    monkeypatch.setenv(hostile.VARIABLE, "1")
    assert hostile.active() == hostile.DEFAULT
    monkeypatch.setenv(hostile.VARIABLE, "contractions")
    with pytest.raises(ValueError, match="must be 1 or name some of .* but got"):
        hostile.active()


def tensors(seed: int = 9, dtypes: tuple = (mx.float32,) * 3) -> list[list[mx.array]]:
    """Lists of parameters, gradients, m and v, for every kernel: group, tiled, general."""
    rng = np.random.default_rng(seed)

    def values(*shape: int) -> mx.array:
        return mx.array(rng.normal(size=shape).astype(np.float32))

    shapes = [(37,), (1001,), (70, 40), (30, 44)]
    parameters, m = ([values(*s) for s in shapes] for _ in range(2))
    v = [mx.abs(values(*s)) for s in shapes]
    gradients = [values(37), values(1001), values(40, 70).T, values(60, 44)[::2]]
    p, g, s = dtypes
    lists = zip((parameters, gradients, m, v), (p, g, s, s), strict=True)
    lists = [[x.astype(dtype) for x in xs] for xs, dtype in lists]
    mx.eval(lists)
    return lists


def update(extension, lists, step: int = 3, numbers: Sequence[int] = (), **settings):
    one_step = extension.AdamStep(mx.array(0.1), mx.array(step), **{**SETTINGS, **settings})
    return stored_tensors.update_lists(extension, lists, one_step, numbers)


def differences(actual, expected) -> list[str]:
    """Which tensors of which list differ in any bit."""
    return [
        f"{name}[{i}]"
        for name, xs, ys in zip(("w", "m", "v"), actual, expected, strict=True)
        for i, (x, y) in enumerate(zip(xs, ys, strict=True))
        if not np.array_equal(bits(x), bits(y))
    ]


@pytest.fixture
def cpu_extension(emulated_extension):
    """The extension whose kernels are the CPU's."""
    if _ext is emulated_extension:
        pytest.skip("compares with the CPU's kernels, which the emulated package does not have")
    return _ext


DTYPES = [
    (mx.float32,) * 3,
    (mx.bfloat16,) * 3,
    (mx.float16,) * 3,
    (mx.float32, mx.bfloat16, mx.float32),
    (mx.bfloat16, mx.float32, mx.float32),
]


@pytest.mark.parametrize("dtypes", DTYPES, ids=lambda d: "-".join(str(x)[9:] for x in d))
@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("wide_indices", [False, True], ids=["32", "64"])
def test_every_kernel_gives_the_bits_of_the_cpu(cpu_extension, emulated_extension, dtypes, decay, wide_indices):
    lists = tensors(dtypes=dtypes)
    expected = update(cpu_extension, lists, weight_decay=decay)
    with hostile.relaxed(*NOT_SCALARS):
        actual = update(emulated_extension, lists, wide_indices=wide_indices, weight_decay=decay)
        mx.eval(actual)
    assert differences(actual, expected) == []


@pytest.mark.parametrize("dtypes", DTYPES[1:], ids=lambda d: "-".join(str(x)[9:] for x in d))
def test_stochastic_rounding_gives_the_bits_of_the_cpu(cpu_extension, emulated_extension, dtypes):
    lists = tensors(dtypes=dtypes)
    rounding = {"rounding": "all", "seed": 2**40 + 5, "numbers": [4, 0, 9, 2**32 - 1]}
    expected = update(cpu_extension, lists, **rounding)
    assert differences(update(cpu_extension, lists), expected) or mx.float32 in dtypes[:2]
    with hostile.relaxed(*NOT_SCALARS):
        actual = update(emulated_extension, lists, **rounding)
        mx.eval(actual)
    assert differences(actual, expected) == []


def test_a_thousand_steps_in_place(cpu_extension, emulated_extension):
    """The optimizer's own loop: each step on the results of the one before."""
    results = []
    with hostile.relaxed(*NOT_SCALARS):
        for extension in (cpu_extension, emulated_extension):
            parameters, gradients, m, v = ([xs[0]] for xs in tensors())
            for _ in range(1000):
                parameters, m, v = update(extension, [parameters, gradients, m, v])
                mx.eval(parameters, m, v)
            results.append((parameters, m, v))
    assert differences(*results) == []


# The texts that keep a compiler from other roundings, and their replacements.
GUARDS = {
    "no pragma": ("#pragma METAL fp contract(off)\n", ""),
    "plain sqrt": ("namespace adam_math = metal::precise;", "namespace adam_math = metal;"),
    "one expression for m": ("T m = kept_m + new_m;", "T m = c.beta1 * old.m + new_m;"),
    "one expression for v": ("T v = kept_v + new_v;", "T v = c.beta2 * old.v + new_v;"),
    "one expression for the denominator": ("(root + c.eps)", "(sqrt(v) * scalars.denominator_scale + c.eps)"),
    "one expression for the parameter": ("kept_parameter - change", "old.parameter * scalars.decay - change"),
}  # fmt: skip


@pytest.mark.parametrize("name", GUARDS)
def test_each_safeguard_of_the_rule_is_needed(cpu_extension, emulated_extension, plant, name):
    lists = tensors()
    # Where v is small the root weighs no more than eps, and decay and denominator_scale are not 1.
    settings = {"weight_decay": 0.7, "bias_correction": True, "eps": 0.5}
    relaxations = [r for r in NOT_SCALARS if (r == "functions") == (name == "plain sqrt")]
    expected = update(cpu_extension, lists, **settings)
    plant(*GUARDS[name])
    with hostile.relaxed(*relaxations):
        actual = update(emulated_extension, lists, **settings)
        mx.eval(actual)
    assert differences(actual, expected)


@pytest.mark.parametrize("step", [1, 2, 10, 100, 10000])
def test_inexact_scalars_change_the_parameter_alone_and_by_no_more_than_they_may(
    cpu_extension, emulated_extension, step
):
    """m and v do not depend on them; the change of a parameter does, in proportion."""
    lists = tensors()
    with hostile.relaxed():
        expected = update(cpu_extension, lists, step=step, bias_correction=True)
        mx.eval(expected)
    with hostile.relaxed("scalars"):
        actual = update(emulated_extension, lists, step=step, bias_correction=True)
        mx.eval(actual)
    assert not [name for name in differences(actual, expected) if name[0] != "w"]
    allowed = hostile.scalar_error(*SETTINGS["betas"], step)
    largest = 0.0
    for old, new, want in zip(lists[0], actual[0], expected[0], strict=True):
        old, new, want = (np.array(x, np.float64) for x in (old, new, want))
        error = np.abs(new - want)
        assert np.all(error <= allowed * np.abs(want - old) + np.spacing(np.float32(2)) * 2)
        largest = max(largest, error.max() / np.abs(want - old).max())
    assert largest > allowed / 100 or step > 1000


def test_inexact_scalars_are_those_of_mlx_optimizers_too(emulated_extension):
    """The same calls give the same results, whoever makes them; so what is compared on one device is equal still."""
    lists = tensors()
    with hostile.relaxed("scalars"):
        actual = update(emulated_extension, lists, bias_correction=True)
        optimizer = optim.Adam(0.1, list(SETTINGS["betas"]), SETTINGS["eps"], True)
        optimizer.state["step"] = mx.array(3, mx.uint64)
        expected = []
        for w, g, m, v in zip(*lists, strict=True):
            state = {"m": m, "v": v}
            expected.append((optimizer.apply_single(g, w, state), state["m"], state["v"]))
        mx.eval(actual, expected)
    assert differences(actual, zip(*expected, strict=True)) == []
