"""A Llama-like language model of `mlx.nn` layers, for whole training steps; its parameters are `shapes.llama`'s."""

import mlx.core as mx
import mlx.nn as nn

from .shapes import LlamaSizes


class Attention(nn.Module):
    def __init__(self, sizes: LlamaSizes):
        super().__init__()
        self.sizes = sizes
        for name, (outputs, inputs) in sizes.linears("self_attn").items():
            setattr(self, name, nn.Linear(inputs, outputs, bias=sizes.has_bias(name)))
        self.rope = nn.RoPE(sizes.head_dims)

    def __call__(self, x: mx.array) -> mx.array:
        def heads(projected: mx.array) -> mx.array:
            return projected.reshape(*x.shape[:2], -1, self.sizes.head_dims).swapaxes(1, 2)

        queries, keys = self.rope(heads(self.q_proj(x))), self.rope(heads(self.k_proj(x)))
        scale = self.sizes.head_dims**-0.5
        mixed = mx.fast.scaled_dot_product_attention(queries, keys, heads(self.v_proj(x)), scale=scale, mask="causal")
        return self.o_proj(mixed.swapaxes(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, sizes: LlamaSizes):
        super().__init__()
        for name, (outputs, inputs) in sizes.linears("mlp").items():
            setattr(self, name, nn.Linear(inputs, outputs, bias=False))

    def __call__(self, x: mx.array) -> mx.array:
        return self.down_proj(nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, sizes: LlamaSizes):
        super().__init__()
        self.self_attn = Attention(sizes)
        self.mlp = FeedForward(sizes)
        self.input_layernorm = nn.RMSNorm(sizes.dims)
        self.post_attention_layernorm = nn.RMSNorm(sizes.dims)

    def __call__(self, x: mx.array) -> mx.array:
        x = x + self.self_attn(self.input_layernorm(x))
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """Token numbers (batch, length) to logits (batch, length, vocabulary)."""

    def __init__(self, sizes: LlamaSizes):
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocabulary, sizes.dims)
        self.layers = [Block(sizes) for _ in range(sizes.layers)]
        self.norm = nn.RMSNorm(sizes.dims)

    def __call__(self, tokens: mx.array) -> mx.array:
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x)
        return self.embed_tokens.as_linear(self.norm(x))
