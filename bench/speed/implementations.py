"""Implementations of one Adam step: this package (fused), with options and other numbers of threads, and
mlx.optimizers.

Each has `step()`, which returns when the update is done and the old arrays are released, as in a training loop. They
take turns on one set of parameters and state; torch's (torch_adam.py) has copies of the same values.
"""

import sys
from collections.abc import Callable, Iterable
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import mlx.core as mx
import mlx.optimizers
import numpy as np
from mlx.utils import tree_map

import mlx_fused_adam as fused
from mlx_fused_adam import _ext

from ..tables import names
from . import decode
from .problem import BETAS, SETTINGS, Problem, Values, adam_step

HAS_TORCH = find_spec("torch") is not None  # imported where it takes part: that takes seconds

Kind = Callable[..., mlx.optimizers.Adam]
# What makes the optimizer, and whether the step is compiled.
PLAIN: dict[str, tuple[Kind, bool]] = {
    names.FUSED: (fused.Adam, False),
    names.FUSED_COMPILED: (fused.Adam, True),
    names.MLX: (mlx.optimizers.Adam, False),
    names.MLX_COMPILED: (mlx.optimizers.Adam, True),
}
WITH_OPTIONS: dict[str, tuple[Kind, bool]] = {
    name: (partial(fused.Adam, **options), False) for name, options in names.OPTIONS.items()
}


@cache
def _self_check(kind: Kind, dtype: mx.Dtype) -> None:
    """Update two small tensors: the package checks a kernel before its first use, in memory that is not the step's."""
    tensors = {"weight": mx.zeros((128, 32), dtype), "bias": mx.zeros((32,), dtype)}
    optimizer = kind(1e-3)
    mx.eval(optimizer.apply_gradients(tensors, tensors), optimizer.state)


class MlxAdam:
    """An mlx.optimizers.Adam, or the fused one, applied through apply_gradients."""

    def __init__(self, kind: Kind, problem: Problem, compiled: bool):
        _self_check(kind, problem.dtype)
        self.problem = problem
        self.tensors = problem.tensors
        self.optimizer = kind(SETTINGS.learning_rate, BETAS, SETTINGS.eps)
        self.optimizer.state = self._initial_state()
        self.optimizer.init(problem.parameters)
        self.state = self.optimizer.state
        self.captured = [problem.parameters, self.state]
        mx.eval(self.captured)
        self.apply: Callable[[dict], Any] = self._apply
        if compiled:
            self.apply = mx.compile(self._apply, inputs=self.captured, outputs=self.captured)

    def _initial_state(self) -> dict[str, Any]:
        """The problem's own, shared with all that have moments of the same dtype."""
        # float16 moments underflow, so fused never has them; bfloat16 takes as many bytes.
        is_fused = isinstance(self.optimizer, fused.Adam)
        is_converted = is_fused and self.problem.dtype == mx.float16
        self.dtype = self.problem.dtype
        self.state_dtype = mx.bfloat16 if is_converted else self.dtype
        return self.problem.state_in(self.state_dtype)

    def _apply(self, gradients: dict[str, mx.array]) -> None:
        parameters = self.problem.parameters
        parameters.update(self.optimizer.apply_gradients(gradients, parameters))

    @property
    def stored_bytes(self) -> int:
        return decode.bytes_of(self.problem.parameters, self.state)

    def step(self) -> None:
        self.apply(self.problem.gradients)
        mx.eval(self.captured)

    def sample(self, path: str, indices: np.ndarray) -> Values:
        state = self.state[path]
        parameter = decode.take(self.problem.parameters[path], indices)
        if "remainder" in state:
            unit = 256 if state["remainder"].dtype == mx.int8 else 1
            parameter = decode.joined(parameter, decode.take(state["remainder"], indices), unit)
        return {
            "parameter": parameter,
            "gradient": decode.take(self.problem.gradients[path], indices),
            **decode.moments(state, indices, self.problem.parameters[path].shape[-1]),
        }

    def expect(self, before: Values) -> Values:
        return adam_step(before, None)


