"""The kernel that updates parameters on a device, and the dtypes that it may be used for.

A combination of dtypes and rounding is checked when it is first met (_self_check.py). On an error or a mismatch that
combination falls back to mlx.optimizers' operations, with one warning that gives the reason.
MLX_FUSED_ADAM_BACKEND=stock|cpu|metal forces a choice. Used by _step.py, _operation.py and _clipping.py.
"""

from __future__ import annotations

import os
import threading

import mlx.core as mx

from . import _ext, _self_check
from ._options import QUANTIZED_BITS
from ._self_check import Dtypes, is_update
from ._warn import warn

Place = mx.Stream | mx.Device | mx.DeviceType | None

_SETTING = "MLX_FUSED_ADAM_BACKEND"
_PLAIN: Dtypes = (mx.float32, mx.float32, mx.float32)
_NEAREST = "nearest"


class Backend:
    """A device's kernel, for the combinations of dtypes and rounding that pass their check; or none, and why."""

    def __init__(self, name: str | None, reason: str | None, kind: mx.DeviceType, is_forced: bool = False):
        self.name = name
        self.reason = reason  # why there is no kernel
        self.kind = kind  # of the device where updates run
        self.is_forced = is_forced
        # An error, or None if the kernel is right.
        self.verdicts: dict[tuple[Dtypes, str], str | None] = {}
        self._lock = threading.RLock()

    def uses_kernel(
        self,
        parameter: mx.Dtype,
        gradient: mx.Dtype,
        state: mx.Dtype,
        remainder: mx.Dtype | None = None,
        rounding: str = _NEAREST,
    ) -> bool:
        """Whether the kernel updates tensors of these dtypes, rounded so; checks a combination that is new.

        Raises:
            RuntimeError: If the check fails and the environment forces this back end; or if it fails, on the CPU too,
                for a state that MLX's operations cannot store.
        """
        dtypes: Dtypes = (parameter, gradient, state)
        if remainder is not None:
            dtypes = (*dtypes, remainder)
        if self.check(dtypes, rounding) is None:
            return True
        if needs_kernel(dtypes):
            if self.is_forced or self.kind == mx.cpu:
                raise RuntimeError(
                    f"[adam_update] {_self_check.names(dtypes)} must have a kernel, since MLX's operations "
                    f"cannot store it, but got: {self.check(dtypes, rounding)}"
                )
            backend_of(mx.cpu).uses_kernel(parameter, gradient, state, remainder, rounding)
        return False

    def uses_norm_kernel(self, gradient: mx.Dtype) -> bool:
        """The same for the kernel that sums the squares of gradients of this dtype."""
        return self.check((gradient,)) is None

    def place(self, asked: Place) -> Place:
        """The place asked for; another device if a kernel of one is forced."""
        if self.name is None:
            return asked
        return self.kind if self.is_forced and _kind(asked) != self.kind else asked

    def check(self, dtypes: Dtypes = _PLAIN, rounding: str = _NEAREST) -> str | None:
        """What is wrong with the kernel for these dtypes, rounded so, or None."""
        if self.name is None:
            return self.reason
        key = dtypes, rounding
        if key not in self.verdicts:
            with self._lock:
                if key not in self.verdicts:
                    self.verdicts[key] = self._find(*key)
        return self.verdicts[key]

    @property
    def is_checked(self) -> bool:
        """Whether it is known for any update what the kernel does."""
        return self.name is None or any(is_update(dtypes) for dtypes, _ in self.verdicts)

    @property
    def description(self) -> str:
        """``"cpu"``, ``"metal"``, ``"metal (but stock for …: <reason>)"`` or ``"stock (<reason>)"``.

        States that MLX's operations cannot store are updated by the CPU: ``"metal (but the CPU for …: <reason>)"``.
        Runs the float32 self-check if no update has been checked yet, which compiles the kernels on a GPU.
        """
        if not self.is_checked:
            self.check()
        failed = {dtypes: reason for (dtypes, _), reason in self.verdicts.items() if reason}
        if self.name is None or all(reason for (dtypes, _), reason in self.verdicts.items() if is_update(dtypes)):
            return f"stock ({self.reason or next(iter(failed.values()))})"
        if not failed:
            return self.name
        parts = []
        kernelless = "no kernel" if self.kind == mx.cpu else "the CPU"
        for to, is_to_cpu in (("stock", False), (kernelless, True)):
            named = [_self_check.names(d) for d in failed if needs_kernel(d) == is_to_cpu]
            if named:
                parts.append(f"{to} for {', '.join(named)}")
        return f"{self.name} (but {' and '.join(parts)}: {next(iter(failed.values()))})"

    def _find(self, dtypes: Dtypes, rounding: str) -> str | None:
        reason = _self_check.run(_ext, self.kind, dtypes, rounding)
        if reason is None:
            return None
        if self.is_forced:
            raise RuntimeError(f"[{_SETTING}] {self.name} is forced but its {reason}")
        if needs_kernel(dtypes):
            if self.kind != mx.cpu:
                _warn(f"updates of {_self_check.names(dtypes)}", reason, "the CPU")
        else:
            what = "updates of " if is_update(dtypes) else ""
            _warn(f"{what}{_self_check.names(dtypes)} on the {self.kind.name}", reason)
        return reason


