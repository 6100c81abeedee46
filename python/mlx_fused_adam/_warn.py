"""Warnings that name the user's line: the one that called the package, or MLX, which called the package."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import mlx.core as mx

_INSIDE = tuple(f"{Path(file).parent}/" for file in (__file__, mx.__file__))


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """As ``warnings.warn``, for the innermost line that is neither the package's nor MLX's."""
    frame, level = sys._getframe(1), 2
    while frame.f_back and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level)
