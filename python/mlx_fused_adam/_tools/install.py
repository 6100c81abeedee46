"""Makes every mlx.optimizers.Adam and AdamW that is built one of ours, for code that is not to be changed.

The stock classes stay where they are, and whoever imported them earlier has the same ones. An object changes its class at the
beginning of their `__init__`: so no name is replaced anywhere, a dict or an Enum that holds the classes works too, and stock
optimizers that are unpickled or copied, which `__init__` does not build, stay stock. Subclasses stay what they are, and so does
a class into which someone has put a rule of his own.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections import Counter
from types import TracebackType
from typing import Any

import mlx.optimizers as stock

from .. import _reference
from .._optimizers import Adam, AdamW

_OURS: dict[type[stock.Adam], type[Adam] | type[AdamW]] = {stock.Adam: Adam, stock.AdamW: AdamW}
_PARAMETERS = {ours: inspect.signature(ours).parameters for ours in _OURS.values()}
# What ours override. A program that puts another function there wants that one.
_OVERRIDDEN = ("init", "init_single", "apply_gradients", "apply_single")
_STOCK = {kind: [getattr(kind, name) for name in _OVERRIDDEN] for kind in _OURS}
_active: list[Installation] = []  # the last one counts
_originals: dict[type[stock.Adam], Any] = {}
_lock = threading.RLock()


class Installation:
    """What `install` returns: ends with `undo()`, or with the `with` block that it opens."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        # Optimizers so far, by the name of their class: ours, and those that stayed what they were.
        self.built: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()

    def undo(self) -> None:
        """Let mlx.optimizers build its own again, or what an earlier `install` asks for; more than once does no harm."""
        with _lock:
            if self in _active:
                _active.remove(self)
            if not _active:
                _restore()

    def begin(self) -> None:
        with _lock:
            if not _originals:
                for kind, ours in _OURS.items():
                    _replace(kind, ours)
            _active.append(self)

    def __enter__(self) -> Installation:
        if self not in _active:
            self.begin()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()

    def defaults(self, ours: type[Adam] | type[AdamW]) -> dict[str, Any]:
        """Those of the options that this class takes."""
        return {name: x for name, x in self.options.items() if name in _PARAMETERS[ours]}


def install(**options: Any) -> Installation:
    """Make every ``mlx.optimizers.Adam`` and ``AdamW`` that is built from now on one of ours.

    It does not matter from where or when a module imported the class. Optimizers that exist already, pickles of them, and
    subclasses of the stock classes stay as they are. Use it for training code that you do not own::

        with fused.install(max_grad_norm=1.0):
            train()

    Args:
        **options: Arguments of :class:`Adam` and :class:`AdamW`, but ``learning_rate``. They are defaults: what the code passes
            itself has precedence. ``weight_decay`` and ``decay_filter`` are for AdamW alone.

    Returns:
        Installation: Its ``undo()`` ends it, and so does the end of a ``with`` block.

    Raises:
        ValueError: For an option's value that is none of those to choose from.
        TypeError: For an option that there is not, or ``learning_rate``.
    """
    if "learning_rate" in options:
        raise TypeError(
            "[install] option must be one that code may leave out but got 'learning_rate', which the code sets itself"
        )
    # Stock takes whatever is true; of a string in JSON or YAML that is a mistake.
    if not isinstance(correction := options.get("bias_correction", False), bool):
        raise TypeError(f"[install] bias_correction must be True or False but got {correction!r}")
    installation = Installation(options)
    for ours in _OURS.values():
        # AdamW, which takes every option, names those that there are not.
        ours(0.0, **(options if ours is AdamW else installation.defaults(ours)))
    installation.begin()
    return installation


def _replace(kind: type[stock.Adam], ours: type[Adam] | type[AdamW]) -> None:
    original = _originals[kind] = kind.__init__
    initialize: Any = ours.__init__  # of an object that has become ours

    @functools.wraps(original)
    def build(self: Any, *args: Any, **kwargs: Any) -> None:
        installation = _active[-1] if _active else None
        nearest = next(x for x in type(self).__mro__ if x in _OURS)
        if installation is None or nearest is not kind or _is_own(type(self)):
            return original(self, *args, **kwargs)
        if type(self) is not kind or _has_other_rule(kind):
            installation.kept[type(self).__name__] += 1
            return original(self, *args, **kwargs)
        by_place = list(_PARAMETERS[ours])[: len(args)]
        defaults = {k: x for k, x in installation.defaults(ours).items() if k not in by_place}
        self.__class__ = ours
        initialize(self, *args, **(defaults | kwargs))
        installation.built[ours.__name__] += 1

    kind.__init__ = build  # type: ignore[method-assign]  # the one thing that this file is for


def _is_own(kind: type) -> bool:
    """Whether it is this package's, or derived from what is."""
    return issubclass(kind, (Adam, AdamW)) or kind.__module__ == _reference.__name__


def _has_other_rule(kind: type[stock.Adam]) -> bool:
    """Whether someone has put functions of his own into stock's class, before or after our import."""
    found = [getattr(kind, name) for name in _OVERRIDDEN]
    return found != _STOCK[kind] or {x.__module__ for x in found} != {kind.__module__}


def _restore() -> None:
    for kind, original in _originals.items():
        # Someone else's, put there since, stays; ours below it does nothing by itself.
        if getattr(kind.__init__, "__wrapped__", None) is original:
            kind.__init__ = original  # type: ignore[assignment, method-assign]
    _originals.clear()
