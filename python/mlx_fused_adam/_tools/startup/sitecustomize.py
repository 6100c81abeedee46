"""Run by every Python that starts under `python -m mlx_fused_adam run`, whose launcher puts this folder first on PYTHONPATH.

Has the optimizers replaced as soon as mlx.optimizers is imported, if it ever is, so that other processes start as fast as
without. Then it takes itself off the path and gives way to the sitecustomize that it stands before, if there is one.
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
    """Finds what the other finders find, and has `_loaded` called after it."""

    def find_spec(
        self, fullname: str, path: object = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
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
        # Who looks at a module before it is loaded finds its own loader.
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
        if _started:  # reloaded, or found by way of another finder like this one
            return
        _started = True
        importlib.import_module("mlx_fused_adam._tools.run").start()
        return
    try:
        # If it is what is importing mlx.optimizers, its own turn comes when it is complete.
        importlib.import_module("mlx_fused_adam")
    except ImportError as error:  # another Python than the launcher's
        if sys.stderr is not None:
            with contextlib.suppress(OSError, ValueError):
                print(
                    f"mlx-fused-adam: optimizers stay those of MLX in this process: {error}",
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
