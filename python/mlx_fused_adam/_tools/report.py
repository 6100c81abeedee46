"""Report on this machine: versions, devices, the self-check of each kernel, a small benchmark, and advice.

Use: python -m mlx_fused_adam; with --json for bug reports, with --device for one device. The GPU of a virtual Mac,
which lacks what Macs have and may hang, is reported but not judged.
"""

from __future__ import annotations

import json
import os
import platform
import warnings
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
from mlx.nn.layers.containers import Sequential
from mlx.nn.layers.linear import Linear
from mlx.nn.utils import value_and_grad

from .. import Adam, __version__, _backends, _ext, _reference, _self_check
from .._build_info import MLX_VERSION
from .._compatibility import installed_mlx
from .._threads import default_num_threads
from .timing import measure

# The usual combinations of dtypes: parameter, gradient, m and v (uint8: 4 bits), and remainder.
_CHECKED: list[_self_check.Dtypes] = [
    (mx.float32, mx.float32, mx.float32),
    (mx.bfloat16, mx.bfloat16, mx.bfloat16),
    (mx.float16, mx.float16, mx.bfloat16),
    (mx.float32, mx.bfloat16, mx.float32),
    (mx.float32, mx.float32, mx.int8),
    (mx.bfloat16, mx.bfloat16, mx.int8),
    (mx.bfloat16, mx.bfloat16, mx.uint8),
    (mx.bfloat16, mx.bfloat16, mx.bfloat16, mx.int16),
    (mx.bfloat16, mx.bfloat16, mx.int8, mx.int8),
    # The norm of gradients:
    (mx.float32,),
    (mx.bfloat16,),
    (mx.float16,),
]
_PASSED = "passed"
_VIRTUAL = "Paravirtual"  # in the name of a virtual Mac's GPU
_ELEMENTS = 4_194_304
_BYTES = 28  # read and written for each float32 parameter
_SECONDS, _FEWEST_ROUNDS = 3.0, 5
_LAYERS, _SIDE = 8, 512  # of the model whose training step's memory is measured


def main(as_json: bool, device: str | None = None) -> int:
    """Print the report, on all devices or this one; return 1 if a kernel fails its check."""
    report = collect(device)
    print(json.dumps(report, indent=2) if as_json else as_text(report))
    return 0 if report["ok"] else 1


def available() -> list[mx.DeviceType]:
    return [kind for kind in (mx.DeviceType.cpu, mx.DeviceType.gpu) if mx.is_available(mx.Device(kind))]


def collect(device: str | None = None) -> dict[str, Any]:
    """The report in JSON's types."""
    devices = [_device(kind) for kind in available() if device in (None, kind.name)]
    settings = {k: x for k, x in sorted(os.environ.items()) if k.startswith("MLX_FUSED_ADAM_")}
    report: dict[str, Any] = {
        "versions": {
            "mlx-fused-adam": __version__,
            "built for mlx": MLX_VERSION,
            **installed_mlx(),
            "python": platform.python_version(),
        },
        "system": f"{platform.platform()}, {platform.machine()}",
        "cpu_kernels": {"isa": _ext.cpu_isa(), "threads": _ext.num_threads()},
        "settings": settings,
        "devices": devices,
        "ok": all(device["ok"] for device in devices if not device["virtual"]),
    }
    report["advice"] = _advice(report)
    return report


