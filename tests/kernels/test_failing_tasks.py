"""The error of another task, which MLX throws wherever it next queues one: an update is whole, or can be tried again.

failing_tasks.cpp stands between the package and MLX's scheduler, so Linux only, in a process of its own.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

from support.mlx_release import since_mlx

pytestmark = [
    since_mlx("0.32.2", "MLX raises the error of a task wherever it queues the next one"),
    pytest.mark.cpu_only,
    pytest.mark.skipif(sys.platform != "linux", reason="needs LD_PRELOAD"),
]

PROGRAM = """
import ctypes
import mlx.core as mx, numpy as np
import mlx_fused_adam as fused

mx.set_default_device(mx.cpu)
limit = ctypes.CDLL(None)
shapes = [(5, 7), (300, 200), (3,), (2, 2), (9,)]

def run(fail_at, is_held, queued):
    # Nothing but updates is evaluated: what MLX's own operations do in place, they would do twice.
    rng = np.random.default_rng(0)
    draw = lambda: {str(i): mx.array(rng.normal(size=s).astype(np.float32)) for i, s in enumerate(shapes)}
    optimizer = fused.Adam(1e-2)
    parameters = optimizer.apply_gradients(draw(), draw())
    mx.eval(parameters, optimizer.state)
    held = [parameters, optimizer.state["0"]["m"]] if is_held else None
    gradients = draw()
    mx.eval(gradients)
    parameters = optimizer.apply_gradients(gradients, parameters)
    del gradients
    results = [parameters, [optimizer.state[k] for k in parameters]]
    mx.eval(optimizer.state["step"])
    for _ in range(queued):  # MLX counts every tenth task
        mx.eval(mx.zeros(3)[1:])
    limit.fail_at(fail_at)
    is_thrown = False
    try:
        mx.eval(results)
    except RuntimeError as error:
        assert str(error) == "planted", error
        is_thrown = True
    limit.fail_at(0)
    mx.eval(results[::-1])  # from another result of the same node
    mx.synchronize()
    limit.settle()
    leaves = [x for k, p in parameters.items() for x in (p, *optimizer.state[k].values())]
    return is_thrown, [np.array(x) for x in leaves]

for is_held, queued in [(False, i) for i in range(10)] + [(True, 0)]:
    _, expected = run(0, is_held, 0)
    is_thrown, at = True, 0
    while is_thrown:
        at += 1
        is_thrown, found = run(at, is_held, queued)
        for a, e in zip(found, expected, strict=True):
            np.testing.assert_array_equal(a, e, f"with an error at task {at} after {queued}")
    assert at > 2 * 3, at
print("right")
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    file = tmp_path_factory.mktemp("tasks") / "failing_tasks.so"
    headers = Path(mx.__file__).parent / "include"
    source = Path(__file__).with_name("failing_tasks.cpp")
    command = [compiler, "-std=c++20", "-shared", "-fPIC", "-I", headers, "-o", file, source, "-ldl"]
    subprocess.run(command, check=True)
    return file


def test_an_error_between_any_two_tasks_neither_repeats_nor_loses_an_update(library: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", PROGRAM],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "LD_PRELOAD": f"{os.environ.get('LD_PRELOAD', '')} {library}".strip()},
    )
    assert (done.returncode, done.stdout) == (0, "right\n"), f"{done.returncode}\n{done.stdout}{done.stderr[-3000:]}"
