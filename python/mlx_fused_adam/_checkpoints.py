"""Save an optimizer to one safetensors file, atomically, and load it.

Atomic: the file is written to a temporary name, flushed to the disk and renamed over the old one. Its metadata
describes the optimizer: format, class, hyper-parameters, options, step, containers. Loading reads and compares
everything before it changes anything.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
from mlx.optimizers import MultiOptimizer as _MLXMultiOptimizer
from mlx.utils import tree_map_with_path, tree_unflatten

from ._clipping import RECORDED, fit_recorded
from ._multi_optimizer import MultiOptimizer, undo_of, with_inner
from ._optimizers import Adam, AdamW
from ._state import AUXILIARY, MOMENTS, map_states, unpacked_shapes
from ._structure import can_be_guessed, described, fitted, is_one_state, rebuilt
from ._tree import flattened

_FORMAT = "mlx_fused_adam.optimizer"
# Version 1 has no description of containers. It is still written where a reader of version 1 guesses them right.
_VERSION = 2
_CHOICES = ("error", "file", "optimizer")
_WAY = (
    "a file of save_optimizer, or the state of mlx.optimizers' Adam, AdamW or MultiOptimizer as "
    "mx.save_safetensors(path, dict(tree_flatten(optimizer.state))) writes it"
)
# What fsync answers on file systems that have none, such as network shares.
_NO_FSYNC = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


Optimizer = Adam | AdamW | MultiOptimizer


def save_optimizer(path: str | os.PathLike[str], optimizer: Optimizer) -> None:
    """Write the optimizer's state, hyper-parameters and options to one safetensors file, atomically.

    The file restores the state's dicts, lists and tuples, with string and integer keys as they are. Later changes of
    ``learning_rate`` belong to the state, and are saved with it. A MultiOptimizer is saved with all its parts, those
    that are not fused with the numbers, strings and None among their attributes.

    Args:
        path: The file, under exactly this name: no suffix is appended, and any suffix gives a safetensors file. An
            existing one is replaced once the new one is complete, and keeps its permissions; a symbolic link is
            followed.
        optimizer: Its state is evaluated and saved.

    Raises:
        TypeError: If it is not an optimizer of this package, or its state holds something other than arrays, numbers
            and strings.
        OSError: If the file cannot be written; the previous one is untouched.
    """
    _check_kind("save_optimizer", optimizer)
    path = Path(path)
    structure, arrays = described(optimizer.state)
    mx.eval(arrays)
    metadata = {
        "format": _FORMAT,
        "format_version": "1" if can_be_guessed(optimizer.state) else str(_VERSION),
        "optimizer": json.dumps(_description(optimizer)),
        "step": str(int(optimizer.step)),
        "tree": json.dumps(structure, separators=(",", ":")),
    }
    with _errors_named(path):
        _write(path, arrays, metadata)


def load_optimizer(path: str | os.PathLike[str], optimizer: Optimizer, *, hyperparameters: str = "error") -> None:
    """Load a saved optimizer; training continues bit for bit as if it had not stopped.

    The file's parameters must be the optimizer's: those of its state if it has one already, and those of its next
    ``init`` or update. Parameters that the model has, but that get no gradient in the first
    ``update(model, gradients)``, keep the file's state. To train more or fewer parameters than the saved run, call
    ``init`` with the saved run's first; then freeze or unfreeze, and call ``init(model.trainable_parameters())`` for
    new ones.

    Args:
        path: A file that :func:`save_optimizer` wrote, or the state of ``mlx.optimizers.Adam``, ``AdamW`` or
            ``MultiOptimizer`` as ``mx.save_safetensors(path, dict(tree_flatten(optimizer.state)))`` writes it. The
            latter has no hyper-parameters to compare, and is converted to the optimizer's options at its next use.
        optimizer: An optimizer of the saved class, a MultiOptimizer with the saved classes of parts. If it has a state
            already (from ``init``, say), the file's must have the same paths and shapes.
        hyperparameters: What to do where hyper-parameters or options differ: ``"error"``: raise; ``"file"``: take the
            file's; ``"optimizer"``: keep the optimizer's, convert the state to its options at its next use, and let an
            Adam load an AdamW's file, or the reverse. The learning rate is part of the state, and loaded with it but
            for ``"optimizer"``; one that follows a schedule is always the optimizer's. Default: ``"error"``.

    Raises:
        ValueError: If the file is damaged, foreign, of a newer format, or does not fit, naming the mismatch; nothing
            has changed then. Where the optimizer has no state to compare, its next use raises.
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
    saved: dict[str, Any] | None = None
    if metadata.get("format") == _FORMAT:
        saved = _saved_description(path, metadata)
        read = _saved_state(path, arrays, metadata)
    else:
        read = _state_of_mlx(path, arrays, optimizer)
    loads = _loads(path, saved, read, optimizer, hyperparameters)
    undos = [undo_of(part) for part in with_inner([optimizer])]
    try:
        for load in loads:
            load()
    except BaseException:
        for undo in undos:
            undo()
        raise


