"""Those that take the same Adam step: this package, mlx.optimizers, torch and a traffic probe.

Each owns `step()`, which returns when the update is done and the old arrays are released, as in a
training loop. MLX's contenders take turns on one set of parameters and state; the others hold
copies of the same values.
"""

import sys
from collections.abc import Callable, Iterable
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import mlx.core as mx
import mlx.optimizers as stock
import numpy as np
from mlx.utils import tree_map

import mlx_fused_adam as fused
from mlx_fused_adam import _ext

from . import stored
from .names import (
    OURS,
    OURS_COMPILED,
    PROBE,
    PROBE_16_BIT,
    STOCK,
    STOCK_CLIPPED,
    STOCK_CLIPPED_COMPILED,
    STOCK_COMPILED,
    TORCH,
    with_threads,
)
from .options import GUARDED, OPTIONS
from .problem import BETAS, SETTINGS, Problem, Values, adam_step
from .reference import to_numpy
from .shapes import ParameterShape

HAS_TORCH = find_spec("torch") is not None  # imported where it takes part: that takes seconds

# Those of MLX: what makes the optimizer, and whether the step is compiled.
MLX_CONTENDERS: dict[str, tuple[Callable[..., stock.Adam], bool]] = {
    OURS: (fused.Adam, False),
    OURS_COMPILED: (fused.Adam, True),
    STOCK: (stock.Adam, False),
    STOCK_COMPILED: (stock.Adam, True),
}
OPTION_CONTENDERS: dict[str, tuple[Callable[..., stock.Adam], bool]] = {
    name: (partial(fused.Adam, **options), False) for name, options in OPTIONS.items()
}


def take(x: mx.array, indices: np.ndarray) -> np.ndarray:
    """Elements by their row-major number, without a copy of the whole of a column-major array."""
    places = np.unravel_index(indices, x.shape)
    return to_numpy(x[tuple(mx.array(place.astype(np.uint32)) for place in places)])


@cache
def _let_check_itself(kind: Callable[..., stock.Adam], dtype: mx.Dtype) -> None:
    """A step of two small tensors: the package checks a kernel before its first use, in memory that is not the step's."""
    tensors = {"weight": mx.zeros((128, 32), dtype), "bias": mx.zeros((32,), dtype)}
    optimizer = kind(1e-3)
    mx.eval(optimizer.apply_gradients(tensors, tensors), optimizer.state)


class MlxAdam:
    """An mlx.optimizers.Adam, or ours, applied through apply_gradients."""

    def __init__(
        self, kind: type[stock.Adam], problem: Problem, compiled: bool, bias_correction: bool
    ):
        _let_check_itself(kind, problem.dtype)
        self.problem = problem
        self.tensors = problem.tensors
        self.dtype = problem.dtype
        self.optimizer = kind(
            SETTINGS.learning_rate, BETAS, SETTINGS.eps, bias_correction=bias_correction
        )
        # float16 moments underflow, so ours never keeps them; as many bytes in bfloat16.
        is_converted = issubclass(kind, fused.Adam) and problem.dtype == mx.float16
        self.state_dtype = mx.bfloat16 if is_converted else problem.dtype
        # Shared by all MLX contenders with such a state: they use one memory.
        self.state = self.optimizer.state = problem.state_in(self.state_dtype)
        self.optimizer.init(problem.parameters)
        self.captured = [problem.parameters, self.optimizer.state]
        self.apply: Callable[[dict], Any] = self._apply
        if compiled:
            self.apply = mx.compile(self._apply, inputs=self.captured, outputs=self.captured)

    def _apply(self, gradients: dict[str, mx.array]) -> None:
        parameters = self.problem.parameters
        parameters.update(self.optimizer.apply_gradients(gradients, parameters))

    @property
    def stored_bytes(self) -> int:
        return stored.bytes_of(self.problem.parameters, self.state)

    def step(self) -> None:
        self.apply(self.problem.gradients)
        mx.eval(self.captured)

    def sample(self, path: str, indices: np.ndarray) -> Values:
        state = self.state[path]
        arrays = {
            "parameter": self.problem.parameters[path],
            "gradient": self.problem.gradients[path],
        }
        return {
            name: take(x, indices) for name, x in (arrays | {k: state[k] for k in "mv"}).items()
        }

    def expect(self, before: Values) -> Values:
        step = self.optimizer.step.item() + 1 if self.optimizer.bias_correction else None
        return adam_step(before, step)


class ThreadedAdam(MlxAdam):
    """Ours with so many threads of the CPU."""

    def __init__(self, threads: int, problem: Problem, bias_correction: bool):
        super().__init__(fused.Adam, problem, False, bias_correction)
        self.threads = threads
        self.usual_threads = _ext.num_threads()

    def step(self) -> None:
        fused.set_num_threads(self.threads)
        try:
            super().step()
        finally:
            fused.set_num_threads(self.usual_threads)


class ClippedStock(MlxAdam):
    """mlx.optimizers.Adam after clip_grad_norm, of gradients that need no clipping."""

    def __init__(self, problem: Problem, compiled: bool, bias_correction: bool):
        super().__init__(stock.Adam, problem, compiled, bias_correction)

    def _apply(self, gradients: dict[str, mx.array]) -> None:
        clipped, self.norm = stock.clip_grad_norm(gradients, OPTIONS[GUARDED]["max_grad_norm"])
        super()._apply(clipped)


