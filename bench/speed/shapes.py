"""The parameter tensors of published models, by the shapes in their released configurations.

Each shape says how MLX's autograd lays out its gradient: `nn.Linear` weights column-major (strides
(1, rows)), nearly all else row-major. `cases.py` builds benchmark cases from these lists.
"""

from typing import NamedTuple


class ParameterShape(NamedTuple):
    path: str
    shape: tuple[int, ...]
    column_major: bool = False
    # The gradient's axes in memory, outermost first (default: in order, or reversed where it is column-major), those
    # that run backwards, and its innermost stride.
    axes: tuple[int, ...] = ()
    flipped: tuple[int, ...] = ()
    spread: int = 1

    @property
    def memory_order(self) -> tuple[int, ...]:
        in_order = tuple(range(len(self.shape)))
        return self.axes or (in_order[::-1] if self.column_major else in_order)

    @property
    def size(self) -> int:
        product = 1
        for length in self.shape:
            product *= length
        return product


class LlamaSizes(NamedTuple):
    """The numbers that determine the shapes of a Llama-like model (Llama, SmolLM, Qwen)."""

    vocabulary: int
    dims: int
    feed_forward: int
    layers: int
    heads: int
    kv_heads: int
    head_dims: int
    attention_bias: bool = False

    def linears(self, part: str) -> dict[str, tuple[int, int]]:
        """Name to (outputs, inputs) of the linear layers in a block's `self_attn` or `mlp`."""
        query, key = self.heads * self.head_dims, self.kv_heads * self.head_dims
        parts = {
            "self_attn": {
                "q_proj": (query, self.dims),
                "k_proj": (key, self.dims),
                "v_proj": (key, self.dims),
                "o_proj": (self.dims, query),
            },
            "mlp": {
                "gate_proj": (self.feed_forward, self.dims),
                "up_proj": (self.feed_forward, self.dims),
                "down_proj": (self.dims, self.feed_forward),
            },
        }
        return parts[part]

    def all_linears(self) -> dict[str, tuple[int, int]]:
        """All linear layers of a block, by path."""
        return {f"{part}.{name}": shape for part in ("self_attn", "mlp") for name, shape in self.linears(part).items()}

    def has_bias(self, name: str) -> bool:
        return self.attention_bias and name in ("q_proj", "k_proj", "v_proj")


# Unpublished: whole steps of these are quick enough on a CPU.
LLAMA_4M = LlamaSizes(2048, 256, 704, 4, 4, 4, 64)
LLAMA_21M = LlamaSizes(8192, 384, 1024, 10, 6, 6, 64)

SMOLLM_135M = LlamaSizes(49152, 576, 1536, 30, 9, 3, 64)
QWEN2_5_500M = LlamaSizes(151936, 896, 4864, 24, 14, 2, 64, attention_bias=True)
LLAMA3_2_1B = LlamaSizes(128256, 2048, 8192, 16, 32, 8, 64)


def linear(path: str, outputs: int, inputs: int, bias: bool = False) -> list[ParameterShape]:
    weight = ParameterShape(f"{path}.weight", (outputs, inputs), column_major=True)
    return [weight, ParameterShape(f"{path}.bias", (outputs,))] if bias else [weight]


def llama(model: LlamaSizes) -> list[ParameterShape]:
    """All parameters; the output layer shares the embedding, as in each of the models above."""
    tensors = [ParameterShape("embed_tokens.weight", (model.vocabulary, model.dims))]
    for i in range(model.layers):
        block = f"layers.{i}"
        for name, (outputs, inputs) in model.all_linears().items():
            bias = model.has_bias(name.rpartition(".")[2])
            tensors += linear(f"{block}.{name}", outputs, inputs, bias)
        tensors.append(ParameterShape(f"{block}.input_layernorm.weight", (model.dims,)))
        tensors.append(ParameterShape(f"{block}.post_attention_layernorm.weight", (model.dims,)))
    return [*tensors, ParameterShape("norm.weight", (model.dims,))]


def lora(model: LlamaSizes, rank: int) -> list[ParameterShape]:
    """Adapters on every linear layer: x @ a @ b as in mlx-lm, with row-major gradients."""
    return [
        tensor
        for i in range(model.layers)
        for name, (outputs, inputs) in model.all_linears().items()
        for tensor in (
            ParameterShape(f"layers.{i}.{name}.lora_a", (inputs, rank)),
            ParameterShape(f"layers.{i}.{name}.lora_b", (rank, outputs)),
        )
    ]


def gpt2(vocabulary: int = 50257, dims: int = 768, layers: int = 12, context: int = 1024) -> list[ParameterShape]:
    tensors = [
        ParameterShape("wte.weight", (vocabulary, dims)),
        ParameterShape("wpe.weight", (context, dims)),
    ]

    def norm(path: str) -> list[ParameterShape]:
        return [ParameterShape(f"{path}.weight", (dims,)), ParameterShape(f"{path}.bias", (dims,))]

    for i in range(layers):
        block = f"h.{i}"
        tensors += norm(f"{block}.ln_1") + norm(f"{block}.ln_2")
        tensors += linear(f"{block}.attn.c_attn", 3 * dims, dims, bias=True)
        tensors += linear(f"{block}.attn.c_proj", dims, dims, bias=True)
        tensors += linear(f"{block}.mlp.c_fc", 4 * dims, dims, bias=True)
        tensors += linear(f"{block}.mlp.c_proj", dims, 4 * dims, bias=True)
    return tensors + norm("ln_f")
