"""The one place where tests put another extension in place of the package's own."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mlx_fused_adam import _ext


def use_extension(monkeypatch: pytest.MonkeyPatch, extension: Any) -> None:
    """Makes every module of the package call `extension`, until the test ends."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] == "mlx_fused_adam" and hasattr(module, "_ext"):
            monkeypatch.setattr(module, "_ext", extension)


def installed_extension() -> Path:
    """The file of the installed extension, also where the package imported is the emulated one."""
    files = importlib.metadata.files("mlx-fused-adam") or []
    return Path(str(next(f for f in files if f.match("mlx_fused_adam/_ext*.so")).locate()))


def extension_of_the_cpu(emulated: ModuleType) -> ModuleType:
    """The extension whose kernels are the CPU's: the installed one, also where the package imported is the emulated
    one.
    """
    if _ext is not emulated:
        return _ext
    spec = importlib.util.spec_from_file_location("mlx_fused_adam_installed._ext", installed_extension())
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
