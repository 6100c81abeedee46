"""Which options fit a model of so many parameters: bytes of weights and state, and a training step's peak memory.

Use: python -m mlx_fused_adam plan 7B --memory 32. The state's bytes are those of a fresh one; gradients are counted as
an update releases them. The tables of docs/options.md and docs/scale.md are computed here too (bench/tables/plan.py).
"""

from __future__ import annotations

import argparse
import math
import os
from typing import Any, NamedTuple

import mlx.core as mx

from .. import _state
from .._options import Options


class Choice(NamedTuple):
    """A dtype of parameters, and options that store them and their state."""

    dtype: str
    options: dict[str, Any]

    def call(self, ranks: int = 1) -> str:
        """The constructor call to paste."""
        given = [f'{name}="{x}"' if isinstance(x, str) else f"{name}={x}" for name, x in self.options.items()]
        group = ["shard_group=group"] if ranks > 1 else []
        return f"fused.AdamW({', '.join(['1e-5', *given, *group])})"

    @property
    def weight(self) -> float:
        """Bytes of a parameter, and of its gradient."""
        return float(getattr(mx, self.dtype).size)

    @property
    def state(self) -> float:
        """Bytes of a parameter's state, beside which that of small tensors does not count."""
        parameter = mx.zeros((1024, 1024), getattr(mx, self.dtype))  # lazy, as its state is: neither is allocated
        state = _state.fresh(parameter, Options("AdamW", **self.options))
        return sum(x.nbytes for x in state.values()) / parameter.size

    @property
    def stored(self) -> float:
        return self.weight + self.state


# From the most exact to the smallest; of equal bytes, the one with smaller gradients comes later.
CHOICES = [
    Choice("float32", {}),
    Choice("bfloat16", {"master_weights": True, "state_dtype": "float32"}),
    Choice("float32", {"state_dtype": "bfloat16"}),
    Choice("bfloat16", {"master_weights": True}),
    Choice("float32", {"state_dtype": "int8"}),
    Choice("bfloat16", {"master_weights": True, "state_dtype": "int8"}),
    Choice("bfloat16", {}),
    Choice("bfloat16", {"master_weights": True, "master_weight_bits": 24, "state_dtype": "int8"}),
    Choice("bfloat16", {"state_dtype": "int8"}),
    Choice("bfloat16", {"master_weights": True, "master_weight_bits": 24, "state_dtype": "int4"}),
    Choice("bfloat16", {"state_dtype": "int4"}),
]


class Model(NamedTuple):
    parameters: float
    largest: float  # elements of the largest tensor
    blocks: int  # of a transformer


# Published shapes, from which those of other sizes are estimated. The largest tensor is the embedding.
MODELS = {
    "SmolLM-135M": Model(134_515_008, 49152 * 576, 30),
    "Qwen2.5-0.5B": Model(494_032_768, 151936 * 896, 24),
    "Llama-3.2-1B": Model(1_235_814_400, 128256 * 2048, 16),
    "Llama-3.2-3B": Model(3_212_749_824, 128256 * 3072, 28),
    "Qwen2.5-7B": Model(7_615_616_512, 152064 * 3584, 28),
    "Llama-3.1-8B": Model(8_030_261_248, 128256 * 4096, 32),
    "Qwen2.5-14B": Model(14_770_033_664, 152064 * 5120, 48),
    "Qwen2.5-32B": Model(32_763_876_352, 152064 * 5120, 64),
    "Llama-3.1-70B": Model(70_553_706_496, 128256 * 8192, 80),
    "Llama-3.1-405B": Model(405_853_388_800, 128256 * 16384, 126),
}
USABLE = 0.75  # of a Mac's memory: macOS lets the GPU use two thirds to five sixths
GATHERED = 2  # bytes of a parameter in nn.fully_shard's compute_dtype, bfloat16
UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}
THUNDERBOLT_5 = 10e9  # bytes a second


def nearest(parameters: float) -> str:
    """The published model whose size is the nearest."""
    return min(MODELS, key=lambda name: abs(math.log(MODELS[name].parameters / parameters)))


def model_of(parameters: float, largest: float | None = None) -> Model:
    """A model with the proportions of the nearest published one."""
    like = MODELS[nearest(parameters)]
    return Model(parameters, largest or parameters * like.largest / like.parameters, like.blocks)


def peaks(choice: Choice, model: Model, ranks: int = 1) -> tuple[float, float]:
    """Bytes of weights, state and gradients at a training step's peak, in two cases; activations come on top.

    Of the gradients two of the largest tensor's size live at once, since each is used before the next is made; with
    ``max_grad_norm`` or ``skip_nonfinite`` (the second case), all.

    Each of several ``ranks`` holds its part by ``nn.fully_shard``; a block's gradient, before it is scattered; and all
    parameters, since MLX keeps what the forward pass gathers until the backward pass, or, where they are gathered again
    (the second case), one block's.
    """
    if ranks == 1:
        stored = model.parameters * choice.stored
        largest = 2 * min(model.parameters / 2, model.largest)
        return stored + largest * choice.weight, stored + model.parameters * choice.weight
    whole = model.parameters * GATHERED
    block = whole / model.blocks
    shard = model.parameters * (choice.stored + choice.weight) / ranks
    return shard + block + whole, shard + block + block