def _loads(
    path: Path, saved: dict[str, Any] | None, read: Any, optimizer: Any, hyperparameters: str
) -> list[Callable[[], None]]:
    """What gives the optimizer, or each of its parts, the file's state, once all of it has been compared.

    Args:
        saved: The file's description; None for a state that MLX saved.
    """
    if isinstance(optimizer, _MLXMultiOptimizer):
        return _loads_of_parts(path, saved, read, optimizer, hyperparameters)
    own = _description(optimizer)
    is_fused = isinstance(optimizer, (Adam, AdamW))
    values = ("step", "learning_rate") if is_fused else ("step",)
    if saved is None:
        _check_values(path, read, values)
        is_scheduled = own["learning_rate"] in ("schedule", None)
        saved = own if is_scheduled else own | {"learning_rate": _rounded(read["learning_rate"])}
    differing = _differing(path, saved, own, hyperparameters)
    _check_values(path, read, values)
    state = _fitting_state(path, read, optimizer) if is_fused else _same_state(path, read, optimizer)
    is_scheduled = own["learning_rate"] == saved.get("learning_rate") == "schedule"
    if hyperparameters == "optimizer" and not is_scheduled and "learning_rate" in optimizer.state:
        state["learning_rate"] = optimizer.state["learning_rate"]
    taken = {k: saved[k] for k in differing if k in saved} if hyperparameters == "file" else {}
    compared = saved.keys() | own.keys()

    def load() -> None:
        if is_fused:
            optimizer._take_description(taken)
            fit_recorded(state, optimizer._options)
        else:
            vars(optimizer).update({k: x for k, x in taken.items() if k in vars(optimizer)})
        for name in compared & _parted(state)[0].keys() - optimizer.state.keys():
            del state[name]  # the value of a schedule that this optimizer does not have
        # The same dict, which a compiled step may have captured; the setter lets the next use convert the state.
        tree = optimizer.state
        optimizer.state = tree
        tree.clear()
        tree.update(state)
        # A file of an optimizer that had seen no parameters fits any.
        is_new = not _has_parameters(state) and int(state["step"]) == 0
        optimizer._loaded = None if is_new else (str(path), tree)

    return [load]


def _loads_of_parts(
    path: Path, saved: dict[str, Any] | None, read: Any, optimizer: Any, hyperparameters: str
) -> list[Callable[[], None]]:
    own = _description(optimizer)
    count = len(own["parts"])
    if saved is None:
        saved = own | {"parts": [None] * count}
    differing = _differing(path, _without_parts(saved), _without_parts(own), hyperparameters)
    descriptions: Any = saved.get("parts")
    states: Any = read.get("states") if isinstance(read, dict) else None
    for found in (descriptions, states):
        if not isinstance(found, (list, tuple)) or len(found) != count:
            got = f"that of {len(found)}" if isinstance(found, (list, tuple)) else "none"
            _reject(path, f"the state of {count} parts", got)
    loads = []
    for i, part in enumerate(optimizer.optimizers):
        try:
            loads += _loads(path, descriptions[i], states[i], part, hyperparameters)
        except ValueError as error:
            raise ValueError(f"{error} (part {i}, {type(part).__name__})") from None

    def load() -> None:
        if hyperparameters == "file":
            optimizer._change_options(optimizer._options.replaced({k: saved[k] for k in differing if k in saved}))
        optimizer.state = read | {"states": optimizer.state["states"]}

    return [*loads, load] if isinstance(optimizer, MultiOptimizer) else loads


def _check_kind(op: str, optimizer: Any) -> None:
    if not isinstance(optimizer, (Adam, AdamW, MultiOptimizer)):
        raise TypeError(
            f"[{op}] optimizer must be an Adam, AdamW or MultiOptimizer of mlx_fused_adam but got {optimizer!r}"
        )


