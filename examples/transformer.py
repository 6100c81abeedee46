"""A small decoder-only transformer over characters, built from stock `mlx.nn` layers.

Pre-norm blocks as in GPT-2 and Llama. `train.py` trains it; `generate` draws text from it.
"""

import mlx.core as mx
import mlx.nn as nn


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
    """Token ids (batch, length), length <= context, to logits (batch, length, vocabulary)."""

    def __init__(self, vocabulary: int, context: int, dims: int, heads: int, layers: int):
        super().__init__()
        self.token = nn.Embedding(vocabulary, dims)
        self.position = nn.Embedding(context, dims)
        self.blocks = [Block(dims, heads) for _ in range(layers)]
        self.norm = nn.RMSNorm(dims)
        self.head = nn.Linear(dims, vocabulary)

    def __call__(self, tokens: mx.array) -> mx.array:
        length = tokens.shape[1]
        x = self.token(tokens) + self.position(mx.arange(length))
        mask = nn.MultiHeadAttention.create_additive_causal_mask(length, x.dtype)
        for block in self.blocks:
            x = block(x, mask)
        return self.head(self.norm(x))


def mean_loss(model: Transformer, inputs: mx.array, targets: mx.array) -> mx.array:
    """Cross entropy of the next token, in nats per token."""
    return nn.losses.cross_entropy(model(inputs), targets, reduction="mean")


def generate(
    model: Transformer, prompt: list[int], count: int, context: int, temperature: float
) -> list[int]:
    """`count` tokens to follow `prompt`, each drawn after a pass over the last `context`."""
    tokens = list(prompt)
    for _ in range(count):
        logits = model(mx.array([tokens[-context:]]))[0, -1]
        tokens.append(mx.random.categorical(logits / temperature).item())
    return tokens[len(prompt) :]
