"""Save an optimizer to one safetensors file, atomically, and load it.

Atomic: the file is written to a temporary name, flushed to the disk and renamed over the old one. Its metadata
describes the optimizer: format, class, hyper-parameters, options, step. Loading reads and compares everything before it
changes anything.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
from mlx.utils import tree_flatten, tree_map_with_path, tree_unflatten

from ._clipping import RECORDED, fit_recorded
from ._optimizers import Adam, AdamW
from ._state import AUXILIARY, SHARED, map_states

_FORMAT = "mlx_fused_adam.optimizer"
_VERSION = 1
_CHOICES = ("error", "file", "optimizer")
_CHOOSE = "pass hyperparameters='file' or 'optimizer' to choose"


def save_optimizer(path: str | os.PathLike[str], optimizer: Adam | AdamW) -> None:
    """Write the optimizer's state, hyper-parameters and options to one safetensors file, atomically.

    Args:
        path: The file, with any suffix; an existing one is replaced once the new one is complete, and keeps its mode. A
            symbolic link is followed.
        optimizer: Its state is evaluated and saved, with the containers of the state tree.

    Raises:
        TypeError: If it is not an optimizer of this package.
        ValueError: If two parameters have one path, as ``{"a.w": …, "a": {"w": …}}`` has.
        OSError: If the file cannot be written; the previous one is untouched.
    """
    _check_kind("save_optimizer", optimizer)
    arrays: dict[str, mx.array] = {}
    optimizer._make_arrays()
    tree = _structure(optimizer.state, "", arrays)
    mx.eval(arrays)
    metadata = {
        "format": _FORMAT,
        "format_version": str(_VERSION),
        "optimizer": json.dumps(_description(optimizer)),
        "step": str(optimizer.step.item()),
        "tree": json.dumps(tree),
    }
    target = Path(os.path.realpath(path))
    if not target.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "No such folder to save an optimizer in", str(Path(path).parent))
    # A short name of its own, since the target's may have as many characters as a name can; mx.save_safetensors
    # requires the suffix. Opened by its mode, so that the umask applies.
    temporary = target.parent / f".{secrets.token_hex(8)}.safetensors"
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        if target.exists():
            os.chmod(temporary, stat.S_IMODE(target.stat().st_mode))
        mx.save_safetensors(str(temporary), arrays, metadata)
        _flush(temporary)
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    # The new file is in place: a folder that cannot be flushed, as on network shares, is no failure.
    with contextlib.suppress(OSError):
        _flush(target.parent)


def load_optimizer(path: str | os.PathLike[str], optimizer: Adam | AdamW, *, hyperparameters: str = "error") -> None:
    """Load a saved optimizer; training continues bit for bit as if it had not stopped.

    The first ``init`` or update after it raises if a parameter has no state in the file, or the file holds the state of
    something that is no parameter.

    Args:
        path: A file that :func:`save_optimizer` wrote; or a state of mlx.optimizers' Adam or AdamW, as written by
            ``mx.save_safetensors(path, dict(tree_flatten(optimizer.state)))``, without hyper-parameters to compare.
        optimizer: An optimizer of the saved class. If it has a state already (from ``init``, say), the file's must have
            the same paths and shapes.
        hyperparameters: What to do where hyper-parameters or options differ: ``"error"``: raise; ``"file"``: take the
            file's; ``"optimizer"``: keep the optimizer's, convert the state to its options at its next use, and let an
            Adam load an AdamW's file, or the reverse. The learning rate is part of the state, and loaded with it but
            for ``"optimizer"``; one that follows a schedule is always the optimizer's. Default: ``"error"``.

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
    own = _description(optimizer)
    saved = _saved_description(path, arrays, metadata, own)
    if saved["class"] != own["class"] and hyperparameters != "optimizer":
        _reject(path, f"the state of {own['class']}", f"that of {saved['class']} ({_CHOOSE})")
    if saved.get("shard_group") != own["shard_group"]:
        named = [x.get("shard_group") or "unsharded parameters" for x in (own, saved)]
        _reject(path, f"the state of {named[0]}", f"that of {named[1]}")
    differing = [k for k in sorted(own | saved) if own.get(k) != saved.get(k)]
    rates = (own["learning_rate"], saved["learning_rate"])
    if "schedule" not in rates and "learning_rate" in differing:
        differing.remove("learning_rate")
    if differing and hyperparameters == "error":
        told = "; ".join(f"{k}: file {saved.get(k)!r}, optimizer {own.get(k)!r}" for k in differing)
        _reject(path, "the optimizer's hyper-parameters", f"{told} ({_CHOOSE})")
    state = _fitting_state(path, arrays, metadata, optimizer)
    if hyperparameters == "optimizer" and rates[0] != rates[1]:
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
    optimizer._loaded_file = str(path)


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