def _description(optimizer: Any) -> dict[str, Any]:
    """Class, hyper-parameters and options in JSON's types; those of the parts under ``parts``."""
    if isinstance(optimizer, _MLXMultiOptimizer):
        options = optimizer._options.described() if isinstance(optimizer, MultiOptimizer) else {}
        own = {"max_grad_norm": None, "skip_nonfinite": False, "shard_group": None}
        own |= {k: x for k, x in options.items() if k in own}
        return {"class": "MultiOptimizer", **own, "parts": [_description(x) for x in optimizer.optimizers]}
    if isinstance(optimizer, (Adam, AdamW)):
        kind = AdamW if isinstance(optimizer, AdamW) else Adam
        return {"class": kind.__name__, **optimizer._description()}
    public = {k: x for k, x in vars(optimizer).items() if not k.startswith("_")}
    plain = {k: list(x) if isinstance(x, tuple) else x for k, x in public.items() if _is_plain(x)}
    rate: Any = optimizer.state.get("learning_rate")
    if rate is not None:
        rate = "schedule" if "learning_rate" in optimizer._schedulers else _rounded(rate)
    # Not the name of a fused one, whose state has another form.
    return {"class": f"{type(optimizer).__name__} (not fused)", "learning_rate": rate, **plain}


def _is_plain(x: Any) -> bool:
    """Whether JSON can tell a hyper-parameter."""
    if isinstance(x, (list, tuple)):
        return all(map(_is_plain, x))
    return x is None or isinstance(x, (bool, int, float, str))


def _without_parts(description: dict[str, Any]) -> dict[str, Any]:
    return {k: x for k, x in description.items() if k != "parts"}


# ---- Write ----


@contextlib.contextmanager
def _errors_named(path: Path) -> Iterator[None]:
    """Errors of the system under the user's path instead of the temporary file's."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, os.strerror(error.errno), str(path)) from error


def _write(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str]) -> None:
    target = Path(os.path.realpath(path))
    old = None
    with contextlib.suppress(FileNotFoundError):
        old = os.stat(target)
    if old and not stat.S_ISREG(old.st_mode):
        is_folder = stat.S_ISDIR(old.st_mode)
        raise OSError(errno.EISDIR if is_folder else errno.EINVAL, "not a regular file")
    # A short name, since the target's may be as long as the file system allows; mx.save_safetensors requires the
    # suffix.
    name = target.parent / f".save_optimizer-{secrets.token_hex(8)}.safetensors"
    # The system applies the umask.
    os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        try:
            mx.save_safetensors(str(name), arrays, metadata)
        except RuntimeError as error:  # as on a full disk
            raise OSError(f"[save_optimizer] {path} cannot be written: {error}") from error
        if old:
            with contextlib.suppress(OSError):  # another owner's, or a file system that has no modes
                os.chmod(name, stat.S_IMODE(old.st_mode))
        _flush(name)
        os.replace(name, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    # The new file is in place: a folder that cannot be flushed, or read, is no error.
    with contextlib.suppress(OSError):
        _flush(target.parent)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in _NO_FSYNC:
            raise
    finally:
        os.close(handle)


# ---- Read ----


def _reject(path: Path, wanted: str, got: str) -> NoReturn:
    raise ValueError(f"[load_optimizer] {path} must hold {wanted} but got {got}")


def _read(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Read arrays and metadata, whole: MLX would read arrays later, when the optimizer has changed.

    MLX checks header, dtypes, shapes and offsets. It does not see bytes that follow the last array.
    """
    wanted = "a whole safetensors file"
    with path.open("rb") as file:
        start = file.read(9)
    try:
        loaded: Any = mx.load(str(path), format="safetensors", return_metadata=True)
        mx.eval(loaded)
    except (RuntimeError, UnicodeDecodeError) as error:
        hint = "" if start[8:] == b"{" else f"; it must be {_WAY}"
        _reject(path, wanted, f"an error: {error}{hint}")
    arrays: dict[str, mx.array]
    arrays, metadata = loaded
    size = path.stat().st_size
    expected = 8 + int.from_bytes(start[:8], "little") + sum(x.nbytes for x in arrays.values())
    if size != expected:
        _reject(path, wanted, f"{size} bytes instead of {expected}")
    return arrays, metadata or {}  # some releases of MLX give None for "__metadata__": null