def fitting(model: Model, memory: float, ranks: int = 1) -> tuple[Choice | None, Choice | None]:
    """The most exact choice that fits, in each of the two cases."""
    first, second = (
        next((choice for choice in CHOICES if peaks(choice, model, ranks)[case] <= memory), None) for case in (0, 1)
    )
    return first, second


def sent_bytes(parameters: float, ranks: int) -> float:
    """Bytes that each rank of a ring sends in a fully sharded step: parameters are gathered, gradients scattered."""
    return 2 * GATHERED * parameters * (ranks - 1) / ranks


def usable(gigabytes: float) -> float:
    """Bytes that arrays can take on a Mac of so much memory, which is sold in powers of two."""
    return USABLE * gigabytes * 2**30


def memory_of_this_machine() -> tuple[float, str]:
    """Bytes that arrays can take, and where the number comes from."""
    info = mx.device_info()
    if limit := info.get("max_recommended_working_set_size"):
        return float(limit), f"what macOS lets {info.get('device_name', 'the GPU')} use"
    gigabytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return usable(gigabytes), f"three quarters of this machine's {gigabytes:.3g} GB"


def as_count(text: str) -> float:
    """A number of parameters: 7e9, 7B, 1.2B, 135M."""
    unit = text[-1:].lower() if text[-1:].isalpha() else ""
    digits = text[: len(text) - len(unit)]
    return _number(digits, UNITS.get(unit, 0), f"a number such as 7e9, 7B or 135M but got {text!r}")


def as_gigabytes(text: str) -> float:
    return _number(text, 1, f"a Mac's memory in GB, such as 32, but got {text!r}")


def _number(digits: str, unit: float, must_be: str) -> float:
    try:
        number = float(digits.replace(",", "")) * unit
    except ValueError:
        number = 0.0
    if not 1 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be {must_be}")
    return number


def as_ranks(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a number of machines such as 4 but got {text!r}")
    return int(text)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("parameters", type=as_count, metavar="PARAMETERS", help="of the model: 7e9, 7B, 135M")
    parser.add_argument("--memory", type=as_gigabytes, metavar="GB", help="of the Mac; default: this machine's")
    parser.add_argument("--largest", type=as_count, metavar="ELEMENTS", help="of the largest tensor; or estimated")
    parser.add_argument("--fully-sharded", type=as_ranks, metavar="N", default=1, help="machines that share the model")


def main(arguments: argparse.Namespace) -> int:
    model, ranks = model_of(arguments.parameters, arguments.largest), arguments.fully_sharded
    if arguments.memory:
        memory, source = usable(arguments.memory), f"three quarters of {arguments.memory:g} GB"
    else:
        memory, source = memory_of_this_machine()
    origin = "as asked" if arguments.largest else f"in proportion to {nearest(model.parameters)}"
    print(f"{count_text(model.parameters)} parameters, {count_text(model.largest)} in the largest tensor ({origin})")
    print(f"{memory / 1e9:.1f} GB for arrays{' of each machine' if ranks > 1 else ''}: {source}\n")
    print(as_text(model, memory, ranks))
    return 0


def as_text(model: Model, memory: float, ranks: int = 1) -> str:
    """The table, what its columns mean, and the most exact choice that fits."""
    names = ("peak", "clipped") if ranks == 1 else ("peak", "again")
    lines = [f"{'weights + state, B/param':24}  {names[0]:>8} fits  {names[1]:>8} fits  parameters  optimizer"]
    for choice in CHOICES:
        stored = f"{choice.weight:g} + {choice.state:<6g} = {choice.stored:g}"
        cells = [f"{x / 1e9:8.1f} {'yes' if x <= memory else 'no':4}" for x in peaks(choice, model, ranks)]
        lines.append(f"{stored:24}  {'  '.join(cells)}  {choice.dtype:10}  {choice.call(ranks)}")
    if ranks == 1:
        lines += [
            "",
            "peak: GB of weights, state and two gradients of the largest tensor; activations come on top",
            "clipped: with max_grad_norm or skip_nonfinite, which need all gradients at once",
        ]
    else:
        sent = sent_bytes(model.parameters, ranks)
        lines += [
            "",
            f"peak: GB on each of {ranks} machines, with all parameters gathered; activations come on top",
            "again: with blocks gathered again in the backward pass (docs/scale.md)",
            f"Each sends {sent / 1e9:.1f} GB a step: at least {sent / THUNDERBOLT_5:.1f} s over Thunderbolt 5.",
        ]
    first, second = fitting(model, memory, ranks)

    def told(choice: Choice, case: int) -> str:
        left = memory - peaks(choice, model, ranks)[case]
        if case == 1:
            choice = choice._replace(options={**choice.options, "max_grad_norm": 1.0})
        setting = ", after model.set_dtype(mx.bfloat16)" if choice.dtype == "bfloat16" else ""
        return f"{choice.call(ranks)}{setting}; {left / 1e9:.1f} GB left for activations"

    if first:
        lines.append(f"Most exact that fits: {told(first, 0)}.")
        if ranks == 1:
            lines.append(f"Most exact that fits clipped: {told(second, 1) if second else 'none'}.")
    elif second:
        lines.append("None fits unless blocks are gathered again.")
    else:
        lines.append("None fits: train LoRA adapters, or share the model between machines (--fully-sharded N).")
    return "\n".join(lines)


def count_text(parameters: float) -> str:
    scale, name = (1e9, "billion") if parameters >= 1e9 else (1e6, "million")
    return f"{parameters / scale:.3g} {name}"