class ThreadedAdam(MlxAdam):
    """Fused with a number of CPU threads."""

    def __init__(self, threads: int, problem: Problem):
        super().__init__(fused.Adam, problem, False)
        self.threads = threads
        self.usual_threads = _ext.num_threads()

    def step(self) -> None:
        fused.set_num_threads(self.threads)
        try:
            super().step()
        finally:
            fused.set_num_threads(self.usual_threads)


class ClippedMlxAdam(MlxAdam):
    """mlx.optimizers.Adam after clip_grad_norm, of gradients that need no clipping."""

    def __init__(self, problem: Problem, compiled: bool):
        super().__init__(mlx.optimizers.Adam, problem, compiled)

    def _apply(self, gradients: dict[str, mx.array]) -> None:
        most = names.OPTIONS[names.CLIPPING]["max_grad_norm"]
        clipped, self.norm = mlx.optimizers.clip_grad_norm(gradients, most)
        super()._apply(clipped)


class OptionAdam(MlxAdam):
    """Fused with options. It has its own state, made from the problem's; the parameters are shared.

    Others change the parameters between its steps, so its corrections no longer belong to them, as after loading
    weights.
    """

    def __init__(self, name: str, problem: Problem, eager: "OptionAdam | None" = None):
        self.options, self.eager = names.OPTIONS[name], eager
        super().__init__(WITH_OPTIONS[name][0], problem, eager is not None)
        if not eager:
            self.make_compiled = lambda: OptionAdam(name, problem, self)

    def _initial_state(self) -> dict[str, Any]:
        dtype = self.problem.dtype
        is_master = self.options.get("master_weights") and dtype == mx.bfloat16
        is_exact = is_master and self.options.get("master_weight_bits") != 24
        self.dtype = mx.float32 if is_exact else dtype  # of what is checked
        default = "float32" if dtype == mx.float32 else "bfloat16"
        # uint8 stands for 4 bits, as in the state.
        self.state_dtype = getattr(mx, self.options.get("state_dtype", default).replace("int4", "uint8"))
        if self.eager:
            return self.eager.state
        # Copies: an array with another reference could not be updated in place.
        return tree_map(lambda x: x + 0, self.problem.state)


def torch_device(device: str) -> str | None:
    """The device on which torch does the same work, or None if it is absent or has no such device."""
    if not HAS_TORCH:
        return None
    if device == "cpu":
        return "cpu"
    import torch

    return "mps" if torch.backends.mps.is_available() else None


def make_implementations(
    problem: Problem,
    device: str,
    options: Iterable[str] = (),
    threads: Iterable[int] = (),
) -> dict[str, Callable[[], Any]]:
    """Map each name to a function that makes the implementation, so that one may fail without the others."""
    makers: dict[str, Callable[[], Any]] = {
        name: partial(MlxAdam, kind, problem, compiled) for name, (kind, compiled) in PLAIN.items()
    }
    for name in options:
        makers[name] = partial(OptionAdam, name, problem)
        if name == names.CLIPPING:
            makers[names.MLX_CLIPPED] = partial(ClippedMlxAdam, problem, False)
            makers[names.MLX_CLIPPED_COMPILED] = partial(ClippedMlxAdam, problem, True)
    for count in threads:
        makers[names.with_threads(count)] = partial(ThreadedAdam, count, problem)
    if where := torch_device(device):
        from .torch_adam import TorchAdam

        makers[names.TORCH] = partial(TorchAdam, problem, where)
    return makers


def versions() -> dict[str, str]:
    return {
        "python": sys.version.split()[0],
        "mlx": mx.__version__,
        "mlx-fused-adam": fused.__version__,
        **({"torch": version("torch")} if HAS_TORCH else {}),
    }
