"""Whole training steps: forward, backward and update of a model of `mlx.nn` layers.

The suite `step` times them; bench/memory measures their peak memory.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from .decode import take
from .llama import Llama
from .problem import BETAS, SETTINGS, Problem, Values, adam_step
from .shapes import LlamaSizes, ParameterShape


class Task(ABC):
    """A model and one batch, the same each time they are made; small enough to hand to a process."""

    dtype: str  # of parameters

    @abstractmethod
    def model(self) -> nn.Module:
        """The model, its parameters not yet evaluated."""

    @abstractmethod
    def batch(self) -> mx.array: ...

    @staticmethod
    @abstractmethod
    def loss(model: nn.Module, batch: mx.array) -> mx.array: ...

    def fresh_model(self) -> nn.Module:
        mx.random.seed(0)
        model = self.model()
        model.set_dtype(getattr(mx, self.dtype))
        mx.eval(model.parameters())
        return model

    def gradients(self, model: nn.Module) -> dict[str, mx.array]:
        _, gradients = nn.value_and_grad(model, self.loss)(model, self.batch())
        return dict(tree_flatten(gradients))

    def shapes(self) -> list[ParameterShape]:
        """The parameters, with the layouts in which autograd hands over their gradients."""
        model = self.fresh_model()
        gradients = self.gradients(model)
        mx.eval(gradients)
        parameters = tree_flatten(model.trainable_parameters())
        return [ParameterShape(path, p.shape, is_column_major(gradients[path])) for path, p in parameters]


@dataclass(frozen=True)
class LanguageTask(Task):
    """A Llama-like model on random tokens: full fine-tuning."""

    sizes: LlamaSizes
    sequences: int
    length: int
    dtype: str = "float32"

    def model(self) -> nn.Module:
        return Llama(self.sizes)

    def batch(self) -> mx.array:
        shape = (self.sequences, self.length + 1)
        return mx.random.randint(0, self.sizes.vocabulary, shape, key=mx.random.key(0))

    @staticmethod
    def loss(model: nn.Module, batch: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(batch[:, :-1]), batch[:, 1:], reduction="mean")


@dataclass(frozen=True)
class LinearTask(Task):
    """Equal linear layers with ReLU between them: little computing for its parameters."""

    layers: int
    dims: int
    rows: int
    dtype: str = "float32"

    def model(self) -> nn.Module:
        layers = [nn.Linear(self.dims, self.dims) for _ in range(self.layers)]
        return nn.Sequential(*[layer for linear in layers for layer in (linear, nn.ReLU())][:-1])

    def batch(self) -> mx.array:
        return mx.random.normal((self.rows, self.dims), key=mx.random.key(0))

    @staticmethod
    def loss(model: nn.Module, batch: mx.array) -> mx.array:
        return mx.mean(mx.square(model(batch) - batch))


def is_column_major(x: mx.array) -> bool:
    """True for a matrix that is transposed in memory, by its buffer's strides."""
    flags = np.array(x, copy=False).flags
    return bool(x.ndim == 2 and flags.f_contiguous and not flags.c_contiguous)


class TrainingStep:
    """Forward, backward and, if there is an optimizer, update, compiled as a whole or eager.

    The moments start as those of `problem`, or at zero.
    """

    dtype = state_dtype = mx.float32

    def __init__(
        self,
        task: Task,
        kind: Callable[..., mlx.optimizers.Adam] | None,
        compiled: bool,
        problem: Problem | None = None,
    ):
        self.task = task
        self.batch = task.batch()
        self.tensors = problem.tensors if problem else []  # those that are checked
        self.model = task.fresh_model()
        self.value_and_grad = nn.value_and_grad(self.model, task.loss)
        self.optimizer = kind and kind(SETTINGS.learning_rate, BETAS, SETTINGS.eps)
        self.captured: list[Any] = [self.model.state]
        if self.optimizer:
            if problem:
                moments = {
                    f"{path}.{name}": problem.state[path][name] + 0
                    for path in problem.parameters
                    for name in ("m", "v")
                }
                self.optimizer.state.update(tree_unflatten(list(moments.items())))
            self.optimizer.init(self.model.trainable_parameters())
            self.captured.append(self.optimizer.state)
        mx.eval(self.captured, self.batch)
        self.run: Callable[[mx.array], Any] = self._run
        if compiled:
            outputs = self.captured if self.optimizer else None
            self.run = mx.compile(self._run, inputs=self.captured, outputs=outputs)

    def _run(self, batch: mx.array) -> Any:
        parameters = self.model.trainable_parameters()
        loss, gradients = self.value_and_grad(self.model, batch)
        if self.optimizer is None:
            self.model.update(parameters)  # value_and_grad leaves its tracers in the model
            return loss, gradients
        self.optimizer.update(self.model, gradients)
        return loss

    @property
    def stored_bytes(self) -> int:
        """Bytes of parameters and state, without the optimizer's scalars."""
        scalars = ("step", "learning_rate")
        state = [(k, x) for k, x in tree_flatten(self.optimizer.state) if k not in scalars]
        return sum(x.nbytes for _, x in [*tree_flatten(self.model.parameters()), *state])

    def step(self) -> None:
        mx.eval(self.run(self.batch), self.captured)

    def sample(self, path: str, indices: np.ndarray) -> Values:
        state = dict(tree_flatten(self.optimizer.state))
        arrays = {
            "parameter": dict(tree_flatten(self.model.parameters()))[path],
            "gradient": self._gradients()[path],
            "m": state[f"{path}.m"],
            "v": state[f"{path}.v"],
        }
        return {name: take(x, indices) for name, x in arrays.items()}

    def _gradients(self) -> dict[str, mx.array]:
        """The gradients at the present parameters; kept until the next step, for all tensors to sample."""
        step = self.optimizer.step.item()
        if getattr(self, "_gradients_at", None) != step:
            self._gradients_at, self._kept_gradients = step, self.task.gradients(self.model)
            mx.eval(self._kept_gradients)
        return self._kept_gradients

    def forget_gradients(self) -> None:
        """Release what sampling kept."""
        self._gradients_at, self._kept_gradients = None, {}

    def expect(self, before: Values) -> Values:
        return adam_step(before, None)
