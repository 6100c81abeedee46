"""Which kernel updates parameters on a device, and whether it may: the guard against a kernel that fails on a user's machine.

The first time a device is met, a small update is compared with mlx.optimizers there; on an error or a mismatch the
device is left to stock operations, with one warning that says why.
"""

from __future__ import annotations

import math
import threading
import warnings
from dataclasses import dataclass

import mlx.core as mx
import mlx.optimizers as stock

from . import _ext

Place = mx.Stream | mx.Device | mx.DeviceType | None

# Relative error allowed against stock's float32 result: a few roundings in float32, one in the 16-bit dtypes.
TOLERANCE = {mx.float32: 1e-5, mx.bfloat16: 2**-8, mx.float16: 2**-10}


@dataclass(frozen=True)
class Backend:
    """What updates parameters on a device: the kernel's name, or why there is none."""

    name: str | None
    reason: str | None = None

    @property
    def is_fused(self) -> bool:
        return self.name is not None

    @property
    def description(self) -> str:
        return self.name or f"stock ({self.reason})"


_checked: dict[mx.DeviceType, Backend] = {}
_lock = threading.RLock()


def backend_of(place: Place = None) -> Backend:
    """The backend for a stream, a device or (None) the default device; self-checked at first sight."""
    kind = _kind(place)
    backend = _checked.get(kind)
    if backend is None:
        with _lock:
            backend = _checked.get(kind) or _checked.setdefault(kind, _find(kind))
    return backend


def _kind(place: Place) -> mx.DeviceType:
    if isinstance(place, mx.DeviceType):
        return place
    device = mx.default_device() if place is None else getattr(place, "device", place)
    return device.type


def _find(kind: mx.DeviceType) -> Backend:
    name, reason, _ = _ext.gpu_backend() if kind == mx.gpu else _ext.cpu_backend()
    if name is not None:
        reason = self_check(kind)
    if reason is None:
        return Backend(name)
    warnings.warn(
        f"mlx-fused-adam leaves updates on the {kind.name} to mlx.optimizers: {reason}",
        RuntimeWarning,
        stacklevel=4,
    )
    return Backend(None, reason)


def self_check(kind: mx.DeviceType) -> str | None:
    """Compare a small update of every layout and dtype with stock; None if it is right, else the reason."""
    try:
        # The mixed case too, since each combination of dtypes is a kernel of its own.
        for dtype, gradient_dtype in [*((d, d) for d in TOLERANCE), (mx.float32, mx.bfloat16)]:
            with mx.stream(kind):
                error = largest_error(dtype, gradient_dtype)
            if not error <= TOLERANCE[dtype]:  # so that NaN fails too
                return (
                    f"self-check in {dtype} is off by {error:.1e}, more than {TOLERANCE[dtype]:.1e}"
                )
    except Exception as error:  # any failure of a kernel must lead to stock, not to the user
        return f"self-check failed: {error}"
    return None


def largest_error(dtype: mx.Dtype, gradient_dtype: mx.Dtype | None = None) -> float:
    """The largest error against stock in float32, relative to each tensor's largest element."""
    gradient_dtype = gradient_dtype or dtype

    def sample(*shape: int) -> mx.array:
        return (mx.sin(mx.arange(1, math.prod(shape) + 1) * 0.7) * 0.5).reshape(shape).astype(dtype)

    parameters = [sample(37), sample(70, 40), sample(3, 10), sample(300)]
    # A row-major, a column-major and a strided gradient: one for each kernel.
    gradients = [sample(37), sample(40, 70).T, sample(6, 10)[::2], sample(300)]
    gradients = [g.astype(gradient_dtype) for g in gradients]
    m = [p * 0.1 for p in parameters]
    v = [mx.square(p) for p in parameters]
    settings = {"betas": [0.9, 0.99], "eps": 1e-6, "weight_decay": 0.1, "bias_correction": True}

    reference = stock.AdamW(0.01, **settings)
    as_float32 = [[x.astype(mx.float32) for x in xs] for xs in (parameters, gradients, m, v)]
    step = reference.state["step"] = mx.array(3, mx.uint64)
    state = [{"m": m_i, "v": v_i} for m_i, v_i in zip(*as_float32[2:], strict=True)]
    expected = [
        (reference.apply_single(g, p, s), s["m"], s["v"])
        for p, g, s in zip(*as_float32[:2], state, strict=True)
    ]

    beta1, beta2 = settings.pop("betas")
    actual = _ext.adam_update(
        parameters, gradients, m, v, mx.array(0.01), step,
        beta1=beta1, beta2=beta2, **settings, name=str,
    )  # fmt: skip
    errors = [
        mx.max(mx.abs(a.astype(mx.float32) - e)) / mx.max(mx.abs(e))
        for e_i, a_i in zip(expected, zip(*actual, strict=True), strict=True)
        for e, a in zip(e_i, a_i, strict=True)
    ]
    return mx.max(mx.stack(errors)).item()
