"""Chooses what the tests exercise, by the environment variable DEVICE: cpu, gpu, or emulated (the Metal path on Linux).

Unset, tests that ask for the fixture `device` run on everything this machine has.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from mlx_fused_adam import _backends, _operation, _optimizers

sys.path.insert(0, str(Path(__file__).parent))
import oracle  # noqa: E402

ROOT = Path(__file__).parent.parent
CHOICES = ("cpu", "gpu", "emulated")

# Examples derive from the test's name, so a failure repeats; the fixture `device` keeps no state between examples.
settings.register_profile(
    "suite",
    deadline=None,
    derandomize=True,
    max_examples=40,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("suite")


def _devices() -> list[str]:
    chosen = os.environ.get("DEVICE")
    if chosen is None:
        linux = ["emulated"] if sys.platform == "linux" else []
        return ["cpu", *(["gpu"] if mx.is_available(mx.gpu) else []), *linux]
    if chosen not in CHOICES:
        raise pytest.UsageError(f"DEVICE must be one of {', '.join(CHOICES)} but got {chosen!r}")
    if chosen == "gpu" and not mx.is_available(mx.gpu):
        raise pytest.UsageError("DEVICE=gpu, but this MLX has no GPU back end here")
    return [chosen]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", _devices(), indirect=True)


@pytest.fixture(scope="session")
def emulated_extension():
    """The extension with the Metal back end, its shader run by the emulator."""
    from emulator import build

    return build.load_extension()


@pytest.fixture(scope="session")
def emulator():
    """The module that runs single kernels and steers the emulated extension."""
    from emulator import build

    return build.load_emulator()


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test on the named device; its value is the name."""
    monkeypatch.setattr(_backends, "_known", {})
    if request.param == "emulated":
        emulated = request.getfixturevalue("emulated_extension")
        for module in (_backends, _operation, _optimizers):
            monkeypatch.setattr(module, "_ext", emulated)
    kind = mx.gpu if request.param == "gpu" else mx.cpu
    before = mx.default_device()
    mx.set_default_device(kind)
    yield request.param
    mx.synchronize()
    mx.set_default_device(before)


@pytest.fixture
def extension(device: str):
    """The compiled module that the test's device uses."""
    return _operation._ext


@pytest.fixture
def assert_equal(device: str):
    """assert_equal(actual, expected, what): every element, bit for bit up to the sign of NaN.

    On a GPU, whose compiler may fuse multiply and add, within a few roundings of the tensor's dtype.
    """

    def check(actual: mx.array, expected: np.ndarray, what: str) -> None:
        actual_values = oracle.to_numpy(actual)
        expected = np.asarray(expected, np.float64)
        assert actual_values.shape == expected.shape, f"{what}: shape"
        if device == "gpu":
            tolerance = {mx.float32: 4e-6, mx.bfloat16: 2**-7, mx.float16: 2**-9}[actual.dtype]
            wrong = ~np.isclose(actual_values, expected, rtol=tolerance, atol=1e-12, equal_nan=True)
        else:
            wrong = ~((actual_values == expected) | (np.isnan(actual_values) & np.isnan(expected)))
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise AssertionError(
                f"{what}: {wrong.sum()} of {wrong.size} elements differ, first at {at}: "
                f"{actual_values[at]!r} instead of {expected[at]!r} ({actual.dtype})"
            )

    return check
