"""The project's shaders with every instantiation that csrc/metal/ can ask for, as one text.

Used where all of it is compiled by another compiler: the strict check and CUDA.
"""

from __future__ import annotations

import itertools
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SHADERS = [ROOT / "metal" / "adam.metal", ROOT / "metal" / "grad_norm.metal"]
# The files that the shaders consist of.
SOURCES = [
    *(ROOT / "csrc/math" / name for name in ("device_math.h", "adam_rule.h", "random_bits.h", "encodings.h")),
    *(ROOT / "metal" / name for name in ("adam_args.h", "grad_norm_args.h", "vector_io.h")),
    *SHADERS,
]
INCLUDE_DIRS = [ROOT / "metal", ROOT / "csrc"]

TYPES = ("float", "bfloat", "half")
# Formats with auxiliary arrays, which adam_group does not have: of parameters, and of m and v.
OTHER_PARAMETERS = ("BfloatCorrection<short>", "BfloatCorrection<int8_t>")
OTHER_STATES = ("QuantizedState<8>", "QuantizedState<4>")


def kernels(source: str) -> dict[str, list[str]]:
    """The template parameters of each kernel template."""
    found = re.findall(r"template <([^>]*)>\s*\[\[kernel[^\]]*\]\] void (\w+)", source)
    return {name: [p.split()[-1] for p in parameters.split(",")] for parameters, name in found}


def instantiations(source: str, types: tuple[str, ...] = TYPES) -> str:
    """One line a kernel and combination of types; host names such as adam_linear<float, half, float>."""
    lines = []
    for name, parameters in kernels(source).items():
        others = ((), ()) if name == "adam_group" else (OTHER_PARAMETERS, OTHER_STATES)
        of_parameter, of_state = ((*types, *other) for other in others)
        choices = {"P": of_parameter, "G": types, "S": of_state}
        for arguments in itertools.product(*(choices[p] for p in parameters)):
            kernel = f"{name}<{', '.join(arguments)}>"
            lines.append(f'template [[host_name("{kernel}")]] [[kernel]] decltype({kernel}) {kernel};\n')
    return "".join(lines)


def full_source(types: tuple[str, ...] = TYPES) -> str:
    source = "".join(shader.read_text() for shader in SHADERS)
    return source + instantiations(source, types)
