"""`install`: every mlx.optimizers.Adam, AdamW and MultiOptimizer becomes the fused one when it is built.

No name is replaced: an object changes its class at the start of `__init__`. So it does not matter where the class was
imported, or whether a dict or an Enum holds it. Objects that `__init__` does not build (unpickled, copied), subclasses,
and classes whose methods someone has patched stay MLX's.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import threading
from collections import Counter
from typing import Any

import mlx.optimizers as optim

from .. import _reference
from .._multi_optimizer import MultiOptimizer
from .._optimizers import Adam, AdamW

Fused = type[Adam] | type[AdamW] | type[MultiOptimizer]

_CLASSES: tuple[Fused, ...] = (Adam, AdamW, MultiOptimizer)
_FUSED: dict[type, Fused] = {getattr(optim, fused.__name__): fused for fused in _CLASSES}
_PARAMETERS = {fused: inspect.signature(fused).parameters for fused in _CLASSES}
# The methods that the fused classes override. If a program patches one in MLX's class, its patch is kept.
_OVERRIDDEN = ("init", "init_single", "apply_gradients", "apply_single")


def _methods(kind: type) -> list[Any]:
    """Those of a class and of each of its bases, since AdamW calls Adam's."""
    return [vars(base).get(name) for base in kind.__mro__[:-1] for name in _OVERRIDDEN]


_ORIGINAL_METHODS = {kind: _methods(kind) for kind in _FUSED}
_active: list[Installation] = []  # options of later ones win
_originals: dict[Any, Any] = {}
_lock = threading.RLock()


class Installation:
    """An active `install`; ends at `undo()`, or with its `with` block."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        # Optimizers built so far, by class name: fused ones, and those that stayed MLX's.
        self.built: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.is_logged = False  # whether the user knows

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={x!r}" for name, x in self.options.items())
        return f"<install({given}), {'active' if self in _active else 'ended'}>"

    def undo(self) -> None:
        """Return to mlx.optimizers, or to an earlier `install`; calling it again has no effect."""
        with _lock:
            if self in _active:
                _active.remove(self)
            if not _active:
                _restore()

    def begin(self) -> None:
        with _lock:
            # Those of now, since a program may have reloaded MLX's module.
            for fused in _CLASSES:
                kind = getattr(optim, fused.__name__)
                if kind not in _originals:
                    _FUSED[kind] = fused
                    _ORIGINAL_METHODS.setdefault(kind, _methods(kind))
                    _patch(kind, fused)
            _active.append(self)

    def count(self, name: str) -> None:
        """Count an optimizer of this class that has become fused; log the first one."""
        self.built[name] += 1
        if not self.is_logged:
            self.is_logged = True
            log(f"mlx.optimizers.{name} is built as mlx_fused_adam.{name} from here on, by {self!r}")

    @property
    def unused(self) -> list[str]:
        """The options that none of the classes built so far takes."""
        taken = {name for fused in _CLASSES if self.built[fused.__name__] for name in _PARAMETERS[fused]}
        return [name for name in self.options if name not in taken] if self.built else []

    def __enter__(self) -> Installation:
        if self not in _active:
            self.begin()
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _taken(options: dict[str, Any], fused: Fused) -> dict[str, Any]:
    return {name: x for name, x in options.items() if name in _PARAMETERS[fused]}


def installed() -> dict[str, Any] | None:
    """The options of all active installations, later ones over earlier ones; None if there is no installation."""
    with _lock:
        return {name: x for installation in _active for name, x in installation.options.items()} if _active else None


def uninstall() -> None:
    """End every active `install`, also one whose return value is lost, as in a notebook cell that was run twice."""
    with _lock:
        _active.clear()
        _restore()


def log(line: str) -> None:
    """Write one line to stderr, whatever has become of it."""
    rank = os.environ.get("MLX_RANK")
    who = f"mlx-fused-adam (rank {rank})" if rank else "mlx-fused-adam"
    if sys.stderr is None:
        return
    # A full disk or a closed pipe must not end a training run, nor make it fail at exit because of a buffered line.
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
        try:
            file = sys.stderr.fileno()
        except (AttributeError, OSError):  # replaced by the program
            print(f"{who}: {line}", file=sys.stderr, flush=True)
        else:
            os.write(file, f"{who}: {line}\n".encode())


def install(**options: Any) -> Installation:
    """Build the fused optimizer wherever code builds ``mlx.optimizers.Adam``, ``AdamW`` or ``MultiOptimizer``.

    It does not matter where or when a module imported the class. Existing optimizers, pickles of them, and subclasses
    of MLX's classes stay as they are. Use it for third-party training code::

        with fused.install(max_grad_norm=1.0):
            train()

    Args:
        **options: Arguments of :class:`Adam` and :class:`AdamW` except ``learning_rate``. They are defaults: explicit
            arguments win. ``weight_decay`` and ``decay_filter`` apply to AdamW alone; of MultiOptimizer,
            ``max_grad_norm``, ``skip_nonfinite`` and ``shard_group``, which then act once over all parts. Options of
            an installation that is active already stay, unless they are given anew.

    Returns:
        Installation: Its ``undo()`` ends it, and so does the end of a ``with`` block. It logs the first optimizer that
        it changes. :func:`uninstall` ends all of them, and :func:`installed` tells what is active.

    Raises:
        ValueError: For an option's value that is not among its choices.
        TypeError: For an unknown option, or ``learning_rate``.
    """
    if "learning_rate" in options:
        raise TypeError(
            "[install] option must be one that code may leave out but got 'learning_rate', which the code sets itself"
        )
    installation = Installation(options)
    Adam(0.0, **_taken(options, Adam))
    AdamW(0.0, **options)  # takes every option, so it names an unknown one
    installation.begin()
    return installation


def _patch(kind: Any, fused: Fused) -> None:
    original = _originals[kind] = kind.__init__
    initialize: Any = fused.__init__

    @functools.wraps(original)
    def build(self: Any, *args: Any, **kwargs: Any) -> Any:
        installation = _active[-1] if _active else None
        nearest = next(x for x in type(self).__mro__ if x in _FUSED)
        if installation is None or nearest is not kind or _is_own(type(self)):
            return original(self, *args, **kwargs)
        if type(self) is not kind or _is_patched(kind):
            installation.kept[type(self).__name__] += 1
            return original(self, *args, **kwargs)
        positional = list(_PARAMETERS[fused])[: len(args)]
        defaults = {k: x for k, x in _taken(installed() or {}, fused).items() if k not in positional}
        self.__class__ = fused
        initialize(self, *args, **(defaults | kwargs))
        installation.count(fused.__name__)
        return None

    kind.__init__ = build


def _is_own(kind: type) -> bool:
    """Whether a class is this package's, or derived from one."""
    return issubclass(kind, _CLASSES) or kind.__module__ == _reference.__name__


def _is_patched(kind: type) -> bool:
    """Whether someone has patched methods of MLX's class, before or after the import of this package."""
    found = _methods(kind)
    modules = {getattr(x, "__module__", None) for x in found if x}
    return found != _ORIGINAL_METHODS[kind] or modules != {kind.__module__}


def _restore() -> None:
    for kind, original in _originals.items():
        # A later patch by others stays; the one below it has no effect without an installation.
        if getattr(kind.__init__, "__wrapped__", None) is original:
            kind.__init__ = original
    _originals.clear()
