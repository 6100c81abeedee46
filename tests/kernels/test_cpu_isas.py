"""Every instruction set that the CPU kernels were compiled for gives the same bits, on every layout and dtype."""

import subprocess

import pytest

from mlx_fused_adam import _ext
from support.processes import run_python

pytestmark = pytest.mark.cpu_only

# Prints the digests of results over sizes around the vector widths; run under each instruction set.
PROGRAM = """
import hashlib, itertools
import mlx.core as mx, numpy as np
import mlx_fused_adam as fused
from mlx_fused_adam import _ext
mx.set_default_device(mx.cpu)
print(_ext.cpu_isa())
rng = np.random.default_rng(0)
dtypes = [mx.float32, mx.bfloat16, mx.float16]
digest = hashlib.sha256()
for shape in [(1,), (7,), (16,), (33,), (1025,), (70, 130)]:
    for p, g, s in itertools.product(dtypes, repeat=3):
        def draw(shape, dtype):
            x = rng.normal(size=shape) * np.exp2(rng.integers(-20, 8, size=shape))
            special = rng.choice([np.nan, np.inf, -np.inf, 1e30, -0.0, 6e-8], size=shape)
            x = np.where(rng.random(shape) < 0.05, special, x)
            return mx.array(x.astype(np.float32)).astype(dtype)
        gradient = draw(shape[::-1], g).T
        results = fused.adam_update(
            draw(shape, p), gradient, draw(shape, s), mx.abs(draw(shape, s)), 0.01,
            step=3, bias_correction=True, weight_decay=0.1,
        )
        for x in results:
            values = np.array(x.astype(mx.float32))
            digest.update(np.where(np.isnan(values), np.float32(1.5e38), values).tobytes())
print(digest.hexdigest())
"""


def run(isa: str) -> subprocess.CompletedProcess:
    # A set that fails its self-check would leave the program to compare mlx.optimizers.
    return run_python("-W", "error:mlx-fused-adam:RuntimeWarning", "-c", PROGRAM, MLX_FUSED_ADAM_ISA=isa)


def test_all_sets_agree_bit_for_bit():
    digests = {}
    for isa in _ext.supported_cpu_isas():
        result = run(isa)
        assert result.returncode == 0, result.stderr
        used, digests[isa] = result.stdout.split()
        assert used == isa
    assert len(set(digests.values())) == 1, digests


@pytest.mark.parametrize("isa", ["sse", "x86_64_v5"])
def test_an_unknown_set_is_an_error_at_import(isa):
    result = run(isa)
    assert result.returncode != 0
    assert "MLX_FUSED_ADAM_ISA must be one of" in result.stderr
