"""The benchmark's cases: which tensors, in which dtype and layout. compare.py runs one.

buffers: one tensor of every size; models, lora: published models' parameters; many: hundreds of
small tensors; step: whole training steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import mlx.core as mx

from . import shapes
from .problem import Problem
from .shapes import ParameterShape
from .training import LanguageTask, LinearTask, Task

SIDES = [(25, 40), (250, 400), (1000, 1000), (2048, 2048), (4096, 4096)]
DTYPES = {"float32": mx.float32, "bfloat16": mx.bfloat16, "float16": mx.float16}


@dataclass(frozen=True)
class Case:
    suite: str
    name: str
    dtype: str
    # Of the gradients: "row-major", "column-major", or "autograd" where each has its own.
    layout: str
    tensors: list[ParameterShape] = field(repr=False)
    # A whole training step instead of an update.
    task: Task | None = field(default=None, repr=False)

    @property
    def size(self) -> int:
        return sum(tensor.size for tensor in self.tensors)

    @property
    def title(self) -> str:
        count = f"{len(self.tensors)} tensors, " if len(self.tensors) > 1 else ""
        elements = f"{count}{self.size:,} × {self.dtype}"
        return f"{self.suite}: {self.name} · {elements} · {self.layout} gradients"

    def problem(self) -> Problem:
        return Problem.random(self.tensors, DTYPES[self.dtype])


def buffers(quick: bool) -> Iterator[Case]:
    for dtype in ["float32", "bfloat16"] if quick else DTYPES:
        for column_major in (False, True):
            for rows, columns in SIDES[:2] if quick else SIDES:
                yield Case(
                    "buffers",
                    f"{rows}×{columns}",
                    dtype,
                    "column-major" if column_major else "row-major",
                    [ParameterShape("weight", (rows, columns), column_major)],
                )


def models(quick: bool) -> Iterator[Case]:
    if quick:
        tiny = shapes.SMOLLM_135M._replace(vocabulary=512, dims=64, feed_forward=128, layers=2)
        yield Case("models", "tiny Llama", "bfloat16", "autograd", shapes.llama(tiny))
        return
    yield Case("models", "GPT-2 124M", "float32", "autograd", shapes.gpt2())
    yield Case("models", "SmolLM-135M", "float32", "autograd", shapes.llama(shapes.SMOLLM_135M))
    yield Case("models", "SmolLM-135M", "bfloat16", "autograd", shapes.llama(shapes.SMOLLM_135M))
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


SUITES: dict[str, Callable[[bool], Iterator[Case]]] = {
    "buffers": buffers,
    "models": models,
    "lora": lora,
    "many": many,
    "step": step,
}