def _saved_description(path: Path, metadata: dict[str, str]) -> dict[str, Any]:
    version = metadata.get("format_version", "")
    if not version.isdecimal() or int(version) > _VERSION:
        _reject(path, f"format version {_VERSION} or older", f"{version or 'none'}")
    try:
        saved: dict[str, Any] = json.loads(metadata["optimizer"])
        saved["class"]
    except (ValueError, KeyError, TypeError) as error:
        _reject(path, "the optimizer's hyper-parameters", f"metadata that cannot be read ({error})")
    return _with_defaults(saved)


def _with_defaults(description: dict[str, Any]) -> dict[str, Any]:
    """A description that may lack the options that came after it was written."""
    if "master_weights" in description:
        description = {"master_weight_bits": 32} | description
    if isinstance(description.get("parts"), list):
        description["parts"] = [_with_defaults(part) for part in description["parts"]]
    return description


def _saved_state(path: Path, arrays: dict[str, mx.array], metadata: dict[str, str]) -> Any:
    """The state in the containers that it was saved from; the first release's files do not describe them."""
    state: Any
    if "tree" in metadata:
        try:
            state = rebuilt(json.loads(metadata["tree"]), arrays)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            _reject(path, "the containers of its state", f"metadata that cannot be read ({error!r})")
    else:
        state = _guessed(arrays)
    return state


def _guessed(arrays: dict[str, mx.array]) -> Any:
    """A tree guessed from paths; the first use of the state puts it in its parameters' containers."""
    try:
        return tree_unflatten(list(arrays.items()))
    except (AttributeError, IndexError, TypeError, ValueError):  # older releases, of {"0": …, "a": …}, say
        state: dict[str, Any] = {}
        for name, x in arrays.items():
            *path, last = name.split(".")
            inner = state
            for key in path:
                inner = inner.setdefault(key, {})
            inner[last] = x
        return state


def _check_values(path: Path, state: Any, names: tuple[str, ...]) -> None:
    for name in names:
        if not isinstance(state, dict) or name not in state:
            _reject(path, name, "none")
        if isinstance(state[name], mx.array) and state[name].shape != ():
            _reject(path, f"a scalar {name}", f"one of shape {state[name].shape}")


def _state_of_mlx(path: Path, arrays: dict[str, mx.array], optimizer: Any) -> Any:
    """The state of the optimizer's counterpart in mlx.optimizers, in the containers that mlx.utils guesses."""
    if isinstance(optimizer, _MLXMultiOptimizer):
        states: dict[str, dict[str, mx.array]] = {}
        for name, x in arrays.items():
            kind, number, inner = (*name.split(".", 2), "", "")[:3]
            if kind != "states" or not inner:
                _reject(path, _WAY, f"{name}, which is of no MultiOptimizer's part")
            states.setdefault(number, {})[inner] = x
        parts = [(part, states.pop(str(i), {})) for i, part in enumerate(optimizer.optimizers)]
        if states:
            _reject(path, f"the state of {len(parts)} parts", f"that of part {min(states)}")
        return {"states": [_state_of_mlx(path, some, part) for part, some in parts]}
    if not isinstance(optimizer, (Adam, AdamW)):
        return _guessed(arrays)
    found: dict[str, set[str]] = {}
    for name in arrays:
        parameter, _, last = name.rpartition(".")
        found.setdefault(parameter, set()).add(last)
    of_optimizer = found.pop("", set())
    if not {"step", "learning_rate"} <= of_optimizer:
        _reject(path, _WAY, "a safetensors file of something else, without step and learning_rate")
    for parameter, names in sorted(found.items()):
        if names != set(MOMENTS):
            _reject(path, _WAY, f"{', '.join(sorted(names))} instead of m, v of {parameter}")
    return _saved_state(path, arrays, {})


def _rounded(learning_rate: Any) -> float:
    return float(f"{float(learning_rate):.7g}")  # float32's digits


