"""Sequences of gradients on which state_codes.py tries storage codes: synthetic ones, and ones recorded from training.

Each is an array (steps, blocks, 32) of float32: 32 neighbours along a parameter's last axis share a scale.
"""

from collections.abc import Callable

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as stock
import numpy as np
from mlx.utils import tree_flatten

from .example import Corpus, Transformer, mean_loss, read_text
from .llama import Llama
from .shapes import LlamaSizes

BLOCK = 32
SMALL_LLAMA = LlamaSizes(2048, 128, 352, 2, 4, 4, 32)


def lognormal(
    spread: float, steps: int, blocks: int, degrees_of_freedom: float | None = None
) -> np.ndarray:
    """Noise whose scale differs within a block: its logarithm is normal with this deviation."""
    random = np.random.default_rng(1)
    scales = np.exp(spread * random.standard_normal((blocks, BLOCK)))
    shape = (steps, blocks, BLOCK)
    noise = (
        random.standard_t(degrees_of_freedom, shape)
        if degrees_of_freedom
        else random.standard_normal(shape)
    )
    return (noise * scales).astype(np.float32)


def constant(steps: int, blocks: int) -> np.ndarray:
    return np.ones((steps, blocks, BLOCK), np.float32)


def mixed_constant(steps: int, blocks: int) -> np.ndarray:
    """One element of a block has gradient 1, the others 0.3 or 0.03: rounding to nearest sticks."""
    g = np.empty((steps, blocks, BLOCK), np.float32)
    g[:, ::2], g[:, 1::2] = 0.3, 0.03
    g[:, :, 0] = 1
    return g


def stopping(steps: int, blocks: int) -> np.ndarray:
    """Half of each block gets zeros after a fifth of the steps, the other half goes on."""
    g = lognormal(0.5, steps, blocks)
    g[steps // 5 :, :, ::2] = 0
    return g


def ramp(steps: int, blocks: int, factor: float) -> np.ndarray:
    growth = factor ** (np.arange(steps) / steps)
    return lognormal(0.5, steps, blocks) * growth.astype(np.float32)[:, None, None]


def sparse(steps: int, blocks: int) -> np.ndarray:
    """Each element has a gradient at one step of 50, at random."""
    happens = np.random.default_rng(2).random((steps, blocks, BLOCK)) < 1 / 50
    return lognormal(0.5, steps, blocks) * happens


def periodic(steps: int, blocks: int) -> np.ndarray:
    """Gradients at every 34th step only: thresholds that follow the golden ratio could keep time with that."""
    g = lognormal(0.5, steps, blocks)
    g[np.arange(steps) % 34 != 0] = 0
    return g


def sparse_in_dense(steps: int, blocks: int) -> np.ndarray:
    """The same for half of each block; the other half has a gradient at every step."""
    g = sparse(steps, blocks)
    g[:, :, 1::2] = lognormal(0.5, steps, blocks)[:, :, 1::2]
    return g


def synthetic(steps: int, blocks: int) -> dict[str, np.ndarray]:
    """All that need no training, by name."""
    return {
        "spread 0.5": lognormal(0.5, steps, blocks),
        "spread 1.5": lognormal(1.5, steps, blocks),
        "spread 3": lognormal(3, steps, blocks),
        "spread 1.5, heavy tails": lognormal(1.5, steps, blocks, degrees_of_freedom=3),
        "constant 1, 0.3, 0.03": mixed_constant(steps, blocks),
        "half stop": stopping(steps, blocks),
        "grow 100 times": ramp(steps, blocks, 100),
        "shrink 100 times": ramp(steps, blocks, 0.01),
        "1 step of 50": sparse(steps, blocks),
        "half 1 step of 50": sparse_in_dense(steps, blocks),
        "every 34th step": periodic(steps, blocks),
    }


def recorded(steps: int, blocks: int) -> dict[str, np.ndarray]:
    """Those of training, by name."""
    return {"example": example_model(steps, blocks), "Llama, Zipf": llama_zipf(steps, blocks)}


def example_model(steps: int, blocks: int) -> np.ndarray:
    """Recorded while the transformer of examples/train.py learns Python's documentation."""
    mx.random.seed(0)
    corpus = Corpus(read_text(None), 64)
    model = Transformer(len(corpus.characters), 64, 96, 4, 2)
    optimizer = stock.AdamW(2e-3, betas=[0.9, 0.98], weight_decay=0.1, bias_correction=True)

    def loss(inputs: mx.array, targets: mx.array) -> mx.array:
        return mean_loss(model, inputs, targets)

    return _record(model, optimizer, loss, lambda: corpus.batch(corpus.train, 8), steps, blocks)


def llama_zipf(steps: int, blocks: int) -> np.ndarray:
    """Recorded while the benchmark's Llama learns tokens whose frequency falls as 1 / rank."""
    mx.random.seed(0)
    random = np.random.default_rng(3)
    vocabulary = SMALL_LLAMA.vocabulary
    frequency = 1 / np.arange(1, vocabulary + 1)
    frequency /= frequency.sum()
    successor = random.permutation(vocabulary)

    def batch() -> tuple[mx.array, mx.array]:
        """Half of the tokens follow from the one before, so that there is something to learn."""
        tokens = random.choice(vocabulary, (4, 65), p=frequency)
        for i in range(1, 65):
            follows = random.random(4) < 0.5
            tokens[follows, i] = successor[tokens[follows, i - 1]]
        return mx.array(tokens[:, :-1]), mx.array(tokens[:, 1:])

    model = Llama(SMALL_LLAMA)
    optimizer = stock.AdamW(1e-3, betas=[0.9, 0.95], weight_decay=0.1, bias_correction=True)

    def loss(inputs: mx.array, targets: mx.array) -> mx.array:
        return nn.losses.cross_entropy(model(inputs), targets, reduction="mean")

    return _record(model, optimizer, loss, batch, steps, blocks)


def _record(
    model: nn.Module,
    optimizer: stock.Optimizer,
    loss: Callable[..., mx.array],
    batch: Callable[[], tuple[mx.array, mx.array]],
    steps: int,
    blocks: int,
) -> np.ndarray:
    """Train, and keep the gradients of as many blocks of every tensor that has whole blocks."""
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
        kept.append(
            np.concatenate([_blocks(np.array(found[path]))[rows] for path, rows in chosen.items()])
        )
    return np.stack(kept)


def _blocks(gradient: np.ndarray) -> np.ndarray:
    """The whole blocks of a tensor's rows; what is left of a row is dropped."""
    rows = gradient.reshape(-1, gradient.shape[-1])
    return rows[:, : rows.shape[1] // BLOCK * BLOCK].reshape(-1, BLOCK)
