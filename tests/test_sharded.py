"""Gradients sharded over processes, on MLX's own ring of sockets: norm and decision are those of all shards together."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.optimizers import clip_grad_norm
from sharded_steps import BAD_STEP, OPTIONS, SHAPES, whole_problem

import mlx_fused_adam as fused

pytestmark = pytest.mark.cpu_only

LAUNCH = shutil.which("mlx.launch", path=str(Path(sys.executable).parent))
PROGRAM = Path(__file__).with_name("sharded_steps.py")


@pytest.mark.skipif(LAUNCH is None, reason="mlx.launch is not beside this Python")
@pytest.mark.parametrize("size", [2, 3])
def test_shards_end_as_the_whole(size, tmp_path):
    command = [LAUNCH, "-n", str(size), "--backend", "ring", "--", sys.executable, str(PROGRAM)]
    done = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads((tmp_path / f"record{rank}.json").read_text()) for rank in range(size)]

    whole, steps = whole_problem()
    optimizer = fused.AdamW(1e-2, **OPTIONS)
    parameters, norms = whole, []
    with mx.stream(mx.cpu):
        for gradients in steps:
            parameters = optimizer.apply_gradients(gradients, parameters)
            mx.eval(parameters, optimizer.state)
            norms.append(optimizer.state["grad_norm"].item())
            if math.isfinite(norms[-1]):
                _, norm = clip_grad_norm(gradients, 2.0)
                np.testing.assert_allclose(norms[-1], norm.item(), rtol=1e-5)
    for rank, record in enumerate(records):
        assert (record["rank"], record["size"]) == (rank, size)
        # Every rank has the same bits, so none can decide otherwise.
        np.testing.assert_array_equal(record["norms"], records[0]["norms"])
        np.testing.assert_allclose(record["norms"], norms, rtol=1e-6)
        assert not math.isfinite(record["norms"][BAD_STEP])
        assert record["skipped"] == record["resumed"] == 1
        assert record["step"] == len(steps) - 1
        assert f"rank {rank} of {size}" in record["refused"], record["refused"]
    shards = [mx.load(str(tmp_path / f"shard{rank}.safetensors")) for rank in range(size)]
    for name in SHAPES:
        for part, x in ({"p": parameters[name]} | optimizer.state[name]).items():
            found = np.concatenate([np.array(s[f"{name}.{part}"]) for s in shards])
            np.testing.assert_allclose(
                found, np.array(x), rtol=1e-5, atol=1e-7, err_msg=f"{name}.{part}"
            )
