"""Save an optimizer to one safetensors file, atomically, and load it.

Atomic: the file is written to a temporary name, flushed to the disk and renamed over the old one. Its metadata
describes the optimizer: format, class, hyper-parameters, options, step. Loading reads and compares everything before it
changes anything.
"""

from __future__ import annotations

import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from ._clipping import RECORDED, fit_recorded
from ._optimizers import Adam, AdamW
from ._state import AUXILIARY, map_states

_FORMAT = "mlx_fused_adam.optimizer"
_VERSION = 1
_CHOICES = ("error", "file", "optimizer")


def save_optimizer(path: str | os.PathLike[str], optimizer: Adam | AdamW) -> None:
    """Write the optimizer's state, hyper-parameters and options to one safetensors file, atomically.

    Args:
        path: The file; an existing one is replaced once the new one is complete.
        optimizer: Its state is evaluated and saved.

    Raises:
        TypeError: If it is not an optimizer of this package.
        OSError: If the file cannot be written; the previous one is untouched.
    """
    _check_kind("save_optimizer", optimizer)
    path = Path(path)
    arrays = dict(tree_flatten(optimizer.state))
    mx.eval(arrays)
    metadata = {
        "format": _FORMAT,
        "format_version": str(_VERSION),
        "optimizer": json.dumps(_description(optimizer)),
        "step": str(optimizer.step.item()),
    }
    # mx.save_safetensors requires the suffix.
    handle, name = tempfile.mkstemp(".safetensors", f".{path.name}.", path.parent)
    os.close(handle)
    try:
        mx.save_safetensors(name, arrays, metadata)
        _flush(name)
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    _flush(path.parent)


def load_optimizer(path: str | os.PathLike[str], optimizer: Adam | AdamW, *, hyperparameters: str = "error") -> None:
    """Load a saved optimizer; training continues bit for bit as if it had not stopped.

    Args:
        path: A file that :func:`save_optimizer` wrote.
        optimizer: An optimizer of the saved class. If it has a state already (from ``init``, say), the file's must have
            the same paths and shapes.
        hyperparameters: What to do where hyper-parameters or options differ: ``"error"``: raise; ``"file"``: take the
            file's; ``"optimizer"``: keep the optimizer's, and convert the state to its options at its next use.
            A learning rate that follows a schedule is always the optimizer's. Default: ``"error"``.

    Raises:
        ValueError: If the file is damaged, foreign, of a newer format, or does not fit, naming the mismatch; nothing
            has changed then.
        FileNotFoundError: If there is no such file.
        TypeError: If it is not an optimizer of this package.
    """
    _check_kind("load_optimizer", optimizer)
    if hyperparameters not in _CHOICES:
        raise ValueError(
            f"[load_optimizer] hyperparameters must be one of {', '.join(_CHOICES)} but got {hyperparameters!r}"
        )
    path = Path(path)
    arrays, metadata = _read(path)
    saved = _saved_description(path, metadata)
    own = _description(optimizer)
    if saved["class"] != own["class"]:
        _reject(path, f"the state of {own['class']}", f"that of {saved['class']}")
    if saved.get("shard_group") != own["shard_group"]:
        named = [x.get("shard_group") or "unsharded parameters" for x in (own, saved)]
        _reject(path, f"the state of {named[0]}", f"that of {named[1]}")
    differing = [k for k in sorted(own | saved) if own.get(k) != saved.get(k)]
    if differing and hyperparameters == "error":
        told = "; ".join(f"{k}: {saved.get(k)!r}, not {own.get(k)!r}" for k in differing)
        _reject(
            path,
            "the optimizer's hyper-parameters",
            f"{told} (pass hyperparameters='file' or 'optimizer' to choose)",
        )
    state = _fitting_state(path, arrays, optimizer)
    if hyperparameters == "optimizer" and "learning_rate" in differing:
        state["learning_rate"] = optimizer.state["learning_rate"]
    if hyperparameters == "file":
        if saved.get("decay_filter") == "callable" != own.get("decay_filter"):
            _reject(path, "a decay_filter that can be read", "a callable: give it to the optimizer")
        optimizer._take_description({k: saved[k] for k in differing if k in saved})
    fit_recorded(state, optimizer._options)
    # The same dict, which a compiled step may have captured; the setter lets the next use convert the state.
    tree = optimizer.state
    optimizer.state = tree
    tree.clear()
    tree.update(state)


