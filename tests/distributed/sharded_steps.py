"""One of several processes that each hold a shard of every gradient: trains, and writes what it ends with.

Run by test_sharded.py: mlx.launch -n 2 --backend ring -- python sharded_steps.py FOLDER. A gradient of the last rank is
bad.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

import mlx_fused_adam as fused

sys.path.insert(0, str(Path(__file__).parents[1]))
from support.launched import join_ring  # noqa: E402

SHAPES = {"w": (66, 96), "b": (30,)}
STEPS, BAD_STEP = 5, 1
CLIPPING = dict(max_grad_norm=2.0, skip_nonfinite=True)
CLIPPING_RECORDS = ("grad_norm", "skipped")
OPTIONS: dict[str, Any] = dict(weight_decay=0.1, bias_correction=True, **CLIPPING)


def tree(rng: np.random.Generator) -> dict[str, mx.array]:
    return {name: mx.array(rng.normal(size=shape).astype(np.float32)) for name, shape in SHAPES.items()}


def shard(tree: dict[str, mx.array], rank: int, size: int) -> dict[str, mx.array]:
    """A rank's rows of everything, in buffers of their own."""
    return {name: mx.contiguous(mx.split(x, size)[rank]) for name, x in tree.items()}


def whole_problem() -> tuple[dict[str, mx.array], list[dict[str, mx.array]]]:
    """The parameters, and the gradients of every step: too large in the beginning, small in the end."""
    rng = np.random.default_rng(0)
    parameters = tree(rng)
    steps = [tree(rng) for _ in range(STEPS)]
    steps[-1] = {name: x * 1e-3 for name, x in steps[-1].items()}
    rows = SHAPES["w"][0]
    at_the_end = mx.arange(rows)[:, None] == rows - 1
    steps[BAD_STEP]["w"] = mx.where(at_the_end, mx.nan, steps[BAD_STEP]["w"])
    return parameters, steps


def train(
    parameters: dict[str, mx.array],
    steps: list[dict[str, mx.array]],
    group: mx.distributed.Group,
) -> tuple[dict[str, mx.array], fused.AdamW, list[float]]:
    optimizer = fused.AdamW(1e-2, **OPTIONS, shard_group=group)
    optimizer.init(parameters)
    norms = []
    for gradients in steps:
        parameters = optimizer.apply_gradients(gradients, parameters)
        mx.eval(parameters, optimizer.state)
        norms.append(optimizer.state["grad_norm"].item())
    return parameters, optimizer, norms


def parts_end_alike(
    parameters: dict[str, mx.array], steps: list[dict[str, mx.array]], group: mx.distributed.Group, expected: Any
) -> bool:
    """Whether two parts under one norm end with the bits of one optimizer of all."""
    parts = [fused.AdamW(1e-2, **{k: x for k, x in OPTIONS.items() if k not in CLIPPING}) for _ in SHAPES]
    optimizer = fused.MultiOptimizer(parts, [lambda path, _: path == "w"], **CLIPPING, shard_group=group)
    for gradients in steps:
        parameters = optimizer.apply_gradients(gradients, parameters)
    pairs = [(parameters[name], expected[0][name]) for name in SHAPES]
    pairs += [(optimizer.state[name], expected[1].state[name]) for name in CLIPPING_RECORDS]
    return optimizer.step.item() == len(steps) - 1 and all(mx.array_equal(*pair).item() for pair in pairs)


def main() -> None:
    folder = Path(sys.argv[1])
    group = join_ring(folder)
    rank, size = group.rank(), group.size()
    whole, steps = whole_problem()
    shards = [shard(gradients, rank, size) for gradients in steps]
    parameters, optimizer, norms = train(shard(whole, rank, size), shards, group)
    fused.save_optimizer(folder / f"optimizer{rank}.safetensors", optimizer)
    resumed = fused.AdamW(1e-2, **OPTIONS, shard_group=group)
    fused.load_optimizer(folder / f"optimizer{rank}.safetensors", resumed)
    rejected = ""
    try:
        fused.load_optimizer(folder / f"optimizer{rank}.safetensors", fused.AdamW(1e-2, **OPTIONS))
    except ValueError as error:
        rejected = str(error)
    mx.save_safetensors(
        str(folder / f"shard{rank}.safetensors"),
        {f"{name}.{part}": x for name in SHAPES for part, x in
         ({"p": parameters[name]} | optimizer.state[name]).items()},
    )  # fmt: skip
    record = {
        "rank": rank,
        "size": size,
        "norms": norms,
        "skipped": optimizer.state["skipped"].item(),
        "step": optimizer.step.item(),
        "parts_end_alike": parts_end_alike(shard(whole, rank, size), shards, group, (parameters, optimizer)),
        "resumed": resumed.state["skipped"].item(),
        "rejected": rejected,
    }
    (folder / f"record{rank}.json").write_text(json.dumps(record))


if __name__ == "__main__":
    main()
