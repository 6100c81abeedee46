"""The cases of bench/run.py: tensors, their dtype and the layout of their gradients.

buffers: one tensor of every size; models, lora: published models' parameters; many: hundreds of
small tensors; layouts: gradients as many kinds of layers make them; growth: from little to much, with
one thread and with more; step: whole training steps; memory: the peak memory of one of a published
model, not timed.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx

from ..tables import names
from . import shapes
from .problem import Problem
from .shapes import ParameterShape
from .training import LanguageTask, LinearTask, Task

TINY_LLAMA = shapes.SMOLLM_135M._replace(vocabulary=512, dims=64, feed_forward=128, layers=2)
OPTIONS_FROM = 1_000_000  # elements of a buffer
SIDES = [(25, 40), (250, 400), (1000, 1000), (2048, 2048), (4096, 4096)]
GROWTH_THREADS = (1, 2, 8)
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}
OPTIONS_OF = {"float32": names.OF_FLOAT32, "bfloat16": names.OF_BFLOAT16}
TIMED_OPTIONS_OF = {dtype: (*OPTIONS_OF.get(dtype, ()), names.CLIPPING) for dtype in ("float32", "bfloat16", "float16")}


@dataclass(frozen=True)
class Case:
    suite: str
    name: str
    dtype: str
    layout: str  # of the gradients: "autograd" where each has its own
    tensors: list[ParameterShape] = field(repr=False)
    # A whole training step instead of an update.
    task: Task | None = field(default=None, repr=False)
    options: tuple[str, ...] = ()  # of fused, that also take part
    threads: tuple[int, ...] = ()  # numbers of them, with which fused also takes part
    is_timed: bool = True  # or else only its memory is measured

    @property
    def size(self) -> int:
        return sum(tensor.size for tensor in self.tensors)

    @property
    def title(self) -> str:
        count = f"{len(self.tensors)} tensors, " if len(self.tensors) > 1 else ""
        elements = f"{count}{self.size:,} × {self.dtype}"
        return f"{self.suite}: {self.name} · {elements} · {self.layout} gradients"

    def described(self, results: dict[str, Any]) -> dict[str, Any]:
        """The case in the JSON file."""
        return {
            "suite": self.suite,
            "case": self.name,
            "dtype": self.dtype,
            "gradient_layout": self.layout,
            "tensors": len(self.tensors),
            "parameters": self.size,
            "title": self.title,
            "is_training_step": self.task is not None,
            "implementations": results,
        }

    def problem(self) -> Problem:
        return Problem.random(self.tensors, DTYPES[self.dtype])


def buffers(quick: bool) -> Iterator[Case]:
    for dtype in ["float32", "bfloat16"] if quick else DTYPES:
        for column_major in (False, True):
            for rows, columns in SIDES[:2] if quick else SIDES:
                is_large = rows * columns >= (SIDES[1][0] * SIDES[1][1] if quick else OPTIONS_FROM)
                yield Case(
                    "buffers",
                    f"{rows}×{columns}",
                    dtype,
                    "column-major" if column_major else "row-major",
                    [ParameterShape("weight", (rows, columns), column_major)],
                    options=TIMED_OPTIONS_OF[dtype] if is_large else (),
                )


def models(quick: bool) -> Iterator[Case]:
    """Qwen2.5 without options: with all their states it would not fit into 24 GB."""
    fp32 = (*names.OF_FLOAT32, names.INT4_STATE, names.CLIPPING)
    bf16 = (*names.ALL_OF_BFLOAT16, names.CLIPPING)
    gpt2, smollm = shapes.gpt2, lambda: shapes.llama(shapes.SMOLLM_135M)
    if quick:
        tiny = shapes.llama(TINY_LLAMA)
        yield Case("models", "tiny Llama", "bfloat16", "autograd", tiny, options=bf16)
        return
    yield Case("models", "GPT-2 124M", "float32", "autograd", gpt2(), options=fp32)
    yield Case("models", "SmolLM-135M", "float32", "autograd", smollm(), options=fp32)
    yield Case("models", "SmolLM-135M", "bfloat16", "autograd", smollm(), options=bf16)
    yield Case("models", "Qwen2.5-0.5B", "bfloat16", "autograd", shapes.llama(shapes.QWEN2_5_500M))


def lora(quick: bool) -> Iterator[Case]:
    model = shapes.LLAMA3_2_1B._replace(layers=1) if quick else shapes.LLAMA3_2_1B
    for dtype in ("float32", "bfloat16"):
        yield Case("lora", "Llama-3.2-1B rank 8", dtype, "autograd", shapes.lora(model, rank=8))


def many(quick: bool) -> Iterator[Case]:
    count = 30 if quick else 300
    for dtype in ("float32", "bfloat16"):
        tensors = [ParameterShape(f"tensors.{i}", (1000,)) for i in range(count)]
        yield Case("many", f"{count}×1000", dtype, "row-major", tensors)


def layouts(quick: bool) -> Iterator[Case]:
    """Large matrices, narrow ones, and the layouts that layers other than nn.Linear make."""

    def matrix(rows: int, columns: int) -> dict[str, ParameterShape]:
        shape = (rows, columns)
        return {
            "row-major": ParameterShape("weight", shape),
            "column-major": ParameterShape("weight", shape, column_major=True),
        }

    def other(layout: str, *shape: int, **gradient: Any) -> dict[str, ParameterShape]:
        return {layout: ParameterShape("weight", shape, **gradient)}

    some: dict[str, dict[str, ParameterShape]] = {
        "every second": other("scattered", *((30, 40) if quick else (2048, 1024)), spread=2),
        "ConvTranspose2d": other(
            "permuted, flipped",
            *((4, 3, 3, 8) if quick else (512, 3, 3, 512)),
            axes=(3, 1, 2, 0),
            flipped=(1, 2),
        ),
    }
    if not quick:
        some |= {
            "5120×5120": matrix(5120, 5120),
            "head 49152×576": matrix(49152, 576),
            "tall 131072×16": matrix(131072, 16),
            "wide 16×131072": matrix(16, 131072),
            "Conv2d": other("row-major", 512, 3, 3, 512),
            "Bilinear": other("permuted", 128, 128, 128, axes=(2, 0, 1)),
            "experts 8×1024×512": other("row-major", 8, 1024, 512),
            "experts 8×1024×512, transposed": other("permuted", 8, 1024, 512, axes=(0, 2, 1)),
        }
    for name, tensors in some.items():
        for dtype in ("float32", "bfloat16"):
            for layout, tensor in tensors.items():
                yield Case("layouts", name, dtype, layout, [tensor])


def growth(quick: bool) -> Iterator[Case]:
    """Float32, row-major: one tensor of more and more elements, and more and more tensors of 1000."""
    for elements in (1000, 30_000) if quick else [10**k for k in range(3, 9)]:
        tensor = ParameterShape("weight", (elements,))
        name = f"1 tensor of {elements:,}"
        yield Case("growth", name, "float32", "row-major", [tensor], threads=GROWTH_THREADS)
    for count in (3, 5) if quick else [10**k for k in range(1, 4)]:
        tensors = [ParameterShape(f"tensors.{i}", (1000,)) for i in range(count)]
        name = f"{count} tensors of 1,000"
        yield Case("growth", name, "float32", "row-major", tensors, threads=GROWTH_THREADS)


def step(quick: bool) -> Iterator[Case]:
    if quick:
        sizes = shapes.LlamaSizes(64, 32, 64, 1, 2, 2, 16)
        tasks: dict[str, Task] = {
            "tiny Llama-like, 2 × 16 tokens": LanguageTask(sizes, 2, 16),
            "2 × Linear(64), batch 2": LinearTask(2, 64, 2),
        }
    else:
        tasks = {
            "8 × Linear(1024), batch 8": LinearTask(8, 1024, 8),
            "8 × Linear(1024), batch 1": LinearTask(8, 1024, 1),
            "Llama-like 21M, 16 tokens": LanguageTask(shapes.LLAMA_21M, 1, 16),
            "Llama-like 4M, 2 × 64 tokens": LanguageTask(shapes.LLAMA_4M, 2, 64),
        }
    for name, task in tasks.items():
        yield Case("step", name, "float32", "autograd", task.shapes(), task)


def memory(quick: bool) -> Iterator[Case]:
    name, sizes = ("tiny Llama", TINY_LLAMA) if quick else ("SmolLM-135M", shapes.SMOLLM_135M)
    for dtype in ["bfloat16"] if quick else ["bfloat16", "float32"]:
        task = LanguageTask(sizes, 1, 16, dtype)
        tensors = shapes.llama(sizes)
        yield Case(
            "memory",
            f"{name}, 16 tokens",
            dtype,
            "autograd",
            tensors,
            task,
            OPTIONS_OF[dtype],
            is_timed=False,
        )


SUITES: dict[str, Callable[[bool], Iterator[Case]]] = {
    "buffers": buffers,
    "models": models,
    "lora": lora,
    "many": many,
    "layouts": layouts,
    "growth": growth,
    "step": step,
    "memory": memory,
}
