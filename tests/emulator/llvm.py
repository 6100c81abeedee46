"""What clang -O2 makes of the shader's text for arm64: LLVM's representation, which Apple's compiler has as well.

Everything is inlined, as on Metal, and nothing is vectorised. Needs ziglang, which is clang. Used by instructions.py
and tests/metal/test_shader_counts.py.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

from . import project_shader, translate

FLAGS = ["-std=c++14", "-x", "c++", "-nostdinc", "-w", "-S", "-emit-llvm", "-O2"]
FLAGS += ["-fno-vectorize", "-fno-slp-vectorize", "-ffp-contract=off", "-mllvm", "-inline-threshold=1000000"]


def functions(source: str, *flags: str) -> dict[str, str]:
    """The bodies of all functions, by mangled name.

    Raises:
        RuntimeError: If clang does not take the text, with its errors.
    """
    text = translate.for_clang(source, project_shader.INCLUDE_DIRS)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "shader.cpp"
        file.write_text(text)
        output = file.with_suffix(".ll")
        command = [sys.executable, "-m", "ziglang", "c++", *FLAGS, *flags, f"-I{translate.SHIM}"]
        done = subprocess.run([*command, str(file), "-o", str(output)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(done.stderr)
        compiled = output.read_text()
    found = re.finditer(r"^define [^\n]*?@(\w+)\([^\n]*\{\n(.*?)^\}", compiled, re.MULTILINE | re.DOTALL)
    return {match[1]: match[2] for match in found}
