"""Times of the project's shader on an NVIDIA GPU, beside a copy of as many bytes and torch's fused AdamW; for run.py.

The shader's text is the one that Macs run, so its coalescing, branches and registers are what is timed; a Mac's GPU is
not. run.py --time writes times.json here, from which docs/metal.md has its table.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import cuda_cases as cases

RESULTS = Path(__file__).with_name("times.json")
COLUMNS = 4096
ROWS = {"16M": 4096, "100M": 24576}
REPETITIONS = 20
SHARED = cases.SHARED
BLOCK = 32  # elements that share a scale

# Types of parameter, gradient and state as the shader names them; torch's counterpart.
FORMATS = {
    "float32": ("float", "float", "float"),
    "bfloat16": ("bfloat", "bfloat", "bfloat"),
    "bfloat16, state float32": ("bfloat", "bfloat", "float"),
    "bfloat16 with correction": ("BfloatCorrection<short>", "bfloat", "bfloat"),
    "float32, state 8 bits": ("float", "float", "QuantizedState<8>"),
    "bfloat16, state 8 bits": ("bfloat", "bfloat", "QuantizedState<8>"),
    "bfloat16, state 4 bits": ("bfloat", "bfloat", "QuantizedState<4>"),
}
TORCH = {"float32": "float32", "bfloat16": "bfloat16"}
STATE_BITS = {"QuantizedState<8>": 8, "QuantizedState<4>": 4}


@dataclass
class Buffer:
    """Of device memory: filled with `values`, or with any bytes; or the memory of an earlier one."""

    index: int
    size: int
    use: str  # as in cuda_cases
    values: np.ndarray | None = None
    same_as: int | None = None  # its index


@dataclass
class Case:
    name: str  # of the kernel
    kernel: str
    buffers: list[Buffer]
    grid: tuple[int, int, int]
    group: tuple[int, int, int]
    bytes: int  # that must move


def case(kernel: str, types: tuple[str, str, str], rows: int, columns: int = COLUMNS) -> Case:
    """A matrix, updated in place by adam_linear, or by adam_tiled with a column-major gradient."""
    parameter, gradient, state = types
    bits = STATE_BITS.get(state)
    blocks = rows * -(-columns // BLOCK)
    elements = rows * columns
    moment = rows * -(-columns * bits // 8) if bits else elements * cases.BYTES[state]
    sizes = {"Parameter": elements * cases.BYTES[parameter], "M": moment, "V": moment}
    if parameter == "BfloatCorrection<short>":
        sizes["Correction"] = 2 * elements
    if bits:
        sizes["MScale"] = sizes["VScale"] = 2 * blocks
    unused = 4
    buffers = [Buffer(SHARED["kGradient"], elements * cases.BYTES[gradient], "input")]
    for name in ("Parameter", "M", "V", "Correction", "MScale", "VScale"):
        index, new = SHARED[f"k{name}"], SHARED[f"kNew{name}"]
        use = "both" if name in sizes else "input"
        buffers.append(Buffer(index, sizes.get(name, unused), use))
        buffers.append(Buffer(new, sizes.get(name, unused), use, same_as=index))

    def constant(index: int, values: np.ndarray, use: str) -> None:
        buffers.append(Buffer(index, values.nbytes, use, values))

    constant(SHARED["kScalars"], cases.SCALARS, "input")
    constant(SHARED["kStep"], np.ones(1, np.uint32), "input")
    run = cases.run_length(types)
    strip = SHARED["kStripTiles"] if bits else 1
    threads = blocks * (BLOCK // run) if bits else -(-elements // run)
    if kernel == "adam_linear":
        constant(
            *cases.arguments("LinearArgs", row_length=columns if bits else elements, vectors=cases.ALL_VECTORS)[:2],
            "bytes",
        )
        grid, group = (threads, 1, 1), (min(threads, SHARED["kThreads"]), 1, 1)
    else:
        fields = {"rows": rows, "columns": columns, "axes": 0, "vectors": cases.ALL_VECTORS, "strip": strip}
        constant(*cases.arguments("TiledArgs", **fields)[:2], "bytes")
        for index, values in (("kShape", [0]), ("kParameterStrides", [columns, 1]), ("kGradientStrides", [rows])):
            constant(SHARED[index], np.array(values, np.int64), "bytes")
        height, width = cases.tile_sides(types)
        grid = (-(-columns // (width * strip)) * SHARED["kThreads"], -(-rows // height), 1)
        group = (SHARED["kThreads"], 1, 1)
    return Case(f"{kernel}<{', '.join(types)}>", kernel, buffers, grid, group,
                2 * sum(sizes.values()) + buffers[0].size)  # fmt: skip


Timer = Callable[[Case], list[float]]  # milliseconds


def measured(time_kernel: Timer, time_copy: Callable[[int], list[float]], card: str) -> dict[str, Any]:
    """Medians, as JSON takes them. A copy moves as many bytes as an update: half of them in, half out."""
    rows = []
    for size, count in ROWS.items():
        for name, types in FORMATS.items():
            for kernel in ("adam_linear", "adam_tiled"):
                update = case(kernel, types, count)
                milliseconds = statistics.median(time_kernel(update))
                copy = statistics.median(time_copy(update.bytes // 2))
                rows.append({"kernel": kernel, "format": name, "size": size, "elements": count * COLUMNS,
                             "bytes": update.bytes, "ms": milliseconds, "copy_ms": copy})  # fmt: skip
    return {"card": card, "rows": rows, "torch": torch_times()}


def torch_times() -> list[dict[str, Any]]:
    """torch's fused AdamW on the same card; empty where there is none."""
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    rows = []
    for size, count in ROWS.items():
        for name, dtype in TORCH.items():
            parameter = torch.zeros(count * COLUMNS, dtype=getattr(torch, dtype), device="cuda", requires_grad=True)
            parameter.grad = torch.full_like(parameter, 0.01)
            optimizer = torch.optim.AdamW([parameter], fused=True)
            times = []
            for _ in range(REPETITIONS + 3):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                optimizer.step()
                end.record()
                torch.cuda.synchronize()
                times.append(begin.elapsed_time(end))
            rows.append({"format": name, "size": size, "ms": statistics.median(times[3:]), "torch": torch.__version__})
            del parameter, optimizer
    return rows


def table(results: dict[str, Any] | None) -> Iterator[str]:
    """For docs/metal.md: the rate of each kernel in shares of a copy's, and of torch's time."""
    if results is None:
        yield "Not run: no such GPU was at hand."
        return
    yield f"On one {results['card']}:"
    yield ""
    yield "| | kernel | elements | GB/s | of a copy's rate | torch's fused AdamW takes |"
    yield "|---|---|---|---|---|---|"
    torch = {(row["format"], row["size"]): row["ms"] for row in results["torch"]}
    for row in results["rows"]:
        other = torch.get((row["format"], row["size"]))
        cells = [row["format"], f"`{row['kernel']}`", row["size"], f"{row['bytes'] / row['ms'] / 1e6:.0f}"]
        cells += [f"{row['copy_ms'] / row['ms']:.0%}".replace("%", " %"), f"{other / row['ms']:.2f}×" if other else "–"]
        yield "| " + " | ".join(cells) + " |"


def stored() -> dict[str, Any] | None:
    return json.loads(RESULTS.read_text()) if RESULTS.exists() else None
