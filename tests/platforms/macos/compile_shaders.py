"""Compiles the shaders, with every instantiation, by Apple's own compiler, where a machine has it.

python tests/platforms/macos/compile_shaders.py
Nothing is run, so no GPU is needed. Xcode 16 brings the compiler, Xcode 26 as a component of its own; the Command Line
Tools have none. Without it nothing is done, and the exit status is 0.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from emulator import project_shader  # noqa: E402

# MLX compiles for Metal 3.1 or later, whatever the system offers.
STANDARDS = ("metal3.1", "metal3.2", "metal4.0")
XCRUN = ["xcrun", "-sdk", "macosx"]


def run(*command: str) -> subprocess.CompletedProcess:
    try:
        return subprocess.run([*XCRUN, *command], capture_output=True, text=True)
    except FileNotFoundError as error:
        return subprocess.CompletedProcess(command, 127, "", str(error))


def main() -> int:
    found = run("metal", "--version")
    if found.returncode:
        print(f"Apple's compiler is not here, nothing is compiled: {found.stderr.strip()}")
        return 0
    print(found.stdout.strip())
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        empty, shader = Path(folder) / "empty.metal", Path(folder) / "shader.metal"
        empty.write_text("")
        shader.write_text(project_shader.full_source())
        includes = [f"-I{path}" for path in project_shader.INCLUDE_DIRS]
        for standard in STANDARDS:
            flags = [f"-std={standard}", "-fno-fast-math", "-c", *includes, "-o", str(Path(folder) / "out.air")]
            if run("metal", *flags, str(empty)).returncode:
                print(f"{standard}: unknown to this compiler")
                continue
            done = run("metal", *flags, str(shader))
            failed |= done.returncode != 0
            print(f"{standard}: {'FAILED' if done.returncode else 'compiled'}\n{done.stderr[-10000:]}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
