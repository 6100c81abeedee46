"""Turns Metal Shading Language into C++ for the emulator, for clang with address spaces, or for nvcc.

The shader's text is flattened by the preprocessor and otherwise kept as written; only what C++ cannot say is rewritten:
threadgroup variables, kernel attributes, functions overloaded on address spaces.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

from . import msl
from .msl import Kernel, MslError, Shader

SHIM = Path(__file__).resolve().parent / "shim"

# MLX asks for Metal 3.1 or later; no system header may be found, as none is on Metal.
SCAN_FLAGS = [
    "-E",
    "-x",
    "c++",
    "-std=c++14",
    "-nostdinc",
    "-D__METAL__=1",
    "-D__METAL_VERSION__=310",
]

MEMORY = {"buffer": "buffer", "threadgroup": "threadgroup_memory"}
ADDRESS_SPACES = {"device", "constant", "thread", "threadgroup"}


def compiler() -> list[str]:
    return os.environ.get("CXX", "c++").split()


def flatten(source: str, include_dirs: Sequence[Path | str] = (), name: str = "shader.metal") -> str:
    """The shader with its includes inlined and its macros expanded; line markers keep the original lines."""
    command = [*compiler(), *SCAN_FLAGS, f"-I{SHIM}", *(f"-I{d}" for d in include_dirs), "-"]
    result = subprocess.run(command, input=f'#line 1 "{name}"\n{source}', capture_output=True, text=True)
    if result.returncode:
        raise MslError(result.stderr)
    return result.stdout


def adapt_declarations(shader: Shader) -> None:
    """Keeps the first of functions that differ in address spaces alone, as they are one function to a host compiler.

    Makes explicit specialisations inside a class, which GCC before 14 rejects, overloads.
    """
    seen: set[tuple[object, ...]] = set()
    duplicates = []
    for function in msl.find_functions(shader):
        words = shader.tokens[function.start : function.body]
        signature = (function.scope, *(w for w in words if w not in ADDRESS_SPACES))
        if signature in seen:
            duplicates.append((function.start, function.end))
        elif function.in_class and words[:3] == ["template", "<", ">"]:
            duplicates.append((function.start, function.start + 3))
        seen.add(signature)
    for first, last in reversed(duplicates):
        shader.remove(first, last)


def drop_attributes(shader: Shader) -> None:
    """Removes [[...]], which has served its purpose once the kernels are found, and which hosts would not know."""
    i = 0
    while i < len(shader.tokens):
        if shader.tokens[i] == "[[":
            shader.remove(i, shader.matching(i) + 1)
        else:
            i += 1


def rewrite_threadgroup_variables(shader: Shader, form: str) -> None:
    """Gives each `threadgroup T name[..];` the storage of the target; {declaration}, {first} and {names} fill
    `form`.
    """
    tokens = shader.tokens
    for i, token in enumerate(tokens):
        if token != "threadgroup":
            continue
        names: list[str] = []
        j = i + 1
        while tokens[j] not in "*&;){" and tokens[j] != "]]":
            if tokens[j] == "<":
                j = shader.matching(j)
            elif tokens[j] == "[":
                if not tokens[j - 1].endswith("]"):
                    names.append(tokens[j - 1])
                j = shader.matching(j)
            elif tokens[j] == "," and not tokens[j - 1].endswith("]"):
                names.append(tokens[j - 1])
            j += 1
        if tokens[j] != ";":
            continue  # a qualifier of what a pointer or reference means
        if not tokens[j - 1].endswith("]"):
            names.append(tokens[j - 1])
        declaration = shader.text(i + 1, j)
        references = " ".join(f"auto& {n} = {names[0]}_memory.{n};" for n in names)
        tokens[i] = form.format(declaration=declaration, first=names[0], references=references)
        for k in range(i + 1, j + 1):
            tokens[k] = ""


# A struct with a red zone behind it: an index past the end meets the red zone, not the next variable.
CPU_THREADGROUP = (
    "alignas(16) static thread_local struct {{ {declaration}; char red_zone[64]; }} {first}_memory; {references}"
)
CUDA_THREADGROUP = "__shared__ {declaration};"
STRICT_THREADGROUP = "static threadgroup {declaration};"


def _reopened(namespaces: Sequence[str], text: str) -> str:
    return "".join(f"namespace {n} {{ " for n in namespaces) + text + " }" * len(namespaces)


def _roles(kernel: Kernel) -> list[str]:
    """The kind of each parameter, as calls of the constexpr functions in msl_cpu.h and msl_cuda.h."""
    return [
        f"emulator::builtin(emulator::Role::{argument})"
        if kind == "builtin"
        else f"emulator::{MEMORY[kind]}({argument})"
        for kind, argument in kernel.roles
    ]


def kernel_table(kernels: Sequence[Kernel]) -> str:
    """C++ that lists the kernels for the emulator; types are deduced from the functions themselves (msl_cpu.h)."""
    lines = ['#line 1 "kernel table"']
    names = []
    for i, kernel in enumerate(kernels):
        arguments = ", ".join([f"&{kernel.expression}", *_roles(kernel)])
        text = f'constexpr auto kernel_entry_{i} = emulator::entry<{arguments}>("{kernel.host_name}");'
        lines.append(_reopened(kernel.namespaces, text))
        names.append("::".join(["", *kernel.namespaces, f"kernel_entry_{i}"]))
    lines.append(f"static const emulator::Kernel emulator_table[] = {{{', '.join(names)}}};")
    lines.append(f"EMULATOR_EXPORT(emulator_table, {len(names)})")
    return "\n".join(lines) + "\n"


def translate(
    source: str,
    threadgroup_form: str,
    include_dirs: Sequence[Path | str] = (),
    name: str = "shader.metal",
) -> tuple[Shader, list[Kernel]]:
    """A shader as C++ that still needs the definitions of one target's shim in front of it, and its kernels."""
    shader = msl.tokenize(flatten(source, include_dirs, name))
    adapt_declarations(shader)
    kernels = msl.find_kernels(shader)
    if not kernels:
        raise MslError(f"{name}: no kernel that a host could name")
    drop_attributes(shader)
    rewrite_threadgroup_variables(shader, threadgroup_form)
    return shader, kernels


