"""Self-check and report for this machine: python -m mlx_fused_adam. Exit status 1 if a kernel that should work does not.

Paste the report into an issue if anything in it looks wrong.
"""

from __future__ import annotations

import argparse
import platform
import sys
import warnings
from collections.abc import Callable

import mlx.core as mx
import mlx.optimizers as stock

from . import Adam, __version__, _backends, _ext, _self_check
from ._build_info import MLX_VERSION
from ._timing import measure

# The combinations of dtypes that training meets: of parameter, gradient, and m and v.
_CHECKED = [
    (mx.float32, mx.float32, mx.float32),
    (mx.bfloat16, mx.bfloat16, mx.bfloat16),
    (mx.float16, mx.float16, mx.bfloat16),
    (mx.float32, mx.bfloat16, mx.float32),
    # and the norm of gradients:
    (mx.float32,),
    (mx.bfloat16,),
    (mx.float16,),
]
_ELEMENTS = 4_194_304
_SECONDS, _FEWEST_ROUNDS = 3.0, 5


def _versions() -> None:
    mlx = mx.__version__  # type: ignore[attr-defined]  # mlx's stubs do not have it
    print(f"mlx-fused-adam {__version__}, built for mlx {MLX_VERSION}; mlx {mlx}")
    print(f"Python {platform.python_version()} on {platform.platform()}, {platform.machine()}")
    for kind in (mx.cpu, mx.gpu):
        if mx.is_available(kind):
            info = mx.device_info(kind)
            details = ", ".join(
                f"{k} {v}" for k, v in info.items() if not isinstance(v, (list, dict))
            )
            print(f"{kind.name}: {details}")
    print(f"CPU kernels: {_ext.cpu_isa()}, up to {_ext.num_threads()} threads")


def _check(kind: mx.DeviceType) -> bool:
    """Prints what updates on this device and how far its kernels are from stock; False if one fails."""
    backend = _backends.backend_of(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the reasons are part of the lines below
        print(f"\n{kind.name}: {backend.description}")
        if backend.name is None:
            built_in = (_ext.gpu_backend() if kind == mx.gpu else _ext.cpu_backend())[0]
            return built_in is None or backend.is_forced
        is_right = True
        for dtypes in _CHECKED:
            reason = backend.check(dtypes)
            is_right &= reason is None
            print(f"  {_self_check.names(dtypes):55} {reason or 'every kernel is right'}")
    return is_right


def _step_of(optimizer: stock.Adam, compiled: bool) -> Callable[[], None]:
    parameters = {"w": mx.random.normal((_ELEMENTS,))}
    gradients = {"w": mx.random.normal((_ELEMENTS,))}
    optimizer.init(parameters)
    state = [parameters, optimizer.state]
    mx.eval(state, gradients)

    def update(gradients: dict) -> None:
        parameters.update(optimizer.apply_gradients(gradients, parameters))

    run = mx.compile(update, inputs=state, outputs=state) if compiled else update

    def step() -> None:
        run(gradients)
        mx.eval(state)

    return step


def _speed(kind: mx.DeviceType) -> None:
    with mx.stream(kind):
        timings = measure(
            {
                "ours": _step_of(Adam(1e-3), compiled=False),
                "ours compiled": _step_of(Adam(1e-3), compiled=True),
                "stock": _step_of(stock.Adam(1e-3), compiled=False),
                "stock compiled": _step_of(stock.Adam(1e-3), compiled=True),
            },
            _SECONDS,
            _FEWEST_ROUNDS,
        )
    print(
        f"  a step of {_ELEMENTS / 1e6:.1f}M float32 parameters (28 bytes each; x: over ours alike):"
    )
    for name, timing in timings.items():
        rate = 28 * _ELEMENTS / timing.median / 1e9
        ours = timings["ours compiled" if "compiled" in name else "ours"].median
        print(
            f"  {name:16} {timing.median * 1e3:8.2f} ms  {rate:6.1f} GB/s  {timing.median / ours:5.1f}x"
        )


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mlx_fused_adam", description=__doc__)
    parser.parse_args()
    _versions()
    is_right = True
    for kind in (mx.cpu, mx.gpu):
        if mx.is_available(kind):
            is_right &= _check(kind)
            if _backends.backend_of(kind).check() is None:
                _speed(kind)
    print("\nEverything that should work does." if is_right else "\nA kernel failed: see above.")
    return 0 if is_right else 1


if __name__ == "__main__":
    sys.exit(main())
