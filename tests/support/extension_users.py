"""The modules of the package that hold the extension: a test that puts another in its place does so in all of them."""

from types import ModuleType
from typing import Any

import pytest

from mlx_fused_adam import _backends, _guard, _operation, _step, _storage

EXTENSION_USERS: tuple[ModuleType, ...] = (_backends, _guard, _operation, _step, _storage)


def use_extension(monkeypatch: pytest.MonkeyPatch, extension: Any) -> None:
    for module in EXTENSION_USERS:
        monkeypatch.setattr(module, "_ext", extension)
