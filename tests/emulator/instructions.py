"""How many operations the update of an element takes on a GPU, by kind, from what clang makes of the shader.

The update of a run in registers (update_stored of adam.metal) is compiled with -O2 for each combination of formats, its
loops unrolled and the rounding known, and the operations of LLVM's representation are counted: what Apple's compiler,
which is LLVM as well, has to turn into instructions. Loads and stores, which traffic.py counts, and the gradient's
conversion are left out. python tests/emulator/traffic.py --write publishes the table in docs/metal.md.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from . import llvm, project_shader

FLAGS = ["-target", "aarch64-macos", "-fno-sanitize=undefined", "-fno-exceptions", "-g0"]
# As if function constants and pragmas had settled what the host knows.
FLAGS += ["-mllvm", "-unroll-threshold=100000"]

# Types of parameter and state in the shader, elements of a run, and what is rounded stochastically (random_bits.h).
RUNS = {
    "float32": ("float", "float", 4, 0),
    "bfloat16": ("bfloat", "bfloat", 8, 5),
    "float16, state bfloat16": ("half", "bfloat", 8, 5),
    "bfloat16, state float32": ("bfloat", "float", 4, 1),
    "bfloat16 with correction": ("BfloatCorrection<short>", "bfloat", 8, 4),
    "bfloat16 with 8-bit correction": ("BfloatCorrection<int8_t>", "bfloat", 8, 5),
    "float32, state 8 bits": ("float", "QuantizedState<8>", 4, 0),
    "bfloat16, state 8 bits": ("bfloat", "QuantizedState<8>", 8, 1),
    "bfloat16, state 4 bits": ("bfloat", "QuantizedState<4>", 8, 7),
    "bfloat16 with correction, state 8 bits": ("BfloatCorrection<short>", "QuantizedState<8>", 8, 0),
}

KINDS = {
    "float": ("fadd", "fsub", "fmul", "fneg", "fcmp"),
    "integer": ("add", "sub", "and", "or", "xor", "shl", "lshr", "ashr", "icmp", "select"),
    "conversion": ("fpext", "fptrunc", "sitofp", "uitofp", "fptosi", "fptoui"),
    "integer product": ("mul",),
    "division and root": ("fdiv",),
    "branch": ("br", "switch"),
}
# Functions, by a part of their names; an absolute value is a modifier of an operand.
CALLS = {
    "metal4sqrt": "division and root",
    "metal3max": "integer",
    "metal3min": "integer",
    "llvm.umin": "integer",
    "llvm.umax": "integer",
    "llvm.smin": "integer",
    "llvm.smax": "integer",
    "llvm.abs": "integer",
    "llvm.fshl": "integer",
    "simd_shuffle": "shuffle",
    "llvm.fabs": None,
    "llvm.mem": None,
    "llvm.lifetime": None,
    "llvm.assume": None,
    "llvm.experimental.noalias": None,
}
KIND_OF = {opcode: kind for kind, opcodes in KINDS.items() for opcode in opcodes}


# Instructions for an operation of a kind: philipturner/metal-benchmarks has 2 to 3.7 cycles for an integer product on
# an M1; a division or root that is correctly rounded is taken as ten. All others are one.
WEIGHTS = {"integer product": 3, "division and root": 10}

# Instructions a second (cores, lanes of a core, GHz as reported by others), and bytes a second as Apple states them.
GPUS = {
    "M1": (8 * 128 * 1.28e9, 68e9),
    "M4 Max": (40 * 128 * 1.58e9, 546e9),
    "M3 Ultra": (80 * 128 * 1.40e9, 819e9),
}


@dataclass
class Count:
    """Operations of an element, by kind."""

    of_kind: dict[str, float]

    def __getitem__(self, kind: str) -> float:
        return self.of_kind.get(kind, 0.0)

    @property
    def operations(self) -> float:
        return sum(self.of_kind.values())

    @property
    def instructions(self) -> float:
        return sum(n * WEIGHTS.get(kind, 1) for kind, n in self.of_kind.items())


def kind_of(line: str) -> str | None:
    """The kind of an operation in LLVM's representation; None for what costs no instruction of arithmetic."""
    operation = re.sub(r"^\s*(%[\w.]+ = )?((tail|notail|musttail) )?", "", line)
    opcode = operation.split(" ")[0]
    if opcode == "br" and not operation.startswith("br i1"):
        return None
    if opcode != "call":
        return KIND_OF.get(opcode)
    called = re.search(r"@([\w.]+)\(", operation)
    name = called[1] if called else operation
    for part, kind in CALLS.items():
        if part in name:
            return kind
    raise ValueError(f"an operation of unknown kind: {operation}")


def counts(sources: str | None = None) -> dict[str, Count]:
    """The operations of an element for each of RUNS."""
    source = sources or (project_shader.ROOT / "metal" / "adam.metal").read_text()
    kernel = "adam_linear<float, float, float>"
    lines = [f'template [[host_name("{kernel}")]] [[kernel]] decltype({kernel}) {kernel};']
    for i, (parameter, state, length, rounded) in enumerate(RUNS.values()):
        arguments = "const thread float* gradient, Run at, TensorStep step, threadgroup uint* scales"
        lines.append(f"void counted_{i}(thread StoredRun<{parameter}, {state}, {length}>& run, {arguments}) {{")
        lines.append(f"  step.rounding.results = {rounded}u;\n  update_stored(run, gradient, at, step, scales);\n}}")
    functions = llvm.functions(source + "\n".join(lines), *FLAGS)
    found = {}
    for i, (name, (_, _, length, _)) in enumerate(RUNS.items()):
        (body,) = (body for function, body in functions.items() if f"counted_{i}R" in function)
        kinds = Counter(filter(None, map(kind_of, body.splitlines())))
        found[name] = Count({kind: n / length for kind, n in kinds.items()})
    return found


def table(bytes_of_element: dict[str, float]) -> Iterator[str]:
    """Per format: bytes, operations and instructions of an element; arithmetic's time over memory's on each GPU."""
    kinds = [*KINDS, "shuffle"]
    yield "| | bytes | " + " | ".join([*kinds, "instructions", *GPUS]) + " |"
    yield "|---" * (3 + len(kinds) + len(GPUS)) + "|"
    for name, count in counts().items():
        cells = [f"{bytes_of_element[name]:.2f}", *(f"{count[kind]:.1f}" for kind in kinds)]
        cells.append(f"{count.instructions:.0f}")
        for rate, bandwidth in GPUS.values():
            cells.append(f"{count.instructions / rate / (bytes_of_element[name] / bandwidth):.0%}".replace("%", " %"))
        yield f"| {name} | " + " | ".join(cells) + " |"
