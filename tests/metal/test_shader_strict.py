"""The shader against a compiler that knows address spaces: clang, as C++14 to C++20, with none of the host's headers.

The emulator's compiler sees no address spaces, so a qualifier that Metal would miss must be missed here. Each fault
planted below must be rejected, for the reason that it is a fault.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from emulator import project_shader, translate
from support import tools

pytestmark = tools.module_needs("ziglang")  # which is clang

FLAGS = ["-x", "c++", "-nostdinc", "-c", "-Wno-unused-command-line-argument"]
FLAGS += ["-Werror=c++17-extensions", "-Werror=c++20-extensions"]
# Metal 3 is a dialect of C++14, Metal 4 of C++17; 20 for what may come.
STANDARDS = ("c++14", "c++17", "c++20")


def compile_strictly(source: str, folder: Path, standard: str = "c++14") -> str:
    """The compiler's errors; empty if there are none."""
    try:
        text = translate.for_clang(source, project_shader.INCLUDE_DIRS)
    except translate.MslError as error:
        return str(error)
    file = folder / "shader.cpp"
    file.write_text(text)
    command = [sys.executable, "-m", "ziglang", "c++", f"-std={standard}", *FLAGS, f"-I{translate.SHIM}"]
    command += [str(file), "-o", str(folder / "shader.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode == 0) == ("error:" not in result.stderr), result.stderr
    return result.stderr if result.returncode else ""


@pytest.mark.parametrize("standard", STANDARDS)
def test_every_instantiation_is_accepted(tmp_path, standard):
    source = project_shader.full_source()
    updates = [p for p in project_shader.kernels(source).values() if "P" in p]
    assert len(updates) == 4 and source.count("host_name") >= 54 * len(updates)
    assert compile_strictly(source, tmp_path, standard) == ""


# The text replaced, the replacement, and why the compiler must reject it.
FAULTS = {
    "unqualified pointer parameter": ("uint number,\n    const device float* scalars",
        "uint number,\n    const float* scalars",
        "no matching function for call to 'load_step'"),
    "unqualified pointer in a struct": ("device typename Format<P>::parameter* new_parameter;",
        "typename Format<P>::parameter* new_parameter;", "initialization of 'TensorPointers"),
    "unqualified kernel parameter": ("device typename Format<S>::m* new_m [[buffer(kNewM)]]",
        "typename Format<S>::m* new_m [[buffer(kNewM)]]", "initialization of 'TensorPointers|no matching function"),
    "constant for device": ("uint number,\n    const device float* scalars",
        "uint number,\n    const constant float* scalars",
        "no matching function for call to 'load_step'"),
    "device for constant": ("if (in_vectors) {", "const device int64_t* axes = shape;\n    if (in_vectors) {",
        "cannot initialize a variable of type 'device int64_t const"),
    "const lost": ("const device typename Format<P>::parameter* parameter;",
        "device typename Format<P>::parameter* parameter;", "initialization of 'TensorPointers"),
    "write to an input": ("TensorStep tensor = {{scalars[0]", "scalars[0] = 0;\n  TensorStep tensor = {{scalars[0]",
        "not assignable"),
    "address space cast away": ("*(const device typename V::type*)(from", "*(const typename V::type*)(from",
        "reinterpret_cast from"),
    "unqualified pointer to threadgroup memory": ("if (in_vectors) {",
        "G* row_of_tile = tile;\n    if (in_vectors) {", "cannot initialize a variable of type 'float \\*'"),
    "device pointer to threadgroup memory": ("if (in_vectors) {",
        "device G* row_of_tile = tile;\n    if (in_vectors) {",
        "cannot initialize a variable of type 'device float \\*'"),
    "device pointer to a local variable": ("if (in_vectors) {",
        "device uint* of_column = &column;\n    if (in_vectors) {",
        "cannot initialize a variable of type 'device"),
    "double": ("float values[length];", "double values[length];", "poisoned"),
    "host function": ("AdamState<float> next", "std::sqrt(1.0f); AdamState<float> next", "'std'"),
    "host header": ("#include <metal_stdlib>", "#include <metal_stdlib>\n#include <cmath>", "cmath"),
    "exception": ("  TensorStep tensor = {{", "  throw 1;\n  TensorStep tensor = {{", "poisoned"),
    "C++17": ("if (axis + 2 < axes)", "if constexpr (sizeof(Index) == 4)", "C\\+\\+17"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_rejected(name, tmp_path):
    text, replacement, reason = FAULTS[name]
    source = project_shader.full_source(("float",))
    include = '#include "vector_io.h"\n'
    assert include in source
    runs = (project_shader.ROOT / "metal" / "vector_io.h").read_text().replace("#pragma once\n", "")
    source = source.replace(include, runs, 1).replace(include, "")
    assert text in source, f"the shader no longer holds {text!r}; plant this fault elsewhere"
    errors = compile_strictly(source.replace(text, replacement, 1), tmp_path)
    assert re.search(reason, errors), f"{name}: {errors or 'not rejected'}"


@pytest.mark.parametrize("standard", STANDARDS)
def test_the_dialect_is_the_one_asked_for(tmp_path, standard):
    """C++17 took this word away."""
    source = project_shader.full_source(("float",)) + "inline int kept() { register int x = 1; return x; }\n"
    assert ("register" in compile_strictly(source, tmp_path, standard)) == (standard != "c++14")
