"""Replicas of a model on several machines, joined by nn.average_gradients over MLX's own ring of sockets; and the
example.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

from distributed.data_parallel_steps import BOTH, LEARNING_RATE, SETUPS, STEPS, runs_of, train
from support.arrays import assert_same_bits
from support.launched import (
    failed_ranks,
    launch,
    launch_well,
    needs_launch,
    of_run,
)

pytestmark = [pytest.mark.cpu_only, needs_launch]

PROGRAM = Path(__file__).with_name("data_parallel_steps.py")
EXAMPLE = PROGRAM.parents[2] / "examples" / "data_parallel.py"

# By the number of ranks. Compiling takes each of them its time, so it is done for two alone.
WAYS = {2: ("eager", "compiled"), 4: ("eager",)}
RUNS = [(size, *run) for size, ways in WAYS.items() for run in runs_of(ways)]


@pytest.fixture(scope="module")
def ends_of(tmp_path_factory):
    """ends_of(size): what each rank ended with, by rank. One launch of the processes for all options."""

    @functools.cache
    def ends_of(size: int) -> list[dict[str, mx.array]]:
        folder = tmp_path_factory.mktemp(f"of{size}")
        launch_well(size, PROGRAM, folder, *WAYS[size])
        return [mx.load(str(folder / f"rank{rank}.safetensors")) for rank in range(size)]

    return ends_of


@pytest.mark.parametrize(("size", "name", "how"), RUNS)
def test_all_ranks_end_with_the_same_bits(ends_of, size, name, how):
    first, *others = (of_run(end, f"{name}/{how}") for end in ends_of(size))
    of_first = "state.states.0." if name == "MultiOptimizer" else "state."
    assert {"model.first.weight", f"{of_first}first.weight.m"} <= set(first)
    assert len(others) == size - 1
    for rank, other in enumerate(others, 1):
        assert_same_bits(other, first, f"rank {rank}")
    is_skipped = SETUPS[name].has_bad_gradient
    steps = [x.item() for path, x in first.items() if path.startswith("state.") and path.endswith(".step")]
    assert set(steps) == {STEPS - is_skipped}
    if is_skipped:  # the bad gradient was one rank's
        assert first["state.skipped"].item() == 1


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("size", WAYS)
def test_float32_ends_with_the_bits_of_mlx_optimizers(ends_of, size, name):
    for rank, end in enumerate(ends_of(size)):
        expected = of_run(end, f"mlx.optimizers, {name}/eager")
        assert_same_bits(of_run(end, f"{name}/eager"), expected, f"rank {rank}")


@pytest.mark.parametrize(("size", "name", "how"), RUNS)
def test_the_end_is_near_that_of_one_process_on_whole_batches(ends_of, size, name, how):
    """Sums have another order. A step moves a parameter by about a learning rate; the bounds are in learning rates."""
    setup = SETUPS[name]
    with mx.stream(mx.cpu):
        alone = train(setup, mx.distributed.init(), is_compiled=False)
    found = of_run(ends_of(size)[0], f"{name}/{how}")
    assert found.keys() == alone.keys()
    for path, x in alone.items():
        if path.startswith("model."):
            x, y = (np.array(z.astype(mx.float32)) for z in (x, found[path]))
            apart = np.abs(x - y) / LEARNING_RATE
            if setup.dtype == mx.bfloat16:  # a small gradient is another number after its rounding
                assert apart.max() < 10 and apart.mean() < 0.1, path
            else:
                bound = 0.1 if "state_dtype" in setup.options else 0.001
                np.testing.assert_array_less(apart, bound, err_msg=path)


# ---- The example ----

TINY = ["--steps", "6", "--batch-size", "4", "--context", "16", "--dims", "16", "--heads", "2", "--layers", "1",
        "--device",
        "cpu"]  # fmt: skip
LOSS = re.compile(r"step 6 of 6: loss ([\d.]+)")

# The example, on ranks that do not average their gradients.
APART = """
import subprocess
import sys
sys.path.insert(0, {folder!r})
import data_parallel
data_parallel.nn.average_gradients = lambda gradients, group: gradients
data_parallel.main({arguments})
"""


def test_the_example_trains_replicas_and_rank_0_alone_prints():
    output = launch_well(2, EXAMPLE, *TINY)
    assert output.splitlines()[-1] == "Parameters and state of all 2 ranks: bit-identical", output
    assert output.count("step 6 of 6") == 1, output
    alone = subprocess.run([sys.executable, EXAMPLE, *TINY], capture_output=True, text=True, timeout=240)
    assert alone.returncode == 0, alone.stderr
    assert alone.stdout.splitlines()[-1] == "One rank: no others to compare with"
    losses = [float(LOSS.search(text).group(1)) for text in (output, alone.stdout)]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)


def test_the_example_fails_where_ranks_differ(tmp_path):
    program = tmp_path / "apart.py"
    program.write_text(APART.format(folder=str(EXAMPLE.parent), arguments=TINY))
    output = launch(2, program)
    assert re.search(r"[1-9]\d* tensors differ between ranks, the first is parameters\.", output), output
    assert failed_ranks(output, 2), output
    assert "exited with code 1" in output


def test_the_example_rejects_a_batch_that_ranks_cannot_share():
    output = launch(2, EXAMPLE, *TINY, "--batch-size", "3")
    assert "error: --batch-size 3 is not a multiple of the 2 ranks" in output, output
    assert failed_ranks(output, 2), output
