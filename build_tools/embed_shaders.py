"""Turns shaders and the headers they include into C++ strings: python embed_shaders.py OUT.cpp HEADER… SHADER….

Each project header is inlined where it is first included; MLX compiles the string on the user's machine.
"""

import re
import sys
from pathlib import Path

# MSVC aside, compilers accept long literals, but C++ promises only 65536 characters: stay below by splitting.
_PIECE = 8000


def read_ascii(path: Path) -> str:
    """The file's text; MLX hands it to Metal as ASCII, and anything else would fail on the user's machine."""
    text = path.read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.isascii():
            raise SystemExit(f"{path}:{number}: the shader must be ASCII but holds {ascii(line.strip())}")
    return text


def flatten(shader: Path, headers: list[Path]) -> str:
    """The shader's text with the given headers inlined once each; other includes stay."""
    done: set[Path] = set()

    def inline(path: Path) -> str:
        def replace(match: re.Match[str]) -> str:
            included = Path(match.group(1)).parts
            header = next((h for h in headers if h.parts[-len(included) :] == included), None)
            if header is None:
                return match.group(0)
            if header in done:
                return ""
            done.add(header)
            return inline(header)

        text = read_ascii(path).replace("#pragma once\n", "")
        return re.sub(r'^#include "([^"]+)"$', replace, text, flags=re.MULTILINE)

    return inline(shader)


def definition(shader: Path, headers: list[Path]) -> str:
    """Defines ``kAdamShader`` for adam.metal."""
    text = flatten(shader, headers)
    if (delimiter := "MSL") + '"' in text:
        raise SystemExit(f"{shader} holds the delimiter {delimiter}")
    name = "".join(word.capitalize() for word in shader.stem.split("_"))
    pieces = [text[i : i + _PIECE] for i in range(0, len(text), _PIECE)]
    literals = "\n".join(f'R"{delimiter}({piece}){delimiter}"' for piece in pieces)
    return f"const char* const k{name}Shader =\n{literals};\n"


def main() -> None:
    out, *sources = map(Path, sys.argv[1:])
    headers = [path for path in sources if path.suffix == ".h"]
    shaders = [path for path in sources if path.suffix == ".metal"]
    definitions = "\n".join(definition(shader, headers) for shader in shaders)
    out.write_text(
        "// Generated from metal/ by embed_shaders.py.\n"
        '#include "metal/shaders.h"\n\n'
        f"namespace fused_adam {{\n{definitions}}}\n"
    )


if __name__ == "__main__":
    main()