def contract_at_most(shader: Shader) -> None:
    """Gives clang the pragmas that Metal has for contraction, but lets `off` stand for `on`: within an expression."""
    for i, space in enumerate(shader.spaces):
        shader.spaces[i] = re.sub(
            r"#\s*pragma METAL fp contract\((\w+)\)",
            lambda m: f"#pragma clang fp contract({'on' if m[1] == 'off' else m[1]})",
            space,
        )


def for_cpu(
    source: str,
    include_dirs: Sequence[Path | str] = (),
    relaxations: frozenset[str] = frozenset(),
) -> str:
    """The C++ text that the emulator compiles; hostile.py has the relaxations."""
    shader, kernels = translate(source, CPU_THREADGROUP, include_dirs)
    if "no_bfloat" in relaxations and "bfloat" in shader.tokens:
        raise MslError("this GPU has no type bfloat")
    if "contraction" in relaxations:
        contract_at_most(shader)
    return f'#include "msl_cpu.h"\n{shader.whole()}\n{kernel_table(kernels)}'


def add_copies_between_address_spaces(shader: Shader) -> None:
    """Lets plain structs be copied out of device and constant memory, as Metal does and clang's C++ does not."""
    tokens = shader.tokens
    for i in range(len(tokens) - 2):
        if tokens[i] != "struct" or tokens[i + 2] != "{":
            continue
        end = shader.matching(i + 2)
        body = tokens[i + 3 : end]
        if not body or set(body) & {"(", "[", "{", "=", "typedef"}:
            continue  # has functions, arrays, initialisers or types: left as it is
        name, fields, start = tokens[i + 1], [], i + 3
        for j in range(i + 3, end):
            if tokens[j] == ";":
                fields.append((shader.text(start, j - 1), tokens[j - 1]))
                start = j + 1
        parameters = ", ".join(f"{kind} {field}_" for kind, field in fields)
        constructors = [f"{name}() = default;", f"{name}(const {name}&) = default;"]
        constructors.append(f"{name}({parameters}) : " + ", ".join(f"{field}({field}_)" for _, field in fields) + " {}")
        copies = ", ".join(f"{field}(other.{field})" for _, field in fields)
        for space in ("device", "constant", "threadgroup"):
            constructors.append(f"{name}(const {space} {name}& other) : {copies} {{}}")
        # `= default` of an assignment, since the constructors above would leave it deprecated.
        constructors.append(f"{name}& operator=(const {name}&) = default;")
        tokens[end] = " ".join(constructors) + " }"


def expose_pointer_casts(shader: Shader) -> None:
    """Turns (T*)x into an operator of msl_strict.h, as clang's C++ would let a cast between address spaces pass."""
    tokens = shader.tokens
    for i in range(1, len(tokens) - 1):
        before = tokens[i - 1]
        if tokens[i] != "(" or (re.match(r"[\w)\]>]", before) and before != "return"):
            continue
        end = shader.matching(i)
        inside = tokens[i + 1 : end]
        if inside[-1:] == ["*"] and re.match(r"[\w(&*]", tokens[end + 1]):
            tokens[i], tokens[end] = "metal::pointer_cast<", ">()->*"


def for_clang(source: str, include_dirs: Sequence[Path | str] = ()) -> str:
    """C++14 with real address spaces, in which every kernel that the host can name is instantiated; for checking
    only.
    """
    shader, _ = translate(source, STRICT_THREADGROUP, include_dirs)
    add_copies_between_address_spaces(shader)
    expose_pointer_casts(shader)
    return f'#include "msl_strict.h"\n{shader.whole()}\n'


def drop_explicit_instantiations(shader: Shader) -> None:
    """The host's list of kernels instantiates them too, and for nvcc these would be functions of the CPU."""
    i = 0
    while i < len(shader.tokens) - 1:
        if shader.tokens[i] == "template" and shader.tokens[i + 1] != "<":
            shader.remove(i, shader.tokens.index(";", i) + 1)
        else:
            i += 1


def for_cuda(source: str, include_dirs: Sequence[Path | str] = ()) -> str:
    """CUDA C++ with a __global__ function for each kernel that the host can name, and a table of them."""
    shader, kernels = translate(source, CUDA_THREADGROUP, include_dirs)
    drop_explicit_instantiations(shader)
    for i, token in enumerate(shader.tokens):
        if token in ADDRESS_SPACES or token == "kernel":
            shader.tokens[i] = ""
    for function in msl.find_functions(shader):
        if "(" in shader.tokens[function.head : function.body]:
            shader.tokens[function.head] = "__device__ " + shader.tokens[function.head]
    lines = []
    for i, kernel in enumerate(kernels):
        call = f"emulator::call<{', '.join(_roles(kernel))}>({kernel.expression}, arguments)"
        text = f"__global__ void global_{i}(emulator::Arguments arguments) {{ {call}; }}"
        lines.append(_reopened(kernel.namespaces, text))
    entries = [f'{{"{k.host_name}", {"::".join(["", *k.namespaces, f"global_{i}"])}}}' for i, k in enumerate(kernels)]
    lines.append(f"static const emulator::Entry emulator_table[] = {{{', '.join(entries)}}};")
    return f'#include "msl_cuda.h"\n{shader.whole()}\n' + "\n".join(lines) + "\n"
