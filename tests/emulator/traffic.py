"""What the kernels ask of the memory system, counted by the emulator (counter.h), and the tables of docs/metal.md.

python tests/emulator/traffic.py            prints the tables
python tests/emulator/traffic.py --write    writes them
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import mlx.core as mx
import numpy as np

from support import stored_tensors
from support.arrays import lay_out

LINE = 128
GRADIENT = 3  # its buffer (metal/adam_args.h)
PAGE = Path(__file__).resolve().parents[2] / "docs" / "metal.md"
END = "<!-- end -->"

# Formats of parameter, gradient and state, as stored_tensors.make takes them.
FORMATS = {
    "float32": ("float32", "float32", "float32"),
    "bfloat16": ("bfloat16", "bfloat16", "bfloat16"),
    "float16, state bfloat16": ("float16", "float16", "bfloat16"),
    "bfloat16, state float32": ("bfloat16", "bfloat16", "float32"),
    "bfloat16 with correction": ("master", "bfloat16", "bfloat16"),
    "bfloat16 with 8-bit correction": ("master24", "bfloat16", "bfloat16"),
    "float32, state 8 bits": ("float32", "float32", "int8"),
    "bfloat16, state 8 bits": ("bfloat16", "bfloat16", "int8"),
    "bfloat16, state 4 bits": ("bfloat16", "bfloat16", "int4"),
    "bfloat16 with correction, state 8 bits": ("master", "bfloat16", "int8"),
}
# Shape, and layout of the gradient as lay_out takes it.
CASES = {
    "row-major": ((128, 128), "linear"),
    "row-major, unaligned": ((128, 101), "between vectors"),
    "column-major": ((64, 2048), "column-major"),
    "column-major, unaligned": ((67, 1031), "column-major"),
    "every second": ((128, 128), "strided"),
}


@dataclass
class Count:
    """Of one dispatch."""

    kernel: str
    bytes: int  # that must move: each array once in, and all but the gradient once out
    lines: int  # of 128 bytes, by access of a simdgroup
    group_lines: int  # by threadgroup
    gradient: tuple[int, int, int]  # lines by access, by threadgroup, and different ones
    cycles: int  # of threadgroup memory
    fewest_cycles: int

    @property
    def by_access(self) -> float:
        """Bytes that loads and stores move over those that must move; 1 is perfect."""
        return self.lines * LINE / self.bytes

    @property
    def by_threadgroup(self) -> float:
        """The same for memory, if a threadgroup's lines stay in a cache."""
        return self.group_lines * LINE / self.bytes

    @property
    def conflicts(self) -> float:
        """Cycles of threadgroup memory over those that the bytes need; 1 is perfect."""
        return self.cycles / self.fewest_cycles if self.fewest_cycles else 1.0


def counted(emulator: ModuleType, evaluate: Callable[[], None]) -> dict[str, dict]:
    """The counts of each kernel's first order of threads."""
    mx.synchronize()
    emulator.start_counting()
    try:
        evaluate()
    finally:
        counts = emulator.stop_counting()
    return counts


def count(
    extension: ModuleType,
    emulator: ModuleType,
    shapes: list[tuple[int, ...]],
    formats: tuple[str, str, str],
    layout: str = "linear",
) -> Count:
    """Counts a step that updates tensors in place by one dispatch; every result is rounded stochastically."""
    tensors = [stored_tensors.make(extension, shape, formats) for shape in shapes]
    for tensor in tensors:
        tensor["gradient"] = lay_out(tensor["gradient"], layout)
    mx.eval(tensors)
    stored = sum((2 - (name == "gradient")) * x.nbytes for tensor in tensors for name, x in tensor.items())
    del tensor

    def update() -> None:
        mx.eval(stored_tensors.update(extension, [tensors.pop(0) for _ in shapes]))

    ((kernel, found),) = ((k, c) for k, c in counted(emulator, update).items() if k.startswith("adam"))
    both = [*found["reads"].values(), *found["writes"].values()]
    lines, group_lines, _ = np.sum(both, axis=0)
    return Count(kernel.split("<")[0], stored, int(lines), int(group_lines), found["reads"][GRADIENT], *found["cycles"])


def count_norm(extension: ModuleType, emulator: ModuleType, dtype: str, layout: str) -> tuple[float, float]:
    """Of one gradient's sum of squares: bytes by access and by threadgroup over its own."""
    gradient = stored_tensors.make(extension, (128, 256), (dtype, dtype, "float32"))["gradient"]
    stored = gradient.nbytes
    gradient = lay_out(gradient, layout)
    mx.eval(gradient)
    counts = counted(emulator, lambda: mx.eval(stored_tensors.sum_of_squares(extension, [gradient])))
    reads = [c["reads"].values() for k, c in counts.items() if k.startswith(("norm_dense", "norm_general"))]
    lines, group_lines, _ = np.sum([x for values in reads for x in values], axis=0)
    return lines * LINE / stored, group_lines * LINE / stored


def table(extension: ModuleType, emulator: ModuleType) -> Iterator[str]:
    """The lines of the table: by access / by threadgroup, and how many times longer bank conflicts make it take."""
    yield "| | " + " | ".join(CASES) + " |"
    yield "|---" * (1 + len(CASES)) + "|"
    for name, formats in FORMATS.items():
        cells = []
        for shape, layout in CASES.values():
            c = count(extension, emulator, [shape], formats, layout)
            banks = f", banks {c.conflicts:.2f}" if c.fewest_cycles else ""
            cells.append(f"{c.by_access:.2f} / {c.by_threadgroup:.2f}{banks}")
        yield f"| {name} | " + " | ".join(cells) + " |"
    for dtype in ("float32", "bfloat16"):
        cells = ["–"] * len(CASES)
        for i, (case, (_, layout)) in enumerate(CASES.items()):
            if "unaligned" not in case:
                cells[i] = "{:.2f} / {:.2f}".format(*count_norm(extension, emulator, dtype, layout))
        yield f"| norm, {dtype} | " + " | ".join(cells) + " |"


def bytes_of_element(formats: tuple[str, str, str]) -> float:
    """That must move for an element: parameter and state in and out, the gradient in."""
    sizes = {
        "float32": 4,
        "bfloat16": 2,
        "float16": 2,
        "master": 4,
        "master24": 3,
        "int8": 1 + 2 / 32,
        "int4": 0.5 + 2 / 32,
    }
    parameter, gradient, state = (sizes[x] for x in formats)
    return 2 * parameter + gradient + 4 * state


def begin(name: str) -> str:
    return f"<!-- emulator:{name} -->\n"


def published(name: str) -> list[str]:
    """The lines of a table in docs/metal.md."""
    return PAGE.read_text().split(begin(name))[1].split("\n" + END)[0].splitlines()


def publish(name: str, table: str) -> None:
    before, rest = PAGE.read_text().split(begin(name))
    PAGE.write_text(f"{before}{begin(name)}{table}\n{END}" + rest.split(END, 1)[1])


def main(write: bool) -> None:
    from emulator import build, instructions
    from platforms.cuda import cuda_times

    os.environ["FUSED_ADAM_EMULATOR_ORDERS"] = "forward"
    mx.set_default_device(mx.cpu)
    tables = {
        "traffic": table(build.load_extension(), build.load_emulator()),
        "cuda": cuda_times.table(cuda_times.stored()),
        "instructions": instructions.table({name: bytes_of_element(formats) for name, formats in FORMATS.items()}),
    }
    for name, lines in tables.items():
        text = "\n".join(lines)
        print(text, end="\n\n")
        if write:
            publish(name, text)


if __name__ == "__main__":
    main("--write" in sys.argv[1:])
