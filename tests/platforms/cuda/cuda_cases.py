"""Updates of every kernel, layout and dtype, and what must come out, for any runner of the project's shader.

A runner takes (kernel, buffers, grid, threads_per_threadgroup); a buffer is (index, array, "input" | "output" | "both"
| "bytes"). The dispatches are those of csrc/metal/adam.cpp; the expected values come from NumPy, in float32, rounded
once.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

Buffer = tuple[int, np.ndarray, str]
Runner = Callable[[str, list[Buffer], tuple[int, int, int], tuple[int, int, int]], None]

ROOT = Path(__file__).resolve().parents[3]
BETA1, BETA2, EPS = 0.9, 0.999, 1e-8
CONSTANTS = np.array([BETA1, 1 - BETA1, BETA2, 1 - BETA2, EPS], np.float32)
# step_size, denominator_scale, decay, gradient_scale, is_applied
SCALARS = np.array([0.01, 1.25, 0.99, 0.5, 1.0], np.float32)

# Shared by host and shader: numbers, and the 32-bit fields of the argument structs, whose first member is StepArgs.
HEADER = (ROOT / "metal" / "adam_args.h").read_text()
SHARED = {
    name: eval(value, {"__builtins__": {}})
    for name, value in re.findall(r"^\s*(k\w+) = ([\d <]+),", HEADER, re.MULTILINE)
}
STRUCTS = {
    name: re.findall(r"^\s*unsigned int (\w+)", body, re.MULTILINE)
    for name, body in re.findall(r"struct (\w+Args) {\n(.*?)};", HEADER, re.DOTALL)
}
NEAREST = [0, 0, 0]  # RoundingRequest
ALL_VECTORS = SHARED["kGradientVectors"] | SHARED["kStateVectors"]
DEFAULTS = {"number": 0, "numbers": [0] * SHARED["kGroupTensors"], "first_element": 0, "band": 0, "strip": 1}
DEFAULTS["scalar_count"] = len(SCALARS)
# Read only by formats that are not among these cases.
AUXILIARIES = ("kCorrection", "kMScale", "kVScale", "kNewCorrection", "kNewMScale", "kNewVScale")


def to_bits(x: np.ndarray, dtype: str) -> np.ndarray:
    """float32 values as an array of the dtype, rounded to nearest even; bfloat16 as uint16."""
    if dtype == "float":
        return x.astype(np.float32)
    if dtype == "half":
        return x.astype(np.float16)
    word = np.ascontiguousarray(x, np.float32).view(np.uint32)
    return ((word + 0x7FFF + (word >> 16 & 1)) >> 16).astype(np.uint16)


def to_float(x: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "bfloat":
        return (x.astype(np.uint32) << 16).view(np.float32)
    return x.astype(np.float32)


def expected(tensor: list[np.ndarray], types: tuple[str, str, str], scalars: np.ndarray) -> list[np.ndarray]:
    """The update operation by operation, each rounded to float32."""
    p, g, s = types
    w, g, m, v = (to_float(x, t) for x, t in zip(tensor, (p, g, s, s), strict=True))
    beta1, one_minus_beta1, beta2, one_minus_beta2, eps = CONSTANTS
    step_size, denominator_scale, decay, scale, _ = np.append(scalars, np.ones(4, np.float32))[:5]
    g = g * scale
    m = beta1 * m + one_minus_beta1 * g
    v = beta2 * v + one_minus_beta2 * (g * g)
    w = w * decay - (step_size * m) / (np.sqrt(v) * denominator_scale + eps)
    return [to_bits(w, p), to_bits(m, s), to_bits(v, s)]


def random_tensor(shape: tuple[int, ...], types: tuple[str, str, str]) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    w, g, m = (rng.normal(size=shape).astype(np.float32) for _ in range(3))
    v = rng.random(shape).astype(np.float32)
    p, gradient_type, s = types
    return [to_bits(x, t) for x, t in zip((w, g, m, v), (p, gradient_type, s, s), strict=True)]


def arguments(struct: str, **fields: int | list[int]) -> Buffer:
    """An argument struct: StepArgs, then 32-bit fields in the header's order."""
    names = [*STRUCTS["StepArgs"], *STRUCTS[struct]]
    fields = {name: fields.get(name, DEFAULTS.get(name)) for name in {*names, *fields}}
    assert set(fields) == set(names), f"{struct} has the fields {names}"
    values = np.concatenate([NEAREST, *(np.atleast_1d(fields[name]) for name in names)])
    packed = np.concatenate([CONSTANTS, values.astype(np.uint32).view(np.float32)])
    return SHARED["kArgs"], packed, "bytes"


