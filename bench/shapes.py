"""The parameter tensors of published models, by the shapes in their released configurations.

Each tensor says how MLX's autograd lays out its gradient: `nn.Linear` weights column-major (strides
(1, rows)), all else row-major. `suites.py` builds benchmark cases from these lists.
"""

from typing import NamedTuple


class Tensor(NamedTuple):
    path: str
    shape: tuple[int, ...]
    column_major: bool = False

    @property
    def size(self) -> int:
        product = 1
        for length in self.shape:
            product *= length
        return product


class Llama(NamedTuple):
    """What decides the shapes of a Llama-like model (Llama, SmolLM, Qwen)."""

    vocabulary: int
    dims: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_dims: int
    attention_bias: bool = False

    def linears(self) -> dict[str, tuple[int, int]]:
        """Name to (outputs, inputs) of a block's linear layers."""
        query, key = self.heads * self.head_dims, self.kv_heads * self.head_dims
        return {
            "self_attn.q_proj": (query, self.dims),
            "self_attn.k_proj": (key, self.dims),
            "self_attn.v_proj": (key, self.dims),
            "self_attn.o_proj": (self.dims, query),
            "mlp.gate_proj": (self.feed_forward, self.dims),
            "mlp.up_proj": (self.feed_forward, self.dims),
            "mlp.down_proj": (self.dims, self.feed_forward),
        }


SMOLLM_135M = Llama(49152, 576, 1536, 30, 9, 3, 64)
QWEN2_5_500M = Llama(151936, 896, 4864, 24, 14, 2, 64, attention_bias=True)
LLAMA3_2_1B = Llama(128256, 2048, 8192, 16, 32, 8, 64)


def linear(path: str, outputs: int, inputs: int, bias: bool = False) -> list[Tensor]:
    weight = Tensor(f"{path}.weight", (outputs, inputs), column_major=True)
    return [weight, Tensor(f"{path}.bias", (outputs,))] if bias else [weight]


def llama(model: Llama) -> list[Tensor]:
    """All parameters; the output layer shares the embedding, as in each of the models above."""
    tensors = [Tensor("embed_tokens.weight", (model.vocabulary, model.dims))]
    for i in range(model.layers):
        block = f"layers.{i}"
        for name, (outputs, inputs) in model.linears().items():
            bias = model.attention_bias and name[-6:] in ("q_proj", "k_proj", "v_proj")
            tensors += linear(f"{block}.{name}", outputs, inputs, bias)
        tensors.append(Tensor(f"{block}.input_layernorm.weight", (model.dims,)))
        tensors.append(Tensor(f"{block}.post_attention_layernorm.weight", (model.dims,)))
    return [*tensors, Tensor("norm.weight", (model.dims,))]


def lora(model: Llama, rank: int) -> list[Tensor]:
    """Adapters on every linear layer: x @ a @ b as in mlx-lm, with row-major gradients."""
    return [
        tensor
        for i in range(model.layers)
        for name, (outputs, inputs) in model.linears().items()
        for tensor in (
            Tensor(f"layers.{i}.{name}.lora_a", (inputs, rank)),
            Tensor(f"layers.{i}.{name}.lora_b", (rank, outputs)),
        )
    ]


def gpt2(
    vocabulary: int = 50257, dims: int = 768, layers: int = 12, context: int = 1024
) -> list[Tensor]:
    tensors = [Tensor("wte.weight", (vocabulary, dims)), Tensor("wpe.weight", (context, dims))]

    def norm(path: str) -> list[Tensor]:
        return [Tensor(f"{path}.weight", (dims,)), Tensor(f"{path}.bias", (dims,))]

    for i in range(layers):
        block = f"h.{i}"
        tensors += norm(f"{block}.ln_1") + norm(f"{block}.ln_2")
        tensors += linear(f"{block}.attn.c_attn", 3 * dims, dims, bias=True)
        tensors += linear(f"{block}.attn.c_proj", dims, dims, bias=True)
        tensors += linear(f"{block}.mlp.c_fc", 4 * dims, dims, bias=True)
        tensors += linear(f"{block}.mlp.c_proj", dims, 4 * dims, bias=True)
    return tensors + norm("ln_f")
