"""Chooses what the tests exercise, by the environment variable DEVICE: cpu, gpu, or emulated (the Metal path on Linux).

Unset, tests that ask for the fixture `device` run on everything this machine has, in one process. Set, the whole run
obeys, the processes that tests start too: for `emulated` the package that they import is the emulated one
(emulator/build.py). With FUSED_ADAM_EMULATED_GPU=1 as well, DEVICE=gpu means the emulated one, and the suite behaves as
it would on a Mac.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, settings

from emulator import build, hostile, project_shader
from support import oracle, tools

ROOT = Path(__file__).parents[1]
CHOICES = ("cpu", "gpu", "emulated")
DEVICE = os.environ.get("DEVICE")
IS_EMULATED_GPU = DEVICE == "gpu" and os.environ.get("FUSED_ADAM_EMULATED_GPU") == "1"

if DEVICE == "emulated" or IS_EMULATED_GPU:
    build.enter()  # before the package is imported

from mlx_fused_adam import _backends, _operation  # noqa: E402
from support.extension import extension_of_the_cpu, use_extension  # noqa: E402

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
    if DEVICE is None:
        linux = ["emulated"] if sys.platform == "linux" else []
        return ["cpu", *(["gpu"] if mx.is_available(mx.gpu) else []), *linux]
    if DEVICE not in CHOICES:
        raise pytest.UsageError(f"DEVICE must be one of {', '.join(CHOICES)} but got {DEVICE!r}")
    if DEVICE == "gpu" and not (IS_EMULATED_GPU or mx.is_available(mx.gpu)):
        raise pytest.UsageError("DEVICE=gpu, but this MLX has no GPU back end here")
    return [DEVICE]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "device" in metafunc.fixturenames:
        metafunc.parametrize("device", _devices(), indirect=True)


def pytest_configure(config: pytest.Config) -> None:
    if "contraction" in hostile.active() and (reason := tools.why_not("ziglang")):
        raise pytest.UsageError(f"{hostile.VARIABLE} {reason}")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's background jobs ignore it, and so would the processes that tests interrupt.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "cpu_only: about the CPU back end, whatever else there is")
    config.addinivalue_line("markers", "quick: every kernel, dtype and option once, in minutes on a Mac")
    config.addinivalue_line("markers", "tools: needs a heavy tool (support/tools.py)")


def pytest_report_header() -> str:
    """Says what the minutes of silence are for."""
    devices = _devices()
    text = f"device: {', '.join(devices)} (DEVICE chooses one)"
    if "emulated" in devices and not build.is_built():
        text += "; the first tests build the emulated Metal extension, which takes a minute or two"
    return text


# Files whose few tests take minutes: one that comes last would keep a single process busy.
LONG = ("test_macos_build.py", "test_arm64.py", "test_cuda_compile.py", "test_sanitizers.py")

# Files, or tests of one, that are marked `quick`.
QUICK = {
    "test_self_check.py": ("test_the_kernel_passes", "test_kernels_pass_in_16_bits"),
    "test_layouts.py": (),
    "test_clipping.py": ("test_a_bad_step_is_as_if_it_had_not_been", "test_clipping_is_the_update_of_scaled_gradients"),
    "test_state_formats.py": (
        "test_quantized_state_is_that_of_the_reference",
        "test_master_weights_are_those_of_float32_training",
    ),
    "test_decay.py": (),
    "test_edges.py": (),
    "test_checkpoints.py": ("test_training_goes_on_bit_for_bit",),
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: item.path.name not in LONG)
    for item in items:
        names = QUICK.get(item.path.name)
        if names is not None and (not names or item.originalname in names):
            item.add_marker(pytest.mark.quick)
        if item.get_closest_marker("cpu_only"):
            callspec = getattr(item, "callspec", None)
            device = callspec.params.get("device", DEVICE) if callspec else DEVICE
            if device not in (None, "cpu"):
                reason = f"about the CPU back end, which {device} does not use"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def emulated_extension():
    """The extension with the Metal back end, its shader run by the emulator."""
    return build.load_extension()


@pytest.fixture(scope="session")
def cpu_extension(emulated_extension):
    """The extension whose kernels are the CPU's, to compare the emulated one with."""
    return extension_of_the_cpu(emulated_extension)


@pytest.fixture(scope="session")
def emulator():
    """The module that runs single kernels and steers the emulated extension."""
    return build.load_emulator()


_known: dict[str, dict] = {}


