"""The modules of the package that hold the extension: a test that puts another in its place does so in all of them."""

from types import ModuleType
from typing import Any

import pytest

from mlx_fused_adam import _backends, _clipping, _operation, _state, _step

EXTENSION_USERS: tuple[ModuleType, ...] = (_backends, _clipping, _operation, _state, _step)


def use_extension(monkeypatch: pytest.MonkeyPatch, extension: Any) -> None:
    for module in EXTENSION_USERS:
        monkeypatch.setattr(module, "_ext", extension)
