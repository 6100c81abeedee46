"""An optimizer in one safetensors file, written so that a whole file stands under the name at any instant.

Written beside, flushed to the disk, renamed over the old one. The file's metadata says whose it is: format, class,
hyper-parameters, options, step. A file is read, checked and compared before anything of the optimizer changes.
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

from ._clipping import GUARD_STATE, fit_guard_state
from ._optimizers import Adam, AdamW
from ._state import EXTRAS, map_states

_FORMAT = "mlx_fused_adam.optimizer"
_VERSION = 1
_SIDES = ("error", "file", "optimizer")
_HEADER_SIZE_BYTES = 8
_LARGEST_HEADER = 100_000_000  # of the format
# Bytes of an element; those that an optimizer's state can hold.
_ELEMENT_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2, "I32": 4, "U32": 4, "F32": 4, "F64": 8, "I64": 8,
    "U64": 8, "C64": 8,
}  # fmt: skip


def save_optimizer(path: str | os.PathLike[str], optimizer: Adam | AdamW) -> None:
    """Write the optimizer's state, hyper-parameters and options to one safetensors file.

    The file is written beside, flushed and renamed: killed at any instant, what stood under the name before is whole.

    Args:
        path: Of the file; it may exist.
        optimizer: Whose state is saved. The state is evaluated.

    Raises:
        TypeError: If it is no optimizer of this package.
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
    # With the name's ending that mx.save_safetensors wants.
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


def load_optimizer(
    path: str | os.PathLike[str], optimizer: Adam | AdamW, *, hyperparameters: str = "error"
) -> None:
    """Bring an optimizer to where it was saved; training then goes on bit for bit as if it had not stopped.

    Args:
        path: Of a file that :func:`save_optimizer` wrote.
        optimizer: Of the class that was saved. If it has a state already (by ``init``, say), the file's must have the same
            paths and shapes.
        hyperparameters: What to do where hyper-parameters or options differ: ``"error"``: refuse; ``"file"``: take the
            file's; ``"optimizer"``: keep the optimizer's, and convert the state to its options when it is next used.
            A learning rate that follows a schedule is always the optimizer's. Default: ``"error"``.

    Raises:
        ValueError: If the file is damaged, foreign, of a newer format, or does not fit, naming what; nothing has changed then.
        FileNotFoundError: If there is none.
        TypeError: If it is no optimizer of this package.
    """
    _check_kind("load_optimizer", optimizer)
    if hyperparameters not in _SIDES:
        raise ValueError(
            f"[load_optimizer] hyperparameters must be one of {', '.join(_SIDES)} but got {hyperparameters!r}"
        )
    path = Path(path)
    metadata = _checked_metadata(path)
    saved = _saved_description(path, metadata)
    mine = _description(optimizer)
    if saved["class"] != mine["class"]:
        _refuse(path, f"the state of {mine['class']}", f"that of {saved['class']}")
    if saved.get("shard_group") != mine["shard_group"]:
        named = [x.get("shard_group") or "unsharded parameters" for x in (mine, saved)]
        _refuse(path, f"the state of {named[0]}", f"that of {named[1]}")
    differing = [k for k in sorted(mine | saved) if mine.get(k) != saved.get(k)]
    if differing and hyperparameters == "error":
        told = "; ".join(f"{k}: {saved.get(k)!r}, not {mine.get(k)!r}" for k in differing)
        _refuse(
            path,
            "the optimizer's hyper-parameters",
            f"{told} (hyperparameters='file' or 'optimizer' says which to go on with)",
        )
    arrays = mx.load(str(path), format="safetensors")
    assert isinstance(arrays, dict)
    mx.eval(arrays)
    state = _fitting_state(path, arrays, optimizer)
    if hyperparameters == "optimizer" and "learning_rate" in differing:
        state["learning_rate"] = optimizer.state["learning_rate"]
    if hyperparameters == "file":
        if saved.get("decay_filter") == "callable" != mine.get("decay_filter"):
            _refuse(path, "a decay_filter that can be read", "a callable: give it to the optimizer")
        optimizer._take_description({k: saved[k] for k in differing if k in saved})
    fit_guard_state(state, optimizer._options)
    # In the tree that a compiled step may have captured.
    tree = optimizer.state
    optimizer.state = tree
    tree.clear()
    tree.update(state)