def _check_kind(op: str, optimizer: Any) -> None:
    if not isinstance(optimizer, (Adam, AdamW)):
        raise TypeError(f"[{op}] optimizer must be an Adam or AdamW of mlx_fused_adam but got {optimizer!r}")


def _description(optimizer: Adam | AdamW) -> dict[str, Any]:
    """Class, hyper-parameters and options in JSON's types."""
    kind = AdamW if isinstance(optimizer, AdamW) else Adam
    return {"class": kind.__name__, **optimizer._description()}


def _flush(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reject(path: Path, wanted: str, got: str) -> NoReturn:
    raise ValueError(f"[load_optimizer] {path} must hold {wanted} but got {got}")


def _read(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Read arrays and metadata, whole: MLX would read arrays later, when the optimizer has changed.

    MLX checks header, dtypes, shapes and offsets. It does not see bytes that follow the last array.
    """
    wanted = "a whole safetensors file"
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        mx.eval(loaded)
    except RuntimeError as error:
        _reject(path, wanted, f"an error: {error}")
    arrays: dict[str, mx.array]
    arrays, metadata = loaded
    size = path.stat().st_size
    expected = 8 + header_bytes + sum(x.nbytes for x in arrays.values())
    if size != expected:
        _reject(path, wanted, f"{size} bytes instead of {expected}")
    return arrays, metadata


def _saved_description(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if metadata.get("format") != _FORMAT:
        _reject(path, "what save_optimizer wrote", "a safetensors file of something else")
    version = metadata.get("format_version", "")
    if not version.isdecimal() or int(version) > _VERSION:
        _reject(path, f"format version {_VERSION} or older", f"{version or 'none'}")
    try:
        saved: dict[str, Any] = json.loads(metadata["optimizer"])
        saved["class"]
    except (ValueError, KeyError, TypeError) as error:
        _reject(path, "the optimizer's hyper-parameters", f"metadata that cannot be read ({error})")
    return saved


def _fitting_state(path: Path, arrays: dict[str, mx.array], optimizer: Adam | AdamW) -> dict[str, Any]:
    """The state tree of the file, in the containers of the optimizer's own state if it has one."""
    for name in ("step", "learning_rate"):
        if name not in arrays:
            _reject(path, name, "none")
    known = dict(tree_flatten(optimizer.state))
    state: dict[str, Any]
    if not any("." in name or isinstance(x, dict) for name, x in known.items()):
        state = tree_unflatten(list(arrays.items()))
        return state

    def without_options(names: dict[str, Any]) -> set[str]:
        return {k for k in names if k not in RECORDED and k.rpartition(".")[2] not in AUXILIARY}

    own, saved = without_options(known), without_options(arrays)
    for missing, got in ((own - saved, "none"), (saved - own, "one that the optimizer lacks")):
        if missing:
            _reject(path, f"the optimizer's state of {min(missing)}", got)
    for name in sorted(own):
        if arrays[name].shape != known[name].shape:
            _reject(path, f"{name} of shape {known[name].shape}", f"shape {arrays[name].shape}")

    def with_saved_auxiliary(path: str, old: dict) -> dict[str, Any]:
        inner = f"{path}." if path else ""
        moments = {k: x for k, x in old.items() if k not in AUXILIARY}
        return moments | {k: arrays[inner + k] for k in AUXILIARY if inner + k in arrays}

    state = tree_map_with_path(lambda name, x: arrays.get(name, x), optimizer.state)
    for name in RECORDED:
        if isinstance(state.get(name), mx.array):
            del state[name]
        if name in arrays:
            state[name] = arrays[name]
    state = map_states(with_saved_auxiliary, state)
    return state