# Bytes of an item of each array of a format.
BYTES = {
    "float": 4,
    "bfloat": 2,
    "half": 2,
    "BfloatCorrection<short>": 2,
    "QuantizedState<8>": 1,
    "QuantizedState<4>": 1,
}


def run_length(types: tuple[str, str, str]) -> int:
    return SHARED["kShortRun"] if "float" in types else SHARED["kLongRun"]


def tile_sides(types: tuple[str, str, str]) -> tuple[int, int]:
    """Rows and columns of a tile of adam_tiled."""
    parameter, gradient, state = (BYTES[x] for x in types)
    return SHARED["kLineBytes"] // gradient, SHARED["kLineBytes"] // min(parameter, state)


def threads_for(size: int, types: tuple[str, str, str]) -> int:
    return -(-size // run_length(types))


class Update:
    """One dispatch: fills in the buffers, runs it and compares every bit."""

    def __init__(
        self,
        kernel: str,
        types: tuple[str, str, str],
        scalars: np.ndarray = SCALARS,
    ) -> None:
        self.name = f"{kernel}<{', '.join(types)}>"
        self.types = types
        self.buffers: list[Buffer] = [
            (SHARED["kScalars"], scalars, "input"),
            (SHARED["kStep"], np.ones(1, np.uint32), "input"),
        ]
        if kernel != "adam_group":
            self.buffers += [(SHARED[name], np.zeros(1, np.uint32), "input") for name in AUXILIARIES]
        self.scalars = scalars
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []

    def bind(self, tensor: list[np.ndarray], first: int, in_place: bool) -> None:
        """`tensor` as the kernel sees it: parameter, gradient, m, v; the memory order of each is its own."""
        want = expected(tensor, self.types, self.scalars)
        memory = [x.base if x.base is not None else x for x in tensor]
        outputs = [memory[i] if in_place else np.empty(want[0].shape, memory[i].dtype) for i in (0, 2, 3)]
        uses = ["both", "input", "both", "both"] if in_place else ["input"] * 4
        for i, (array, use) in enumerate(zip(memory, uses, strict=True)):
            self.buffers.append((first + i, array, use))
        for i, array in enumerate(outputs):
            self.buffers.append((first + 4 + i, array, "both" if in_place else "output"))
        self.pairs += list(zip(outputs, want, strict=True))

    def axes(self, *arrays: list[int]) -> None:
        for index, values in enumerate(arrays, SHARED["kShape"]):
            self.buffers.append((index, np.array(values, np.int64), "bytes"))

    def run(self, runner: Runner, grid: tuple[int, int, int], group: tuple[int, int, int]) -> str:
        runner(self.name, self.buffers, grid, group)
        for i, (got, want) in enumerate(self.pairs):
            bits = np.dtype(f"u{want.itemsize}")
            wrong = np.flatnonzero(got.reshape(-1).view(bits) != want.reshape(-1).view(bits))
            if wrong.size:
                at = wrong[0]
                raise AssertionError(
                    f"{self.name}: {wrong.size} of {want.size} elements of output {i} are wrong, first "
                    f"element {at}: {got.reshape(-1)[at]} instead of {want.reshape(-1)[at]}"
                )
        return f"{self.name}, {sum(want.size for _, want in self.pairs) // 3} elements"


def linear(
    types: tuple[str, str, str], size: int, in_place: bool, scalars: int = len(SCALARS)
) -> tuple[Update, tuple, tuple]:
    update = Update("adam_linear", types, scalars=SCALARS[:scalars].copy())
    update.buffers.append(
        arguments("LinearArgs", row_length=size, vectors=ALL_VECTORS * (size > 3), scalar_count=scalars)
    )
    update.bind(random_tensor((size,), types), SHARED["kFirstTensor"], in_place)
    threads = threads_for(size, types)
    return update, (threads, 1, 1), (min(threads, SHARED["kThreads"]), 1, 1)


def group(types: tuple[str, str, str], sizes: list[int]) -> tuple[Update, tuple, tuple]:
    update = Update("adam_group", types)
    ends = np.cumsum([threads_for(size, types) for size in sizes]).tolist()
    fields = {"sizes": sizes, "vectors": [ALL_VECTORS] * len(sizes), "thread_ends": ends}
    update.buffers.append(arguments("GroupArgs", **fields))
    for i, size in enumerate(sizes):
        first = SHARED["kFirstTensor"] + i * SHARED["kBuffersPerTensor"]
        update.bind(random_tensor((size,), types), first, in_place=True)
    return update, (ends[-1], 1, 1), (min(ends[-1], SHARED["kThreads"]), 1, 1)


def tiled(types: tuple[str, str, str], batch: int | None, rows: int, columns: int) -> tuple[Update, tuple, tuple]:
    """A batch of matrices, or one with no axis around it."""
    update = Update("adam_tiled", types)
    run = run_length(types)
    fields = {"rows": rows, "columns": columns, "axes": int(batch is not None)}
    vectors = ALL_VECTORS * (rows % run == 0 and columns % run == 0)
    update.buffers.append(arguments("TiledArgs", **fields, vectors=vectors))
    tensor = random_tensor((batch or 1, rows, columns), types)
    tensor[1] = np.ascontiguousarray(tensor[1].swapaxes(1, 2)).swapaxes(1, 2)
    update.bind(tensor, SHARED["kFirstTensor"], in_place=True)
    around = [] if batch is None else [rows * columns]
    update.axes([batch] if batch else [0], [*around, columns], [*around, rows])
    height, width = tile_sides(types)
    threads = SHARED["kThreads"]
    return update, (-(-columns // width) * threads, -(-rows // height), batch or 1), (threads, 1, 1)


def general(types: tuple[str, str, str], wide: bool, shape: tuple[int, ...]) -> tuple[Update, tuple, tuple]:
    """A gradient with gaps along its last axis."""
    update = Update("adam_general", types)
    update.buffers.append(arguments("GeneralArgs", axes=len(shape), wide_indices=wide, vectors=0))
    tensor = random_tensor(shape, types)
    wide = np.repeat(tensor[1], 2, axis=-1)
    tensor[1] = wide[..., ::2]
    update.bind(tensor, SHARED["kFirstTensor"], in_place=False)
    plain = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    update.axes(list(shape), plain, [2 * stride for stride in plain], plain, plain)
    grid = (shape[-1], shape[-2], math.prod(shape[:-2]))
    group = (min(grid[0], 32), min(grid[1], 4), min(grid[2], 2))
    return update, grid, group


def all_cases(types: tuple[str, ...], large: bool) -> Iterator[tuple[Update, tuple, tuple]]:
    for combination in itertools.product(types, repeat=3):
        for size in (1, 3, 4, 1027, *([5_000_011] if large else [])):
            yield linear(combination, size, in_place=size % 2 == 1)
        yield linear(combination, 1027, in_place=True, scalars=1)
        yield group(combination, [5, 1027, 1, 64][: SHARED["kGroupTensors"]])
        yield tiled(combination, 2, 37, 70)
        yield tiled(combination, None, 40, 72)
        yield general(combination, False, (37, 70))
        yield general(combination, True, (2, 3, 5, 7))
        if large:
            yield tiled(combination, 1, 2048, 1531)
            yield tiled(combination, 3, 1024, 512)
            yield general(combination, False, (1500, 1001))


def check(runner: Runner, types: tuple[str, ...], large: bool) -> Iterator[str]:
    """Runs every case; raises AssertionError at the first wrong bit."""
    for update, grid, threads in all_cases(types, large):
        yield update.run(runner, grid, threads)