def _check_kind(op: str, optimizer: Any) -> None:
    if not isinstance(optimizer, (Adam, AdamW)):
        raise TypeError(
            f"[{op}] optimizer must be an Adam or AdamW of mlx_fused_adam but got {optimizer!r}"
        )


def _description(optimizer: Adam | AdamW) -> dict[str, Any]:
    """Class, hyper-parameters and options, in what JSON can say."""
    kind = AdamW if isinstance(optimizer, AdamW) else Adam
    return {"class": kind.__name__, **optimizer._description()}


def _flush(path: str | Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _refuse(path: Path, wanted: str, got: str) -> NoReturn:
    raise ValueError(f"[load_optimizer] {path} must hold {wanted} but got {got}")


def _checked_metadata(path: Path) -> dict[str, str]:
    """The file's metadata, if the file is whole: MLX reads arrays when they are needed, which would be too late."""
    wanted = "a whole safetensors file"
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(_HEADER_SIZE_BYTES), "little")
        if size < _HEADER_SIZE_BYTES or length > min(size - _HEADER_SIZE_BYTES, _LARGEST_HEADER):
            _refuse(path, wanted, f"{size} bytes, of which the header alone would be {length}")
        text = file.read(length)
    try:
        header = json.loads(text)
        metadata: dict[str, str] = header.pop("__metadata__", {})
        ends = [0, *(_end_of(name, entry) for name, entry in header.items())]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _refuse(path, wanted, f"a header that cannot be read ({error})")
    if max(ends) != size - _HEADER_SIZE_BYTES - length:
        _refuse(path, wanted, f"{size} bytes instead of {max(ends) + _HEADER_SIZE_BYTES + length}")
    return metadata


def _end_of(name: str, entry: dict[str, Any]) -> int:
    end: int
    begin, end = entry["data_offsets"]
    count = 1
    for length in entry["shape"]:
        count *= length
    if count * _ELEMENT_BYTES[entry["dtype"]] != end - begin:
        raise ValueError(f"{name} has {end - begin} bytes")
    return end


def _saved_description(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    if metadata.get("format") != _FORMAT:
        _refuse(path, "what save_optimizer wrote", "a safetensors file of something else")
    version = metadata.get("format_version", "")
    if not version.isdecimal() or int(version) > _VERSION:
        _refuse(path, f"format version {_VERSION} or older", f"{version or 'none'}")
    try:
        saved: dict[str, Any] = json.loads(metadata["optimizer"])
        saved["class"]
    except (ValueError, KeyError, TypeError) as error:
        _refuse(path, "the optimizer's hyper-parameters", f"metadata that cannot be read ({error})")
    return saved


def _fitting_state(
    path: Path, arrays: dict[str, mx.array], optimizer: Adam | AdamW
) -> dict[str, Any]:
    """The state tree of the file, in the containers of the optimizer's own if it has one."""

    def is_extra(name: str) -> bool:
        return name in GUARD_STATE or name.rpartition(".")[2] in EXTRAS

    for name in ("step", "learning_rate"):
        if name not in arrays:
            _refuse(path, name, "none")
    known = dict(tree_flatten(optimizer.state))
    has_state = any("." in name or isinstance(x, dict) for name, x in known.items())
    state: dict[str, Any]
    if not has_state:
        state = tree_unflatten(list(arrays.items()))
        return state
    mine = {name for name in known if not is_extra(name)}
    theirs = {name for name in arrays if not is_extra(name)}
    for missing, got in ((mine - theirs, "none"), (theirs - mine, "one that the optimizer lacks")):
        if missing:
            _refuse(path, f"the optimizer's state of {min(missing)}", got)
    for name in sorted(mine):
        if arrays[name].shape != known[name].shape:
            _refuse(path, f"{name} of shape {known[name].shape}", f"shape {arrays[name].shape}")

    def of_file(path: str, old: dict) -> dict[str, Any]:
        """With just those extras that the file has."""
        inner = f"{path}." if path else ""
        plain = {k: x for k, x in old.items() if k not in EXTRAS}
        return plain | {k: arrays[inner + k] for k in EXTRAS if inner + k in arrays}

    state = tree_map_with_path(lambda name, x: arrays.get(name, x), optimizer.state)
    for name in GUARD_STATE:
        if isinstance(state.get(name), mx.array):
            del state[name]
        if name in arrays:
            state[name] = arrays[name]
    state = map_states(of_file, state)
    return state
