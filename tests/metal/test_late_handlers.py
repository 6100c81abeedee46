"""Completion handlers of the emulated GPU: late, in another order, and what waits for them.

Until its handler has run, what a node has used cannot be donated, so a step queued right after mx.eval may get new
buffers; one queued after mx.synchronize may not. With FUSED_ADAM_EMULATOR_LATE_HANDLERS the whole suite runs so.
"""

import sys
from collections.abc import Callable

import mlx.core as mx
import pytest

if sys.platform != "linux":
    pytest.skip("the emulator runs on Linux", allow_module_level=True)

from support import stored_tensors
from support.arrays import address

pytestmark = pytest.mark.usefixtures("on_the_cpu_stream")
FORMATS = ("float32", "float32", "float32")


def once(happens: Callable[[], bool]) -> bool:
    """Whether it happens in one of many tries. A busy machine may come back from mx.eval later than the handlers."""
    return any(happens() for _ in range(200))


def moved(extension, settle) -> int:
    """How many moments are not where they were after two steps, each of three nodes."""
    tensors = [stored_tensors.make(extension, (40, 32), FORMATS) for _ in range(3)]

    def addresses() -> list[int]:
        return [address(t[name]) for t in tensors for name in "mv"]

    before = addresses()
    mx.synchronize()
    for _ in range(2):
        tensors = [stored_tensors.update(extension, [tensors.pop(0)], step=1)[0] for _ in range(3)]
        mx.eval(tensors)
        settle()
    return sum(a != b for a, b in zip(addresses(), before, strict=True))


@pytest.mark.parametrize("seed", ["1", "2"])
def test_buffers_are_held_until_the_handlers_have_run(emulated_extension, monkeypatch, seed):
    monkeypatch.setenv("FUSED_ADAM_EMULATOR_LATE_HANDLERS", seed)
    assert moved(emulated_extension, mx.synchronize) == 0
    assert once(lambda: moved(emulated_extension, lambda: None) > 0)


def test_without_them_nothing_is_held(emulated_extension, monkeypatch):
    monkeypatch.delenv("FUSED_ADAM_EMULATOR_LATE_HANDLERS", raising=False)
    assert moved(emulated_extension, mx.synchronize) == 0


@pytest.mark.parametrize(
    "operation",
    [lambda x: x.astype(mx.float16), lambda x: x * 2, mx.compile(lambda x: mx.exp(x * 2))],
    ids=["cast", "product", "compiled"],
)
def test_mlx_s_own_operations_hold_what_they_read(emulated_extension, monkeypatch, operation):
    monkeypatch.setenv("FUSED_ADAM_EMULATOR_LATE_HANDLERS", "1")

    def keeps_its_buffer(settle) -> bool:
        tensor = stored_tensors.make(emulated_extension, (40, 32), FORMATS)
        mx.eval(tensor)
        before = address(tensor["parameter"])
        mx.synchronize()
        mx.eval([operation(tensor["parameter"]) for _ in range(20)])
        settle()
        state = [tensor]
        del tensor
        state = stored_tensors.update(emulated_extension, [state.pop()], step=1)
        mx.eval(state)
        return address(state[0]["parameter"]) == before

    assert keeps_its_buffer(mx.synchronize)
    assert once(lambda: not keeps_its_buffer(lambda: None))