def reasons() -> list[str]:
    """The reasons so far why updates had no kernel."""
    found = []
    for kind, backend in _known.items():
        failed = {reason for reason in backend.verdicts.values() if reason}
        found += [f"{kind.name}: {reason}" for reason in (backend.reason, *failed) if reason]
    return found


def needs_kernel(dtypes: Dtypes) -> bool:
    """Whether MLX's operations cannot store these dtypes: quantized state and corrections."""
    return is_update(dtypes) and (len(dtypes) > 3 or dtypes[2] in QUANTIZED_BITS)


def _warn(what: str, reason: str, to: str = "mlx.optimizers") -> None:
    warn(f"mlx-fused-adam: {what} fall back to {to}: {reason}", RuntimeWarning)


_known: dict[mx.DeviceType, Backend] = {}
_lock = threading.RLock()


def backend_of(place: Place = None) -> Backend:
    """The back end for a stream, a device or (None) the default device."""
    kind = _kind(place)
    backend = _known.get(kind)
    if backend is None:
        with _lock:
            backend = _known.get(kind)
            if backend is None:
                backend = _known[kind] = forced_backend() or _find(kind)
    return backend


def known_backend() -> str | None:
    """The description of the default device's back end if its kernel has been checked; nothing is run."""
    backend = _known.get(_kind(None))
    return backend.description if backend is not None and backend.is_checked else None


def _kind(place: Place) -> mx.DeviceType:
    if isinstance(place, mx.DeviceType):
        return place
    if place is None:
        place = mx.default_device()
    return place.type if isinstance(place, mx.Device) else place.device.type


def kernel_of(kind: mx.DeviceType) -> tuple[str | None, str | None]:
    """The kernel's name and why there is none; one of them is None."""
    name, reason, _ = _ext.gpu_backend() if kind == mx.gpu else _ext.cpu_backend()
    return name, reason


def _find(kind: mx.DeviceType) -> Backend:
    name, reason = kernel_of(kind)
    if name is None:
        _warn(f"updates on the {kind.name}", str(reason))
    return Backend(name, reason, kind)


def forced_backend() -> Backend | None:
    """What MLX_FUSED_ADAM_BACKEND asks for, if it is set.

    Raises:
        ValueError: If this machine has no such back end.
    """
    asked = os.environ.get(_SETTING, "")
    if not asked:
        return None
    if asked == "stock":
        return Backend(None, f"{_SETTING}=stock", mx.default_device().type, is_forced=True)
    kinds = [kind for kind in (mx.cpu, mx.gpu) if mx.is_available(kind)]
    kernels = {name.split()[0]: (name, kind) for kind in kinds if (name := kernel_of(kind)[0])}
    if asked not in kernels:
        choices = ", ".join(["stock", *kernels])
        raise ValueError(f"[{_SETTING}] must be one of {choices} on this machine but got {asked!r}")
    return Backend(kernels[asked][0], None, kernels[asked][1], is_forced=True)