@pytest.fixture
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test on the named device; its value is the name."""
    # Self-checked once for all tests; test_self_check.py begins anew.
    monkeypatch.setattr(_backends, "_known", _known.setdefault(request.param, {}))
    if request.param == "emulated" and DEVICE is None:
        use_extension(monkeypatch, request.getfixturevalue("emulated_extension"))
    before = mx.default_device()
    mx.set_default_device(mx_device(request.param))
    yield request.param
    mx.synchronize()
    mx.set_default_device(before)


def mx_device(name: str) -> mx.DeviceType:
    """The emulated Metal path runs on MLX's CPU streams, whatever it is called."""
    return mx.gpu if name == "gpu" and not IS_EMULATED_GPU else mx.cpu


@pytest.fixture
def on_the_cpu_stream() -> Iterator[None]:
    """Where the emulator runs shaders."""
    before = mx.default_device()
    mx.set_default_device(mx.cpu)
    yield
    mx.set_default_device(before)


@pytest.fixture
def plant(emulator):
    """Replaces a text in the project's shader, which must be there, until the test ends."""
    shader = "".join(source.read_text() for source in project_shader.SOURCES)

    def plant(text: str, replacement: str) -> None:
        assert text in shader, f"the shader no longer holds {text!r}; plant this fault elsewhere"
        emulator.replace_in_shaders(text, replacement)

    yield plant
    emulator.replace_in_shaders("", "")
    emulator.settle()


@pytest.fixture
def no_memory_limit():
    """Results this large pass MLX's limit, upon which it may wait for tasks that failed in another test, for ever."""
    before = mx.set_memory_limit(1 << 50)
    yield
    mx.set_memory_limit(before)


@pytest.fixture
def is_emulated(device: str) -> bool:
    """Every access is checked, so tensors had better be small."""
    return device == "emulated" or IS_EMULATED_GPU


@pytest.fixture
def is_hostile(device: str) -> bool:
    """Whether the emulator makes use of what a GPU may do otherwise than the CPU (emulator/hostile.py)."""
    return (device == "emulated" or IS_EMULATED_GPU) and bool(hostile.active())


@pytest.fixture
def has_exact_scalars(device: str, is_hostile: bool) -> bool:
    """Whether eager and compiled steps have the same scalars. A GPU's power and square root may be off in either."""
    return device != "gpu" and not is_hostile


@pytest.fixture
def not_hostile() -> Iterator[None]:
    """For the emulator's own tests: clang, which a hostile GPU takes, instruments a vector's elements one by one."""
    with hostile.relaxed():
        yield


@pytest.fixture
def backend_name(device: str, is_emulated: bool) -> str:
    """The value of an optimizer's `backend` on the test's device."""
    return "metal (emulated)" if is_emulated else {"cpu": "cpu", "gpu": "metal"}[device]


@pytest.fixture(scope="session")
def process_device() -> str:
    """ "cpu" or "gpu": MLX's device on which the processes that a test starts are to run."""
    if DEVICE is None:
        return mx.default_device().type.name
    return mx_device(DEVICE).name


@pytest.fixture
def extension(device: str):
    """The compiled module that the test's device uses."""
    return _operation._ext


@pytest.fixture(scope="session")
def process_backend(process_device: str) -> str:
    """The back end that updates parameters in the processes that a test starts."""
    if DEVICE == "emulated" or IS_EMULATED_GPU:
        return "metal (emulated)"
    return {"cpu": "cpu", "gpu": "metal"}[process_device]


@pytest.fixture
def assert_equal(device: str, is_hostile: bool):
    """assert_equal(actual, expected, what, slack=0): every element, bit for bit up to the sign of NaN.

    `expected` is rounded to the dtype of `actual`. A GPU may flush float32's subnormal numbers, and be off by `slack`
    before it rounds: oracle.slack_on_gpu for a parameter, nothing for m and v.
    """
    is_exact = device != "gpu" and not is_hostile

    def check(actual: mx.array, expected: np.ndarray, what: str, slack: np.ndarray | float = 0.0) -> None:
        actual_values = oracle.to_numpy(actual)
        unrounded = np.asarray(expected, np.float64)
        expected = oracle.store(unrounded, actual.dtype)
        assert actual_values.shape == expected.shape, f"{what}: shape"
        right = (actual_values == expected) | (np.isnan(actual_values) & np.isnan(expected))
        if not is_exact:
            allowed = np.asarray(slack) + oracle.FLUSHED
            low = oracle.store(unrounded - allowed, actual.dtype)
            right |= (low <= actual_values) & (actual_values <= oracle.store(unrounded + allowed, actual.dtype))
        wrong = ~right
        if wrong.any():
            at = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise AssertionError(
                f"{what}: {wrong.sum()} of {wrong.size} elements differ, first at {at}: "
                f"{actual_values[at]!r} instead of {expected[at]!r} ({actual.dtype})"
            )

    return check
