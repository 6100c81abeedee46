"""Which kernel updates parameters on a device, and for which dtypes it may: the guard against a kernel that fails on a
user's machine.

A combination of dtypes is checked when it is first met (_self_check.py). On an error or a mismatch that combination is
left to stock operations, with one warning that says why. MLX_FUSED_ADAM_BACKEND=stock|cpu|metal forces a choice.
"""

from __future__ import annotations

import os
import threading
import warnings

import mlx.core as mx

from . import _ext, _self_check
from ._self_check import Dtypes, is_update

Place = mx.Stream | mx.Device | mx.DeviceType | None

_SETTING = "MLX_FUSED_ADAM_BACKEND"
_PLAIN: Dtypes = (mx.float32, mx.float32, mx.float32)


class Backend:
    """What updates parameters on a device: a kernel, for the combinations of dtypes that pass their check, or stock."""

    def __init__(
        self, name: str | None, reason: str | None, kind: mx.DeviceType, is_forced: bool = False
    ):
        self.name = name
        self.reason = reason  # why there is no kernel
        self.kind = kind  # of the device where updates run
        self.is_forced = is_forced
        self.verdicts: dict[Dtypes, str | None] = {}  # what is wrong
        self._lock = threading.RLock()

    def is_fused(
        self,
        parameter: mx.Dtype,
        gradient: mx.Dtype,
        state: mx.Dtype,
        remainder: mx.Dtype | None = None,
    ) -> bool:
        """Whether the kernel updates tensors of these dtypes; checks a combination that is new.

        Raises:
            RuntimeError: If the check fails and the environment forces this back end; or if it fails for what stock operations
                cannot store, on the CPU too.
        """
        dtypes: Dtypes = (parameter, gradient, state)
        if remainder is not None:
            dtypes = (*dtypes, remainder)
        if self.name is not None and self._verdict(dtypes) is None:
            return True
        if needs_kernel(dtypes):
            if self.is_forced or self.kind == mx.cpu:
                raise RuntimeError(
                    f"[adam_update] {_self_check.names(dtypes)} must have a kernel, since stock operations "
                    f"cannot store it, but got: {self.check(dtypes)}"
                )
            backend_of(mx.cpu).is_fused(*dtypes)
        return False

    def is_norm_fused(self, gradient: mx.Dtype) -> bool:
        """The same for the kernel that sums the squares of gradients of this dtype."""
        return self.name is not None and self._verdict((gradient,)) is None

    def place(self, asked: Place) -> Place:
        """Where to run what is asked to run there: another device if a kernel of one is forced."""
        if self.name is None:
            return asked
        return self.kind if self.is_forced and _kind(asked) != self.kind else asked

    def check(self, dtypes: Dtypes = _PLAIN) -> str | None:
        """What is wrong with the kernel for these dtypes, or None."""
        return self.reason if self.name is None else self._verdict(dtypes)

    @property
    def description(self) -> str:
        """``"cpu"``, ``"metal"``, ``"metal (but stock for …: <reason>)"`` or ``"stock (<reason>)"``.

        What stock cannot store is left to the CPU: ``"metal (but the CPU for …: <reason>)"``.
        """
        self.check()
        failed = {dtypes: reason for dtypes, reason in self.verdicts.items() if reason}
        if self.name is None or all(self.verdicts[d] for d in self.verdicts if is_update(d)):
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

    def _verdict(self, dtypes: Dtypes) -> str | None:
        if dtypes not in self.verdicts:
            with self._lock:
                if dtypes not in self.verdicts:
                    self.verdicts[dtypes] = self._find(dtypes)
        return self.verdicts[dtypes]

    def _find(self, dtypes: Dtypes) -> str | None:
        reason = _self_check.run(_ext, self.kind, dtypes)
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
    """Why something that was to be updated had no kernel, so far."""
    found = []
    for kind, backend in _known.items():
        failed = {reason for reason in backend.verdicts.values() if reason}
        found += [f"{kind.name}: {reason}" for reason in (backend.reason, *failed) if reason]
    return found


def needs_kernel(dtypes: Dtypes) -> bool:
    """Whether stock operations cannot store what has these dtypes: codes and remainders."""
    return is_update(dtypes) and (len(dtypes) > 3 or dtypes[2] == mx.int8)


def _warn(what: str, reason: str, to: str = "stock operations") -> None:
    message = f"mlx-fused-adam leaves {what} to {to}: {reason}"
    warnings.warn(message, RuntimeWarning, stacklevel=2)


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
