"""What an optimiser leaves of each kernel: arrays in memory, loops and conditional branches, counted.

clang -O2 for arm64 compiles every kernel for every combination of formats, without unrolling but by pragma: Apple's
front end unrolls nothing by itself either. Everything is inlined, as on Metal.
"""

from __future__ import annotations

import re

import pytest

from emulator import llvm, project_shader
from support import tools

pytestmark = tools.module_needs("ziglang")  # which is clang

FLAGS = ["-target", "aarch64-linux-gnu", "-fno-unroll-loops"]


def blocks_of(body: str) -> dict[str, list[str]]:
    """The blocks of a function, and those that each may go to."""
    blocks: dict[str, list[str]] = {}
    name = "entry"
    for line in body.splitlines():
        label = re.match(r"([\w.]+):", line)
        if label:
            name = label[1]
        blocks.setdefault(name, []).extend(re.findall(r"label %([\w.]+)", line))
    return blocks


def loops_of(blocks: dict[str, list[str]]) -> int:
    """Heads of loops: blocks that a depth-first walk meets again while it is inside them."""
    heads = set()
    done, inside = {"entry"}, {"entry"}
    stack = [("entry", iter(blocks["entry"]))]
    while stack:
        name, rest = stack[-1]
        following = next(rest, None)
        if following is None:
            stack.pop()
            inside.discard(name)
        elif following in inside:
            heads.add(following)
        elif following not in done:
            done.add(following)
            inside.add(following)
            stack.append((following, iter(blocks[following])))
    return len(heads)


def compiled(source: str, rounded: int) -> dict[str, str]:
    return llvm.functions(f"#define FUSED_ADAM_ROUNDED_RESULTS {rounded}u\n{source}", *FLAGS)


def counts(source: str, rounded: int) -> dict[str, tuple[int, int, int]]:
    """Arrays in memory, loops, and conditional branches of each kernel by its mangled name."""
    result = {}
    for name, body in compiled(source, rounded).items():
        branches = len(re.findall(r"\bbr i1\b|\bswitch\b", body))
        result[name] = (len(re.findall(r"= alloca\b", body)), loops_of(blocks_of(body)), branches)
    return result


def kind_of(name: str) -> str:
    """Kernel, and the formats that decide what is left."""
    kernel = re.match(r"_Z\d+([a-z]+_[a-z]+)", name)
    assert kernel, name
    state = "quantized" if "QuantizedState" in name else "plain"
    return f"{kernel[1]} {state}" if kernel[1].startswith("adam") else kernel[1]


# Arrays, loops and branches at most. Branches of the plain runs are those of an element alone (the last of a tensor, or
# where no vector fits), of vectors and of a step that is not applied; join and split_24 have one an element. Elements
# of quantized state that no vector fits have one for each load and store. Two runs of a tile are updated at once.
LEFT = {
    "adam_linear plain": (0, 1, 17),  # the loop over elements alone
    "adam_linear quantized": (0, 0, 17),
    "adam_group plain": (0, 1, 11),
    # The axes around the matrix; tiles, pairs of runs; a tile's elements alone, read (twice) and updated; scales; lines
    # that no vector fits.
    "adam_tiled plain": (0, 6, 58),
    "adam_tiled quantized": (0, 8, 214),
    "adam_general plain": (0, 2, 14),  # the axes, in 32 bits and in 64
    "adam_general quantized": (0, 2, 170),
    "norm_dense": (0, 4, 10),  # which gradient, runs, the elements of a last run, the tree of sums
    "norm_general": (0, 3, 7),  # elements, their axes, the tree of sums
    "norm_total": (0, 2, 5),
}


def beyond(found: dict[str, tuple[int, int, int]]) -> list[str]:
    """Kernels with more left than named."""
    return [
        f"{name}: {left} of {LEFT[kind_of(name)]}"
        for name, left in found.items()
        if any(n > most for n, most in zip(left, LEFT[kind_of(name)], strict=True))
    ]


@pytest.mark.parametrize("rounded", [0, 7], ids=["nearest", "stochastic"])
def test_runs_stay_in_registers_and_branches_are_named(rounded):
    found = counts(project_shader.full_source(), rounded)
    assert {kind_of(name) for name in found} == set(LEFT) and len(found) > 250
    assert beyond(found) == []


def test_bfloat16_is_converted_once_each_way():
    """Between store and load nothing is widened and narrowed again: 4 loads and 3 stores of an element."""
    functions = compiled(project_shader.full_source(("bfloat",)), 0)
    body = next(b for name, b in functions.items() if name.startswith("_Z11adam_linearIu6__bf16u6__bf16u6__bf16"))
    elements = 8 + 1  # of a run, and alone
    assert len(re.findall(r"= fpext bfloat", body)) == 4 * elements
    assert len(re.findall(r"= fptrunc float", body)) == 3 * elements


# The text replaced and the replacement.
FAULTS = {
    "runs in memory": ('_Pragma("clang loop unroll(full)")', ""),
    "rounding decided for each element": ("request.results = FUSED_ADAM_ROUNDED_RESULTS;", ""),
    "guards of the elements of whole runs": (
        "  if (run.uses_vectors) {\n    load_vectors<N>(t.parameter",
        "  if (run.element % 2 == 0) {\n    load_vectors<N>(t.parameter",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_counted(name):
    text, replacement = FAULTS[name]
    include = '#include "vector_io.h"\n'
    source = project_shader.full_source(("bfloat",))
    runs = (project_shader.ROOT / "metal" / "vector_io.h").read_text().replace("#pragma once\n", "")
    source = source.replace(include, runs, 1).replace(include, "")
    assert text in source
    assert beyond(counts(source.replace(text, replacement), 0))