def _read(path: Path) -> tuple[dict[str, mx.array], dict[str, str] | None]:
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


def _saved_description(
    path: Path, arrays: dict[str, mx.array], metadata: dict[str, str] | None, own: dict[str, Any]
) -> dict[str, Any]:
    """The description in the file; the optimizer's own for a state of mlx.optimizers, which has none."""
    if not metadata and "step" in arrays and "learning_rate" in arrays:
        rate = own["learning_rate"]
        return own if rate == "schedule" else own | {"learning_rate": arrays["learning_rate"].item()}
    if not metadata or metadata.get("format") != _FORMAT:
        _reject(
            path,
            "what save_optimizer wrote, or a state with step and learning_rate",
            "a safetensors file of something else",
        )
    version = metadata.get("format_version", "")
    if not version.isdecimal() or int(version) > _VERSION:
        _reject(path, f"format version {_VERSION} or older", f"{version or 'none'}")
    try:
        saved: dict[str, Any] = json.loads(metadata["optimizer"])
        saved["class"], saved["learning_rate"]
    except (ValueError, KeyError, TypeError) as error:
        _reject(path, "the optimizer's hyper-parameters", f"metadata that cannot be read ({error})")
    return saved


def _structure(tree: Any, path: str, arrays: dict[str, mx.array]) -> Any:
    """Describe a tree in JSON's types: an array by its name in the file, which is its path; containers by their items.

    Raises:
        ValueError: If two arrays have one path.
    """
    if isinstance(tree, dict):
        return {"dict": [[key, _structure(x, _joined(path, key), arrays)] for key, x in tree.items()]}
    if isinstance(tree, (list, tuple)):
        kind = "list" if isinstance(tree, list) else "tuple"
        return {kind: [_structure(x, _joined(path, i), arrays) for i, x in enumerate(tree)]}
    if path in arrays:
        raise ValueError(f"[save_optimizer] paths must be different but got {path} twice: rename a parameter")
    arrays[path] = tree
    return path


def _joined(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _rebuilt(tree: Any, arrays: dict[str, mx.array]) -> Any:
    """The tree that `_structure` described."""
    if isinstance(tree, str):
        return arrays[tree]
    ((kind, items),) = tree.items()
    if kind == "dict":
        return {key: _rebuilt(x, arrays) for key, x in items}
    return {"list": list, "tuple": tuple}[kind](_rebuilt(x, arrays) for x in items)


def _nested(arrays: dict[str, mx.array]) -> dict[str, Any]:
    """A tree guessed from paths, for files that hold no other; ``init`` puts states at their parameters' places."""
    try:
        state: dict[str, Any] = tree_unflatten(list(arrays.items()))
        return state
    except (AttributeError, IndexError, TypeError, ValueError):  # no one guess fits: {"0": …, "a": …}, say
        state = {}
        for name, x in arrays.items():
            *path, last = name.split(".")
            inner = state
            for key in path:
                inner = inner.setdefault(key, {})
            inner[last] = x
        return state


def _fitting_state(
    path: Path, arrays: dict[str, mx.array], metadata: dict[str, str] | None, optimizer: Adam | AdamW
) -> dict[str, Any]:
    """The state tree of the file; in the optimizer's containers if it has a state, else those of the file."""
    for name in ("step", "learning_rate"):
        if name not in arrays:
            _reject(path, name, "none")
    known = dict(tree_flatten(optimizer.state))
    if not any("." in name or isinstance(x, dict) for name, x in known.items()):
        if metadata and "tree" in metadata:
            try:
                state: dict[str, Any] = _rebuilt(json.loads(metadata["tree"]), arrays)
                return dict(state)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                _reject(path, "a whole safetensors file", f"metadata that cannot be read ({error!r})")
        return _nested(arrays)

    def without_options(names: dict[str, Any]) -> set[str]:
        return {k for k in names if k not in SHARED and k.rpartition(".")[2] not in AUXILIARY}

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