def _differing(path: Path, saved: dict[str, Any], own: dict[str, Any], hyperparameters: str) -> list[str]:
    """The names of hyper-parameters and options that differ.

    Raises:
        ValueError: If ``hyperparameters`` does not allow them to.
    """
    if saved.get("shard_group") != own.get("shard_group"):
        named = [x.get("shard_group") or "unsharded parameters" for x in (own, saved)]
        _reject(path, f"the state of {named[0]}", f"that of {named[1]}")
    differing = [k for k in sorted(own | saved) if own.get(k) != saved.get(k)]
    if "class" in differing:
        are_alike = {own["class"], saved["class"]} <= {"Adam", "AdamW"}
        way = f" (pass hyperparameters='optimizer' to go on as {own['class']})" if are_alike else ""
        if not are_alike or hyperparameters != "optimizer":
            _reject(path, f"the state of {own['class']}", f"that of {saved['class']}{way}")
    rates = [x.get("learning_rate") for x in (saved, own)]
    compared = [k for k in differing if k != "learning_rate" or "schedule" in rates]
    if compared and hyperparameters == "error":
        told = "; ".join(f"{k} (file: {saved.get(k)!r}, optimizer: {own.get(k)!r})" for k in compared)
        _reject(
            path,
            "the optimizer's hyper-parameters",
            f"{told}; pass hyperparameters='file' or 'optimizer' to choose",
        )
    if hyperparameters == "file":
        unreadables = {"decay_filter": "callable", "learning_rate": "schedule", "weight_decay": "schedule"}
        for name, unreadable in unreadables.items():
            if name in differing and saved.get(name) == unreadable:
                _reject(
                    path,
                    f"a {name} that can be read",
                    f"a {unreadable}: give it to the optimizer",
                )
    return differing


def _fitting_state(path: Path, read: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """The file's state, in the containers of the optimizer's own if it has one; else its next use compares it."""
    own_values, own = _parted(optimizer.state)
    values, saved = _parted(read)
    for name in own_values.keys() - values.keys() - RECORDED:
        values[name] = own_values[name]  # of a schedule that the saved run did not have
    has_met_parameters = not (optimizer._loaded and optimizer._loaded[1] is optimizer.state)
    if not (has_met_parameters and flattened(own)):
        return values | saved

    def takes(part: Any) -> bool:
        return isinstance(part, mx.array) or is_one_state(part)

    def by_name(tree: Any) -> dict[str, Any]:
        return {k: x for k, x in flattened(tree) if k.rpartition(".")[2] not in AUXILIARY}

    def shapes_of(name: str) -> list[tuple[int, ...]]:
        prefix, dot, last = name.rpartition(".")
        keys = {k: f"{prefix}{dot}{k}" for k in (*MOMENTS, last)}
        states = [{k: x[key] for k, key in keys.items() if key in x} for x in (known, fitting)]
        return unpacked_shapes(last, (states[0], states[1]))

    fit = fitted(saved, map_states(lambda _, state: state["m"], own), takes)
    known, found = by_name(own), by_name(saved)
    missing = known.keys() - found.keys() or fit.lacking
    unknown = found.keys() - known.keys() or fit.unused
    for names, got in ((missing, "none"), (unknown, "one that the optimizer lacks")):
        if names:
            way = (
                "use this model's file, or load it before init, which takes the file's parameters first and then others"
            )
            _reject(path, f"the optimizer's state of {min(names)}", f"{got}; {way}")
    fitting = by_name(fit.state)
    for name in sorted(known):
        own_shape, found_shape = shapes_of(name)
        if own_shape != found_shape:
            _reject(path, f"{name} of shape {own_shape}", f"shape {found_shape}")
    return values | fit.state


def _same_state(path: Path, read: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """The file's state of an optimizer that is not fused, in the containers of its own if it has one."""
    loaded = getattr(optimizer, "_loaded", None)
    if (loaded and loaded[1] is optimizer.state) or not _has_parameters(optimizer.state):
        return {k: x for k, x in optimizer.state.items() if not isinstance(x, (dict, list, tuple))} | read
    own, found = dict(flattened(optimizer.state)), dict(flattened(read))
    for names, got in ((own.keys() - found.keys(), "none"), (found.keys() - own.keys(), "one that it lacks")):
        if names:
            _reject(path, f"the optimizer's state of {min(names)}", got)
    for name, x in sorted(own.items()):
        shapes = [getattr(array, "shape", ()) for array in (x, found[name])]
        if shapes[0] != shapes[1]:
            _reject(path, f"{name} of shape {shapes[0]}", f"shape {shapes[1]}")
    state: dict[str, Any] = tree_map_with_path(lambda name, _: found[name], optimizer.state)
    return state


def _parted(state: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """A state's values, such as step and learning rate, and the parameters' states."""
    is_value = {k: not isinstance(x, (dict, list, tuple)) for k, x in state.items()}
    values = {k: x for k, x in state.items() if is_value[k]}
    return values, {k: x for k, x in state.items() if not is_value[k]}


def _has_parameters(state: dict[str, Any]) -> bool:
    return bool(flattened(_parted(state)[1]))
