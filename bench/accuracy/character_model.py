"""A small character-level transformer, and its texts: prose of Python's language reference, and code of its library."""

import asyncio
import textwrap
from pathlib import Path
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers


class Sizes(NamedTuple):
    dims: int = 96
    heads: int = 4
    layers: int = 2
    context: int = 64


class Block(nn.Module):
    def __init__(self, dims: int, heads: int):
        super().__init__()
        self.attention_norm = nn.RMSNorm(dims)
        self.attention = nn.MultiHeadAttention(dims, heads)
        self.feed_forward_norm = nn.RMSNorm(dims)
        self.up = nn.Linear(dims, 4 * dims)
        self.down = nn.Linear(4 * dims, dims)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        y = self.attention_norm(x)
        x = x + self.attention(y, y, y, mask)
        return x + self.down(nn.relu(self.up(self.feed_forward_norm(x))))


class Transformer(nn.Module):
    """Token ids (batch, length) to logits (batch, length, vocabulary)."""

    def __init__(self, vocabulary: int, sizes: Sizes):
        super().__init__()
        self.token = nn.Embedding(vocabulary, sizes.dims)
        self.position = nn.Embedding(sizes.context, sizes.dims)
        self.blocks = [Block(sizes.dims, sizes.heads) for _ in range(sizes.layers)]
        self.norm = nn.RMSNorm(sizes.dims)
        self.head = nn.Linear(sizes.dims, vocabulary)

    def __call__(self, tokens: mx.array) -> mx.array:
        length = tokens.shape[1]
        x = self.token(tokens) + self.position(mx.arange(length))
        mask = nn.MultiHeadAttention.create_additive_causal_mask(length, x.dtype)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


class Text:
    """Characters as ids, the last tenth held out; batches of (inputs, targets) one character apart."""

    def __init__(self, context: int, name: str = "prose"):
        text = prose = _prose()
        self.context = context
        characters = sorted(set(prose))
        self.vocabulary = len(characters)
        ids = {character: i for i, character in enumerate(characters)}
        if name == "code":
            files = sorted(Path(asyncio.__file__).parent.glob("*.py"))
            text = "".join(c for file in files for c in file.read_text(encoding="utf-8") if c in ids)
        tokens = mx.array([ids[character] for character in text], mx.uint32)
        held_out = len(text) // 10
        self.train, self.held_out = tokens[:-held_out], tokens[-held_out:]

    def batch(self, tokens: mx.array, size: int) -> tuple[mx.array, mx.array]:
        starts = mx.random.randint(0, tokens.size - self.context, (size, 1))
        windows = tokens[starts + mx.arange(self.context + 1)]
        return windows[:, :-1], windows[:, 1:]


def _prose() -> str:
    from pydoc_data.topics import topics

    paragraphs = (textwrap.dedent(p) for topic in topics.values() for p in topic.split("\n\n"))
    return "\n\n".join(p for p in paragraphs if _is_prose(p))


def _is_prose(paragraph: str) -> bool:
    """True for sentences; False for code, grammar and tables."""
    letters = sum(c.isalpha() or c.isspace() for c in paragraph)
    return paragraph[:1].isupper() and paragraph.count(" ") >= 5 and letters > 0.85 * len(paragraph)


def mean_loss(model: nn.Module, inputs: mx.array, targets: mx.array) -> mx.array:
    """Cross entropy of the next character, in nats; in float32, since bfloat16 would give it three digits."""
    logits = model(inputs).astype(mx.float32)
    return nn.losses.cross_entropy(logits, targets, reduction="mean")


def learning_rate_schedule(peak: float, steps: int) -> object:
    """Linear warm-up over the first twentieth, then a cosine down to a tenth."""
    warm_up = max(1, steps // 20)
    schedules = [
        mlx.optimizers.linear_schedule(peak / 10, peak, warm_up),
        mlx.optimizers.cosine_decay(peak, max(1, steps - warm_up), end=peak / 10),
    ]
    return mlx.optimizers.join_schedules(schedules, [warm_up])
