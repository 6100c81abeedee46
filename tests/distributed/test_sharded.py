"""Gradients sharded over processes, on MLX's own ring of sockets: norm and decision are those of all shards together.

First gradients that are given; then nn.fully_shard, with mlx.optimizers beside, and each rank's checkpoint.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx.optimizers import clip_grad_norm

import mlx_fused_adam as fused
from distributed import fully_sharded_steps as fsdp
from distributed.sharded_steps import BAD_STEP, OPTIONS, SHAPES, whole_problem
from support.arrays import assert_same_bits
from support.launched import launch_well, needs_launch, of_run
from support.mlx_release import since_mlx

pytestmark = [pytest.mark.cpu_only, needs_launch]

PROGRAM = Path(__file__).with_name("sharded_steps.py")
FSDP_PROGRAM = Path(fsdp.__file__)
MEMORY_PROGRAM = PROGRAM.with_name("fully_sharded_memory.py")
SIZES = (2, 3)
WAYS = {2: ("eager", "compiled"), 3: ("eager",)}  # compiling takes each rank its time
RUNS = [(size, how) for size, ways in WAYS.items() for how in ways]


@pytest.mark.parametrize("size", SIZES)
def test_shards_end_as_the_whole(size, tmp_path):
    launch_well(size, PROGRAM, tmp_path)
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
        assert record["parts_end_alike"]
        assert f"rank {rank} of {size}" in record["rejected"], record["rejected"]
    shards = [mx.load(str(tmp_path / f"shard{rank}.safetensors")) for rank in range(size)]
    for name in SHAPES:
        for part, x in ({"p": parameters[name]} | optimizer.state[name]).items():
            found = np.concatenate([np.array(s[f"{name}.{part}"]) for s in shards])
            np.testing.assert_allclose(found, np.array(x), rtol=1e-5, atol=1e-7, err_msg=f"{name}.{part}")


# ---- nn.fully_shard ----

needs_fully_shard = since_mlx("0.32.1", "it has nn.fully_shard")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[int, Path]:
    """The folders that the ranks of each size have written; the later ones have tried the files of the earlier."""
    found: dict[int, Path] = {}
    for size in SIZES:
        folder = tmp_path_factory.mktemp(f"of{size}")
        launch_well(size, FSDP_PROGRAM, folder, ",".join(WAYS[size]), *found.values())
        found[size] = folder
    return found


@pytest.fixture(params=SIZES)
def size(request) -> int:
    return request.param


@pytest.fixture
def ends(folders, size) -> list[dict[str, mx.array]]:
    return [mx.load(str(folders[size] / f"end{rank}.safetensors")) for rank in range(size)]


@needs_fully_shard
def test_fully_sharded_float32_ends_with_the_bits_of_mlx_optimizers(ends, size):
    for rank, end in enumerate(ends):
        found = of_run(end, "fused/eager")
        assert found["model.left.weight"].shape == (fsdp.OUTPUTS // size, fsdp.INPUTS)
        assert found["state.left.weight.m"].shape == (fsdp.OUTPUTS // size, fsdp.INPUTS)
        assert_same_bits(found, of_run(end, "mlx.optimizers/eager"), f"rank {rank}: ")


@needs_fully_shard
@pytest.mark.parametrize("size", [2], indirect=True)
def test_fully_sharded_and_compiled_ends_with_the_bits_of_eager(ends):
    for rank, end in enumerate(ends):
        found, expected = (of_run(end, f"clipping/{how}") for how in ("compiled", "eager"))
        assert_same_bits(found, expected, f"rank {rank}: ")


@needs_fully_shard
@pytest.mark.parametrize("name", ["fused", "clipping"])
def test_fully_sharded_ends_near_one_process_on_whole_batches(ends, name):
    with mx.stream(mx.cpu):
        options = fsdp.GUARD if name == "clipping" else {}
        whole = fsdp.Training(mx.distributed.init(), fsdp.fused_adamw(None, options))
        whole.run()
    shards = [of_run(end, f"{name}/eager") for end in ends]
    bound = 0.01 * fsdp.LEARNING_RATE  # sums have another order
    for path, x in whole.end().items():
        parts = [np.array(shard[path]) for shard in shards]
        found = np.concatenate(parts) if x.ndim else parts[0]
        np.testing.assert_allclose(found, np.array(x), rtol=0, atol=bound, err_msg=path)


@needs_fully_shard
@pytest.mark.parametrize(("size", "how"), RUNS, indirect=["size"])
def test_fully_sharded_norm_and_decision_are_the_group_s(ends, how):
    first, *others = (of_run(end, f"clipping/{how}") for end in ends)
    for rank, end in enumerate([first, *others]):
        for name in ("state.grad_norm", "state.skipped", "state.step"):
            np.testing.assert_array_equal(np.array(end[name]), np.array(first[name]), f"rank {rank}")
        norms = np.array(end["norms"])
        np.testing.assert_allclose(end["state.grad_norm"].item(), norms[-1], rtol=1e-5)
        assert norms[-1] > fsdp.MAX_NORM  # or nothing would be clipped
        # One rank's shard alone was bad.
        assert not math.isfinite(norms[fsdp.BAD_STEP])
        assert end["state.skipped"].item() == 1
        assert end["state.step"].item() == fsdp.STEPS - 1
        for path, x in end.items():
            if path != "norms":
                assert np.isfinite(np.array(x)).all(), f"rank {rank}: {path}"


@needs_fully_shard
@pytest.mark.parametrize("name", ["everything", "plain"])
def test_a_rank_s_checkpoint_goes_on_bit_for_bit(ends, name):
    for rank, end in enumerate(ends):
        through = of_run(end, f"{name}/through")
        assert through["state.step"].item() >= fsdp.STEPS - 1
        assert_same_bits(of_run(end, f"{name}/resumed"), through, f"rank {rank}: ")


@needs_fully_shard
@pytest.mark.parametrize("name", ["everything", "plain"])
def test_a_checkpoint_of_other_ranks_is_rejected_with_both_named(folders, name):
    few, many = SIZES
    for size in SIZES:
        for rank in range(size):
            rejected = json.loads((folders[size] / f"rejected{rank}.json").read_text())
            mine = f"must hold the state of rank {rank} of {size} but got that of "
            other = f"rank {(rank + 1) % size} of {size}"
            assert f"{mine}{other}" in rejected[f"{name}, other rank"], rejected
            if size == many:
                other = f"rank {rank % few} of {few}"
                assert f"{mine}{other}" in rejected[f"{name}, other number"], rejected
            unsharded = "must hold the state of unsharded parameters but got that of "
            assert f"{unsharded}rank {rank} of {size}" in rejected[f"{name}, unsharded"], rejected


@needs_fully_shard
def test_mlx_keeps_what_it_gathers_and_checkpoint_gathers_again(monkeypatch):
    """MLX does what docs/scale.md counts beside the shards. Half of the whole parameters are the shard's gradients."""
    monkeypatch.setenv("MLX_BFS_MAX_WIDTH", "4")  # or it would run ahead
    output = launch_well(2, MEMORY_PROGRAM)
    peaks = json.loads(output[output.index("{") :])
    assert 1 < peaks["gathered once"] < 1.75, peaks
    assert peaks["gathered again"] < 0.75, peaks