def as_text(report: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {x}" for name, x in report["versions"].items())
    kernels = report["cpu_kernels"]
    lines = [versions, report["system"]]
    lines += [f"{name}={x}" for name, x in report["settings"].items()]
    lines.append(f"CPU kernels: {kernels['isa']}, up to {kernels['threads']} threads")
    for device in report["devices"]:
        lines += ["", f"{device['kind']}: {device['backend']}", f"  {device['name']}"]
        if device["virtual"]:
            lines.append("  virtual, not judged: a Mac's own GPU has more features, and other times")
        lines += [f"  {what:55} {verdict}" for what, verdict in device["checks"].items()]
        if timings := device["milliseconds"]:
            lines.append(
                f"  a step of {_ELEMENTS / 1e6:.1f}M float32 parameters ({_BYTES} bytes each; "
                "x: time relative to fused, eager to eager and compiled to compiled):"
            )
        for name, milliseconds in timings.items():
            rate = _BYTES * _ELEMENTS / milliseconds / 1e6
            fused = timings["fused compiled" if "compiled" in name else "fused"]
            lines.append(f"  {name:24} {milliseconds:8.2f} ms  {rate:6.1f} GB/s  {milliseconds / fused:5.1f}x")
        if peaks := device["peak_MB"]:
            lines.append(f"  peak memory of a training step of {_LAYERS} × Linear({_SIDE}), batch 1, float32:")
        for name, megabytes in peaks.items():
            fused = peaks["fused compiled" if "compiled" in name else "fused"]
            lines.append(f"  {name:24} {megabytes:8.1f} MB  {megabytes / fused:20.2f}x")
    lines.append("")
    lines += [f"To do: {x}" for x in report["advice"]]
    passed = "All checks passed." if any(device["checks"] for device in report["devices"]) else "No kernel was checked."
    lines.append(passed if report["ok"] else "A kernel failed its check: see above.")
    return "\n".join(lines)


def _device(kind: mx.DeviceType) -> dict[str, Any]:
    """The device's back end, its kernels' checks against mlx.optimizers, the time of an update and a step's memory."""
    backend = _backends.backend_of(kind)
    name = _name(kind)
    is_virtual = _VIRTUAL in name
    checks, milliseconds, peaks, is_ok = {}, {}, {}, True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report has the reasons
        description = backend.description
        if backend.name is None:
            is_ok = _backends.kernel_of(kind)[0] is None or backend.is_forced
        else:
            for dtypes in _CHECKED:
                reason = backend.check(dtypes, _rounding(dtypes))
                is_ok &= reason is None
                checks[_self_check.names(dtypes)] = reason or _PASSED
            if backend.check() is None and not is_virtual:
                milliseconds, peaks = _speed(kind), _peaks(kind)
    return {
        "kind": kind.name,
        "name": name,
        "virtual": is_virtual,
        "backend": description,
        "checks": checks,
        "milliseconds": milliseconds,
        "peak_MB": peaks,
        "ok": is_ok,
    }


def _rounding(dtypes: _self_check.Dtypes) -> str:
    """As the optimizers round these dtypes by default."""
    is_exact = not _self_check.is_update(dtypes) or dtypes[0] == dtypes[2] == mx.float32
    return "nearest" if is_exact else "parameter_and_v"


def _name(kind: mx.DeviceType) -> str:
    """The device's name and memory, as ``Apple M4 Max, memory 128.0 GiB``."""
    info = mx.device_info(mx.Device(kind))
    name = str(info.get("device_name") or info.get("architecture") or kind.name)
    sizes = [
        f"{key.replace('_', ' ').replace(' size', '')} {value / 2**30:.1f} GiB"
        for key, value in info.items()
        if isinstance(value, int) and value >= 2**28
    ]
    return ", ".join([name, *sizes])


def _advice(report: dict[str, Any]) -> list[str]:
    """Sentences that say what to do about a failure or an unusual setting."""
    advice = []
    forced = report["settings"].get("MLX_FUSED_ADAM_BACKEND")
    if forced:
        advice.append(f"MLX_FUSED_ADAM_BACKEND={forced} is set; unset it to use each device's own kernels.")
    for device in report["devices"]:
        if device["virtual"]:
            continue
        if not device["ok"]:
            advice.append(
                f"file an issue with this report (python -m mlx_fused_adam --json): "
                f"the {device['kind']}'s kernels fail here. "
                "Until then training works, with MLX's own operations."
            )
        elif device["backend"].startswith("stock") and not forced:
            advice.append(
                f"the {device['kind']} has no kernel; train on the CPU, which has one: mx.set_default_device(mx.cpu)."
            )
    threads, best = report["cpu_kernels"]["threads"], default_num_threads({})
    if threads != best:
        advice.append(f"{threads} threads are set, but this process may use {best}.")
    return advice


def _speed(kind: mx.DeviceType) -> dict[str, float]:
    with mx.stream(kind):
        timings = measure(_each(_step_of), _SECONDS, _FEWEST_ROUNDS)
    return {name: round(timing.median * 1e3, 3) for name, timing in timings.items()}


def _peaks(kind: mx.DeviceType) -> dict[str, float]:
    """The peak memory of a training step, with that of the model and its state, in MB."""
    peaks = {}
    before = mx.default_device()
    mx.set_default_device(mx.Device(kind))
    try:
        for name, peak in _each(_peak_of).items():
            peaks[name] = round(peak() / 1e6, 1)
    finally:
        mx.set_default_device(before)
    return peaks


def _each(make: Callable[[optim.Adam, bool], Any]) -> dict[str, Any]:
    """``make(optimizer, is_compiled)`` for the fused optimizer and MLX's, eager and compiled."""
    return {
        f"{name}{mode}": make(kind(1e-3), bool(mode))
        for name, kind in (("fused", Adam), ("mlx.optimizers", _reference.Adam))
        for mode in ("", " compiled")
    }


def _peak_of(optimizer: optim.Adam, is_compiled: bool) -> Callable[[], int]:
    def peak() -> int:
        mx.synchronize()
        mx.clear_cache()
        others = mx.get_active_memory()
        model = Sequential(*(Linear(_SIDE, _SIDE) for _ in range(_LAYERS)))
        optimizer.init(model.trainable_parameters())
        state = [model.state, optimizer.state]
        mx.eval(state)
        loss_and_gradients = value_and_grad(model, lambda x: model(x).square().mean())

        def train(x: mx.array) -> None:
            _, gradients = loss_and_gradients(x)
            optimizer.update(model, gradients)

        run = mx.compile(train, inputs=state, outputs=state) if is_compiled else train
        x = mx.random.normal((1, _SIDE))
        for _ in range(3):  # the first compiles, or checks the kernels
            mx.synchronize()  # a GPU holds what the step before has used for a moment
            mx.reset_peak_memory()
            run(x)
            mx.eval(state)
        return mx.get_peak_memory() - others

    return peak


def _step_of(optimizer: optim.Adam, is_compiled: bool) -> Callable[[], None]:
    parameters = {"w": mx.random.normal((_ELEMENTS,))}
    gradients = {"w": mx.random.normal((_ELEMENTS,))}
    optimizer.init(parameters)
    state = [parameters, optimizer.state]
    mx.eval(state, gradients)

    def update(gradients: dict[str, mx.array]) -> None:
        parameters.update(optimizer.apply_gradients(gradients, parameters))

    run = mx.compile(update, inputs=state, outputs=state) if is_compiled else update

    def step() -> None:
        run(gradients)
        mx.eval(state)

    return step
