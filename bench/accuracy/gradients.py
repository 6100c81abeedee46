"""Sequences of gradients for bench/quantized_state.py: recorded from training, and synthetic.

Each is an array (steps, blocks, 32) of float32: 32 neighbours along a parameter's last axis share a scale.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import AdamW, Optimizer
from mlx.utils import tree_flatten

from ..speed.llama import Llama
from ..speed.shapes import LlamaSizes
from .character_model import Sizes, Text, Transformer, mean_loss

BLOCK = 32
SMALL_LLAMA = LlamaSizes(2048, 128, 352, 2, 4, 4, 32)


def lognormal(spread: float, steps: int, blocks: int) -> np.ndarray:
    """Noise whose scale differs within a block: its logarithm is normal with this deviation."""
    random = np.random.default_rng(1)
    scales = np.exp(spread * random.standard_normal((blocks, BLOCK)))
    return (random.standard_normal((steps, blocks, BLOCK)) * scales).astype(np.float32)


def mixed_constant(steps: int, blocks: int) -> np.ndarray:
    """One element of a block has gradient 1, the others 0.3 or 0.03: round-to-nearest sticks."""
    g = np.empty((steps, blocks, BLOCK), np.float32)
    g[:, ::2], g[:, 1::2] = 0.3, 0.03
    g[:, :, 0] = 1
    return g


def periodic(steps: int, blocks: int) -> np.ndarray:
    """Gradients at every 34th step only: the golden ratio's multiples nearly repeat after 34."""
    g = lognormal(0.5, steps, blocks)
    g[np.arange(steps) % 34 != 0] = 0
    return g


def half_sparse(steps: int, blocks: int) -> np.ndarray:
    """Half of each block has a gradient at one step of 50, at random; the other half at every step."""
    g = lognormal(0.5, steps, blocks)
    happens = np.random.default_rng(2).random((steps, blocks, BLOCK)) < 1 / 50
    g[:, :, ::2] *= happens[:, :, ::2]
    return g


def synthetic(steps: int, blocks: int) -> dict[str, np.ndarray]:
    """The sources that need no training, by name."""
    return {
        "spread 1.5": lognormal(1.5, steps, blocks),
        "spread 3": lognormal(3, steps, blocks),
        "constants": mixed_constant(steps, blocks),
        "half sparse": half_sparse(steps, blocks),
        "every 34th": periodic(steps, blocks),
    }


def recorded(steps: int, blocks: int) -> dict[str, np.ndarray]:
    """Gradients of training, by name."""
    return {
        "characters": character_model(steps, blocks),
        "Llama, Zipf": llama_zipf(steps, blocks),
    }


def character_model(steps: int, blocks: int) -> np.ndarray:
    """Recorded while the character model learns Python's documentation."""
    mx.random.seed(0)
    sizes = Sizes()
    text = Text(sizes.context)
    model = Transformer(text.vocabulary, sizes)
    optimizer = AdamW(2e-3, betas=[0.9, 0.98], weight_decay=0.1, bias_correction=True)

    def loss(inputs: mx.array, targets: mx.array) -> mx.array:
        return mean_loss(model, inputs, targets)

    return _record(model, optimizer, loss, lambda: text.batch(text.train, 8), steps, blocks)


def llama_zipf(steps: int, blocks: int) -> np.ndarray:
    """Recorded while the benchmark's Llama learns tokens whose frequency falls as 1 / rank."""
    mx.random.seed(0)
    random = np.random.default_rng(3)
    vocabulary = SMALL_LLAMA.vocabulary
    frequency = 1 / np.arange(1, vocabulary + 1)
    frequency /= frequency.sum()
    successor = random.permutation(vocabulary)

    def batch() -> tuple[mx.array, mx.array]:
        """Half of the tokens follow from their predecessor, so that there is something to learn."""
        tokens = random.choice(vocabulary, (4, 65), p=frequency)
        for i in range(1, 65):
            follows = random.random(4) < 0.5
            tokens[follows, i] = successor[tokens[follows, i - 1]]
        return mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:])

    model = Llama(SMALL_LLAMA)
    optimizer = AdamW(1e-3, betas=[0.9, 0.95], weight_decay=0.1, bias_correction=True)

    def loss(inputs: mx.array, targets: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(inputs), targets, reduction="mean")

    return _record(model, optimizer, loss, batch, steps, blocks)


def _record(
    model: nn.Module,
    optimizer: Optimizer,
    loss: Callable[..., mx.array],
    batch: Callable[[], tuple[mx.array, mx.array]],
    steps: int,
    blocks: int,
) -> np.ndarray:
    """Train, and keep the gradients of equally many blocks of every tensor that has whole blocks."""
    random = np.random.default_rng(4)
    value_and_grad = nn.value_and_grad(model, loss)
    whole = [(k, p.size // BLOCK) for k, p in tree_flatten(model.parameters()) if p.shape[-1] >= 32]
    each = max(1, blocks // len(whole))
    chosen = {path: random.choice(n, min(each, n), replace=False) for path, n in whole}
    kept = []
    for _ in range(steps):
        _, gradients = value_and_grad(*batch())
        optimizer.update(model, gradients)
        mx.eval(model.state, optimizer.state, gradients)
        found = dict(tree_flatten(gradients))
        kept.append(np.concatenate([_blocks(np.array(found[path]))[rows] for path, rows in chosen.items()]))
    return np.stack(kept)


def _blocks(gradient: np.ndarray) -> np.ndarray:
    """The whole blocks of a tensor's rows; the rest of a row is dropped."""
    rows = gradient.reshape(-1, gradient.shape[-1])
    return rows[:, : rows.shape[1] // BLOCK * BLOCK].reshape(-1, BLOCK)
