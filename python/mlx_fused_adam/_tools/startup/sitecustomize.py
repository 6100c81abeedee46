"""Install the fused optimizers in every Python under `python -m mlx_fused_adam run`, which puts this folder on
PYTHONPATH.

The import of mlx.optimizers triggers it, so that processes without MLX start as fast as before. Then this module
removes itself from the path and imports the user's sitecustomize, if there is one.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

_AWAITED = ("mlx.optimizers", "mlx_fused_adam")
_started = False


class _Finder(importlib.abc.MetaPathFinder):
    """Find a module with the other finders, and call `_loaded` once it is loaded."""

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname not in _AWAITED:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = find and find(fullname, path, target)
            if spec and spec.loader:
                spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> object:
        # Code that inspects the module before it is loaded sees its own loader.
        return getattr(self.__dict__["_loader"], name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        _loaded(module.__name__)


def _loaded(name: str) -> None:
    global _started
    if name == "mlx_fused_adam":
        if _started:  # reloaded, or found through another finder like this one
            return
        _started = True
        importlib.import_module("mlx_fused_adam._tools.run").start()
        return
    try:
        # If mlx_fused_adam itself imports mlx.optimizers, `_loaded` is called for it once it is complete.
        importlib.import_module("mlx_fused_adam")
    except ImportError as error:  # another Python than that of `run`
        if sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):
                print(
                    f"mlx-fused-adam: this process keeps mlx.optimizers: {error}",
                    file=sys.stderr,
                )


def _give_way() -> None:
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder or os.curdir) != here]
    this = sys.modules.pop(__name__)
    try:
        importlib.import_module(__name__)
    except ModuleNotFoundError as error:
        if error.name != __name__:
            raise
    finally:
        sys.modules.setdefault(__name__, this)


sys.meta_path.insert(0, _Finder())
_give_way()
