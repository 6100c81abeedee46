"""Runs the project's Metal shader on an NVIDIA GPU: the same text, through nvcc, against NumPy, bit for bit.

python tests/platforms/cuda/run.py                  every kernel, layout and combination of dtypes
python tests/platforms/cuda/run.py --sanitize       and the small cases under compute-sanitizer: memcheck, racecheck,
                                                    initcheck
python tests/platforms/cuda/run.py --time           all that, then times: at most six minutes in all; writes times.json
python tests/platforms/cuda/run.py --compile-only   needs nvcc but no GPU
"""

from __future__ import annotations

import argparse
import ctypes
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

import numpy as np  # noqa: E402

from emulator import project_shader, translate  # noqa: E402
from platforms.cuda import cuda_cases as cases  # noqa: E402
from platforms.cuda import cuda_times as times  # noqa: E402

SECONDS = 360  # for everything, with --time
FOR_TIMES = 90  # of which
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


def timers(library: Path) -> tuple[times.Timer, Callable[[int], list[float]], str]:
    """Of a kernel and of a copy, in milliseconds, and the GPU's name."""
    loaded = ctypes.CDLL(str(library))
    for function in (loaded.time_kernel, loaded.time_copy, loaded.card_name):
        function.restype = ctypes.c_char_p
    found = (ctypes.c_float * times.REPETITIONS)()

    def checked(failure: bytes | None) -> list[float]:
        if failure:
            raise RuntimeError(failure.decode())
        return list(found)

    def time_kernel(case: times.Case) -> list[float]:
        buffers, count = case.buffers, len(case.buffers)
        places = {buffer.index: i for i, buffer in enumerate(buffers)}
        values = [None if b.values is None else b.values.ctypes.data for b in buffers]
        return checked(
            loaded.time_kernel(
                case.name.encode(),
                count,
                (ctypes.c_int * count)(*(b.index for b in buffers)),
                (ctypes.c_void_p * count)(*values),
                (ctypes.c_int * count)(*(-1 if b.same_as is None else places[b.same_as] for b in buffers)),
                (ctypes.c_size_t * count)(*(b.size for b in buffers)),
                (ctypes.c_uint * 3)(*case.grid),
                (ctypes.c_uint * 3)(*case.group),
                times.REPETITIONS,
                found,
            )
        )

    def time_copy(size: int) -> list[float]:
        return checked(loaded.time_copy(ctypes.c_size_t(size), times.REPETITIONS, found))

    return time_kernel, time_copy, loaded.card_name().decode()


def has_gpu() -> bool:
    tool = shutil.which("nvidia-smi")
    return bool(tool) and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def sanitize(folder: Path, architecture: str, end: float | None) -> bool:
    """Repeats the small float32 and mixed cases under each tool, until `end`; true if none finds a fault."""
    clean = True
    for tool in TOOLS:
        command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "1", sys.executable]
        command += [__file__, "--small", "--folder", str(folder), "--arch", architecture]
        try:
            left = None if end is None else max(end - time.perf_counter(), 1)
            result = subprocess.run(command, capture_output=True, text=True, timeout=left)
        except subprocess.TimeoutExpired:
            print(f"compute-sanitizer {tool}: not finished in the time that there is")
            continue
        print(f"compute-sanitizer {tool}: {'clean' if result.returncode == 0 else 'FAULTS'}")
        if result.returncode:
            clean = False
            print(result.stdout[-4000:] + result.stderr[-4000:])
    return clean


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--compile-only", action="store_true", help="do not run anything")
    parser.add_argument("--sanitize", action="store_true", help="also run under compute-sanitizer")
    parser.add_argument("--time", action="store_true", help="also under compute-sanitizer, and time every kernel")
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
    end = start + SECONDS - FOR_TIMES if options.time else None
    if (options.sanitize or options.time) and not sanitize(options.folder, architecture, end):
        return 1
    if options.time:
        results = times.measured(*timers(library))
        times.RESULTS.write_text(json.dumps(results, indent=1) + "\n")
        print("\n".join(times.table(results)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
