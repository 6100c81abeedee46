"""A small language model of stock `mlx.nn` layers, and whole training steps with it.

Used by the suite `step`: forward, backward and update, and what part of it the update is.
"""

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as stock
import numpy as np
from contenders import take
from mlx.utils import tree_flatten, tree_unflatten
from problem import BETAS, EPS, LEARNING_RATE, Problem, Values, adam
from shapes import Tensor


class LanguageModel(nn.Module):
    def __init__(self, vocabulary: int, dims: int, layers: int):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dims)
        self.encoder = nn.TransformerEncoder(layers, dims, num_heads=4, norm_first=True)
        self.head = nn.Linear(dims, vocabulary)

    def __call__(self, tokens: mx.array) -> mx.array:
        mask = nn.MultiHeadAttention.create_additive_causal_mask(tokens.shape[1])
        return self.head(self.encoder(self.embedding(tokens), mask))

    def loss(self, tokens: mx.array) -> mx.array:
        return nn.losses.cross_entropy(self(tokens[:, :-1]), tokens[:, 1:], reduction="mean")


class Task:
    """A model's sizes and one batch of random tokens; `model()` gives the same model each time."""

    def __init__(self, vocabulary: int, dims: int, layers: int, batch: int, context: int):
        self.sizes = (vocabulary, dims, layers)
        self.tokens = mx.random.randint(0, vocabulary, (batch, context + 1), key=mx.random.key(0))
        self.description = f"{layers} layers of {dims}, batch {batch} x {context}"

    def model(self) -> LanguageModel:
        mx.random.seed(0)
        model = LanguageModel(*self.sizes)
        mx.eval(model.parameters())
        return model

    def gradients(self, model: LanguageModel) -> dict[str, mx.array]:
        _, gradients = nn.value_and_grad(model, model.loss)(self.tokens)
        return dict(tree_flatten(gradients))

    def tensors(self) -> list[Tensor]:
        """The parameters, with the layouts in which autograd hands over their gradients."""
        model = self.model()
        gradients = self.gradients(model)
        mx.eval(gradients)
        parameters = dict(tree_flatten(model.parameters()))
        return [
            Tensor(path, p.shape, is_column_major(gradients[path]))
            for path, p in parameters.items()
        ]


def is_column_major(x: mx.array) -> bool:
    """Whether a matrix lies transposed in memory, by its buffer's strides."""
    flags = np.array(x, copy=False).flags
    return bool(x.ndim == 2 and flags.f_contiguous and not flags.c_contiguous)


class TrainingStep:
    """Forward, backward and, if an optimizer is given, update, compiled as a whole or eager."""

    dtype = mx.float32

    def __init__(self, task: Task, kind: type[stock.Adam] | None, compiled: bool, problem: Problem):
        self.task = task
        self.tensors = problem.tensors
        self.model = task.model()
        self.value_and_grad = nn.value_and_grad(self.model, self.model.loss)
        self.optimizer = kind and kind(LEARNING_RATE, list(BETAS), EPS)
        self.captured: list[Any] = [self.model.state]
        if self.optimizer:
            moments = {
                f"{path}.{name}": problem.state[path][name] + 0
                for path in problem.parameters
                for name in ("m", "v")
            }
            self.optimizer.state.update(tree_unflatten(list(moments.items())))
            self.optimizer.init(self.model.trainable_parameters())
            self.captured.append(self.optimizer.state)
            mx.eval(self.captured)
        self.run: Callable[[mx.array], Any] = self._run
        if compiled:
            outputs = self.captured if self.optimizer else None
            self.run = mx.compile(self._run, inputs=self.captured, outputs=outputs)

    def _run(self, tokens: mx.array) -> Any:
        parameters = self.model.trainable_parameters()
        loss, gradients = self.value_and_grad(tokens)
        if self.optimizer is None:
            self.model.update(parameters)  # value_and_grad leaves its tracers in the model
            return loss, gradients
        self.optimizer.update(self.model, gradients)
        return loss

    def step(self) -> None:
        mx.eval(self.run(self.task.tokens), self.captured)

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
        """At the present parameters; kept until the next step, for all tensors to sample."""
        step = self.optimizer.step.item()
        if getattr(self, "_gradients_at", None) != step:
            self._gradients_at, self._kept_gradients = step, self.task.gradients(self.model)
            mx.eval(self._kept_gradients)
        return self._kept_gradients

    def expect(self, before: Values) -> Values:
        return adam(before, None)