class OptionAdam(MlxAdam):
    """Ours with options. It has a state of its own, made from the problem's; the parameters are those of all.

    What others do to the parameters meanwhile leaves a remainder that is not theirs, as loaded weights would.
    """

    def __init__(
        self, name: str, problem: Problem, bias_correction: bool, eager: "OptionAdam | None" = None
    ):
        self.problem = problem
        self.tensors = problem.tensors
        kind, _ = OPTION_CONTENDERS[name]
        _let_check_itself(kind, problem.dtype)
        self.optimizer = kind(
            SETTINGS.learning_rate, BETAS, SETTINGS.eps, bias_correction=bias_correction
        )
        # Copies: an array that is held elsewhere could not be updated in place.
        self.optimizer.state = eager.state if eager else tree_map(lambda x: x + 0, problem.state)
        self.optimizer.init(problem.parameters)
        self.state = self.optimizer.state
        options = OPTIONS[name]
        has_remainder = options.get("master_weights") and problem.dtype == mx.bfloat16
        self.dtype = mx.float32 if has_remainder else problem.dtype  # of what is checked
        plain = "float32" if problem.dtype == mx.float32 else "bfloat16"
        self.state_dtype = getattr(mx, options.get("state_dtype", plain))
        self.captured = [problem.parameters, self.state]
        mx.eval(self.captured)
        self.apply = self._apply
        if eager:
            self.apply = mx.compile(self._apply, inputs=self.captured, outputs=self.captured)
        else:
            self.make_compiled = lambda: OptionAdam(name, problem, bias_correction, self)

    def sample(self, path: str, indices: np.ndarray) -> Values:
        state = self.state[path]
        parameter = take(self.problem.parameters[path], indices)
        if "remainder" in state:
            parameter = stored.joined(parameter, take(state["remainder"], indices))
        return {
            "parameter": parameter,
            "gradient": take(self.problem.gradients[path], indices),
            **stored.moments(state, indices, take),
        }


class TrafficProbe:
    """An update's reads and writes, in place, with one addition for each write.

    It has all bytes of the case in one row-major tensor. In float32, whatever the case's dtype,
    neither conversions nor the number of tensors slow it down: about what a step of the same
    traffic should cost. It is a probe and no bound: another loop may be faster. In a 16-bit dtype it
    shows what the conversions take of that.
    """

    def __init__(self, problem: Problem, dtype: mx.Dtype):
        self.dtype = self.state_dtype = dtype
        size = problem.size * problem.dtype.size // dtype.size
        self.stored_bytes = 3 * size * dtype.size
        self.tensors = [ParameterShape("all", (size,))]
        self.gradient = mx.full((size,), 0.5, dtype)
        self.state = [mx.zeros((size,), dtype) for _ in range(3)]
        mx.eval(self.gradient, self.state)

    def step(self) -> None:
        parameter, m, v = self.state
        self.state.clear()
        self.state += _ext.traffic_probe(parameter, self.gradient, m, v)
        del parameter, m, v
        mx.eval(self.state)

    def sample(self, path: str, indices: np.ndarray) -> Values:
        arrays = dict(zip(("parameter", "m", "v"), self.state, strict=True), gradient=self.gradient)
        return {name: take(x, indices) for name, x in arrays.items()}

    def expect(self, before: Values) -> Values:
        return {name: before[name] + before["gradient"] for name in ("parameter", "m", "v")}


def torch_device(device: str) -> str | None:
    """Where torch runs the same work, or None if it is absent or has no such device."""
    if not HAS_TORCH:
        return None
    if device == "cpu":
        return "cpu"
    import torch

    return "mps" if torch.backends.mps.is_available() else None


def make_contenders(
    problem: Problem,
    device: str,
    bias_correction: bool,
    options: Iterable[str] = (),
    threads: Iterable[int] = (),
) -> dict[str, Callable[[], Any]]:
    """Name to a function that makes the contender, so that one may fail without the others.

    `options` of ours and ours with other numbers of `threads` besides.
    """
    makers: dict[str, Callable[[], Any]] = {
        name: lambda kind=kind, compiled=compiled: MlxAdam(kind, problem, compiled, bias_correction)
        for name, (kind, compiled) in MLX_CONTENDERS.items()
    }
    for name in options:
        makers[name] = lambda name=name: OptionAdam(name, problem, bias_correction)
        if name == GUARDED:
            makers[STOCK_CLIPPED] = lambda: ClippedStock(problem, False, bias_correction)
            makers[STOCK_CLIPPED_COMPILED] = lambda: ClippedStock(problem, True, bias_correction)
    for count in threads:
        makers[with_threads(count)] = lambda count=count: ThreadedAdam(
            count, problem, bias_correction
        )
    if where := torch_device(device):
        from .torch_adam import TorchAdam

        makers[TORCH] = lambda: TorchAdam(problem, where)
    makers[PROBE] = lambda: TrafficProbe(problem, mx.float32)
    if problem.dtype.size == 2 and len(problem.tensors) == 1:
        makers[PROBE_16_BIT] = lambda: TrafficProbe(problem, problem.dtype)
    return makers


def versions() -> dict[str, str]:
    return {
        "python": sys.version.split()[0],
        "mlx": mx.__version__,
        "mlx-fused-adam": fused.__version__,
        **({"torch": version("torch")} if HAS_TORCH else {}),
    }
