"""Where the system makes fewer threads than asked for, updates are as right as with one thread, and nothing piles up.

failing_threads.c stands between the package and the system, so Linux only; each program has a process of its own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.cpu_only,
    pytest.mark.skipif(sys.platform != "linux", reason="needs LD_PRELOAD and /proc"),
]

BEGINNING = """
import ctypes, os
import mlx.core as mx, numpy as np
import mlx_fused_adam as fused

mx.set_default_device(mx.cpu)
limit = ctypes.CDLL(None)
shapes = [(70000,), (300, 400), (40, 1000), (1,)]

def train(steps):
    # Linear and column-major gradients, in place from the second step on, several tensors queued at once.
    rng = np.random.default_rng(0)
    draw = lambda *shape: mx.array(rng.normal(size=shape).astype(np.float32))
    parameters = {str(i): draw(*shape) for i, shape in enumerate(shapes)}
    optimizer = fused.AdamW(1e-2, bias_correction=True)
    for _ in range(steps):
        gradients = {k: draw(*p.shape[::-1]).T for k, p in parameters.items()}
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
    values = [*parameters.values(), *(optimizer.state[k][s] for k in parameters for s in "mv")]
    return [np.array(x) for x in values]

# MLX's own threads, the self-check and the reference come first, with no helpers yet.
fused.set_num_threads(1)
expected = train(20)
"""

RIGHT = """
limit.allow_threads({workers})
fused.set_num_threads(8)
for _ in range(10):
    for a, e in zip(train(20), expected, strict=True):
        np.testing.assert_array_equal(a, e)
assert limit.threads_rejected() > 0
limit.allow_threads(100)
for a, e in zip(train(20), expected, strict=True):
    np.testing.assert_array_equal(a, e)
print("right")
"""

NOTHING_PILES_UP = """
def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

def update(count):
    for _ in range(count):
        global state
        state = fused.adam_update(state[0], g, *state[1:], 1e-3)
        mx.eval(state)

limit.allow_threads({workers})
fused.set_num_threads(8)
state, g = [mx.ones(1 << 18)] * 3, mx.ones(1 << 18)
update(200)
before = resident()
update(2000)
print("grown by", resident() - before)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler")
    file = tmp_path_factory.mktemp("threads") / "failing_threads.so"
    source = Path(__file__).with_name("failing_threads.c")
    subprocess.run([compiler, "-shared", "-fPIC", "-o", file, source, "-ldl"], check=True)
    return file


def run(library: Path, program: str, workers: int) -> str:
    result = subprocess.run(
        [
            sys.executable,
            "-W",
            "error:mlx-fused-adam:RuntimeWarning",
            "-c",
            BEGINNING + program.format(workers=workers),
        ],
        capture_output=True,
        text=True,
        timeout=600,
        # Beside what is loaded already, a sanitizer's library say.
        env={**os.environ, "LD_PRELOAD": f"{os.environ.get('LD_PRELOAD', '')} {library}".strip()},
    )
    assert result.returncode == 0, f"exit status {result.returncode}\n{result.stderr}"
    return result.stdout


@pytest.mark.parametrize("workers", range(4))
def test_results_are_right_whatever_can_be_started(library: Path, workers: int) -> None:
    assert run(library, RIGHT, workers) == "right\n"


@pytest.mark.parametrize("workers", [0, 1])
def test_nothing_piles_up(library: Path, workers: int) -> None:
    """2000 updates whose helpers cannot all be started; where they waited for threads, they took 30 MiB."""
    grown = int(run(library, NOTHING_PILES_UP, workers).split()[-1])
    assert grown < 4 << 20, f"{grown / 2**20:.1f} MiB"
