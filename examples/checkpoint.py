"""A run of train.py on disk: the optimizer in one file, the model beside it, so that a run can go on where it ended.

The optimizer's file is written last and names the step, and the model's file carries the step in its name. So whenever the
program is killed, the optimizer's file has its model beside it.
"""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from text_data import BadInput

import mlx_fused_adam as fused


def model_file(path: Path, step: int) -> Path:
    return path.with_name(f"{path.name}.model-{step}.safetensors")


def save(path: Path, model: nn.Module, optimizer: Any, losses: list[float], label: str) -> None:
    """The state after a step; `label` says what the run is, for load to compare."""
    step = optimizer.step.item()
    arrays = {f"model.{name}": x for name, x in tree_flatten(model.parameters())}
    arrays["losses"] = mx.array(losses)
    new = model_file(path, step)
    mx.save_safetensors(str(new), arrays, {"run": label})
    fused.save_optimizer(path, optimizer)
    for old in path.parent.glob(f"{path.name}.model-*.safetensors"):
        if old != new:
            old.unlink(missing_ok=True)


def load(path: Path, model: nn.Module, optimizer: Any, label: str) -> list[float]:
    """Bring model and optimizer to where they were saved; returns the losses so far.

    Raises BadInput if there is nothing to go on from, or it is of another run.
    """
    try:
        fused.load_optimizer(path, optimizer)
        arrays, metadata = mx.load(
            str(model_file(path, optimizer.step.item())), return_metadata=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        raise BadInput(f"--resume: {error}") from None
    if metadata.get("run") != label:
        raise BadInput(f"--resume: {path} is of a run with other settings: {metadata.get('run')}")
    losses = arrays.pop("losses")
    model.update(tree_unflatten([(k.removeprefix("model."), x) for k, x in arrays.items()]))
    mx.eval(model.parameters(), optimizer.state)
    return losses.tolist()
