"""Runs the project's Metal shader on an NVIDIA GPU: the same text, through nvcc, against NumPy, bit for bit.

python tests/platforms/cuda/run.py                  every kernel, layout and combination of dtypes
python tests/platforms/cuda/run.py --sanitize       the small cases under compute-sanitizer: memcheck, racecheck,
initcheck python tests/platforms/cuda/run.py --compile-only   needs nvcc but no GPU
"""

from __future__ import annotations

import argparse
import ctypes
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import numpy as np  # noqa: E402

from emulator import project_shader, translate  # noqa: E402
from platforms.cuda import cuda_cases as cases  # noqa: E402

TOOLS = ("memcheck", "racecheck", "initcheck")
# No fused multiply-add, so that results equal the separate operations of NumPy.
FLAGS = ["-std=c++17", "-O2", "-fmad=false", "--expt-relaxed-constexpr", "-lineinfo", "-shared"]
FLAGS += ["-Xcompiler", "-fPIC,-w", "-diag-suppress", "2506"]


def compile_shader(folder: Path, architecture: str, types: tuple[str, ...]) -> Path:
    """Builds the shader and runtime.cuh into a shared library."""
    folder.mkdir(parents=True, exist_ok=True)
    source = project_shader.full_source(types)
    text = translate.for_cuda(source, project_shader.INCLUDE_DIRS) + '#include "runtime.cuh"\n'
    file = folder / "adam.cu"
    file.write_text(text)
    library = folder / "libadam_cuda.so"
    includes = [f"-I{translate.SHIM}", f"-I{translate.SHIM.parent}", f"-I{HERE}"]
    command = ["nvcc", f"-arch={architecture}", *FLAGS, *includes, str(file), "-o", str(library)]
    subprocess.run(command, check=True)
    return library


def gpu_runner(library: Path) -> cases.Runner:
    run_kernel = ctypes.CDLL(str(library)).run_kernel
    run_kernel.restype = ctypes.c_char_p

    def run(
        kernel: str,
        buffers: list[cases.Buffer],
        grid: tuple[int, int, int],
        threads_per_threadgroup: tuple[int, int, int],
    ) -> None:
        count = len(buffers)
        uses = [use for _, _, use in buffers]
        failure = run_kernel(
            kernel.encode(),
            count,
            (ctypes.c_int * count)(*(index for index, _, _ in buffers)),
            (ctypes.c_void_p * count)(*(array.ctypes.data for _, array, _ in buffers)),
            (ctypes.c_size_t * count)(*(array.nbytes for _, array, _ in buffers)),
            (ctypes.c_int * count)(*(use != "output" for use in uses)),
            (ctypes.c_int * count)(*(use in ("output", "both") for use in uses)),
            (ctypes.c_uint * 3)(*grid),
            (ctypes.c_uint * 3)(*threads_per_threadgroup),
        )
        if failure:
            raise RuntimeError(f"{kernel}: {failure.decode()}")

    return run


def has_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return bool(tool) and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def sanitize(folder: Path, architecture: str) -> bool:
    """Repeats the small float32 and mixed cases under each tool; true if all are clean."""
    clean = True
    for tool in TOOLS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable]
        command += [__file__, "--small", "--folder", str(folder), "--arch", architecture]
        result = subprocess.run(command, capture_output=True, text=True)
        print(f"compute-sanitizer {tool}: {'clean' if result.returncode == 0 else 'FAULTS'}")
        if result.returncode:
            clean = False
            print(result.stdout[-4000:] + result.stderr[-4000:])
    return clean


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-only", action="store_true", help="do not run anything")
    parser.add_argument("--sanitize", action="store_true", help="also run under compute-sanitizer")
    parser.add_argument("--small", action="store_true", help="leave the large tensors out")
    parser.add_argument("--arch", default=None, help="as for nvcc -arch; default: that of the GPU")
    parser.add_argument("--folder", type=Path, default=HERE.parents[2] / "build" / "cuda")
    options = parser.parse_args()
    if not shutil.which("nvcc"):
        print("nvcc is not on the PATH")
        return 2
    architecture = options.arch or ("native" if has_gpu() else "sm_80")
    start = time.perf_counter()
    library = compile_shader(options.folder, architecture, project_shader.TYPES)
    print(f"compiled for {architecture} in {time.perf_counter() - start:.0f} s: {library}")
    if options.compile_only:
        return 0
    if not has_gpu():
        print("there is no NVIDIA GPU to run it on")
        return 2
    count = 0
    with np.errstate(over="ignore"):
        for line in cases.check(gpu_runner(library), project_shader.TYPES, not options.small):
            count += 1
            print(f"\r{count:4d}  equal in every bit: {line:100}", end="", flush=True)
    print(f"\nall {count} updates equal NumPy's in every bit")
    if options.sanitize and not sanitize(options.folder, architecture):
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
