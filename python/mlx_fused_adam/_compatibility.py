"""Reject any other MLX than the one that the extension was compiled for, before the extension is loaded and might
crash.

libmlx's C++ interface changes between releases. On Linux the package mlx has no libmlx; a back end (mlx-cpu, say)
brings it.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version

from ._build_info import MLX_VERSION

# Whichever of these is installed holds libmlx.
_BACK_ENDS = ("mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")
_FIX = (
    f"Fix it with one of: pip install 'mlx=={MLX_VERSION}' (macOS), "
    f"pip install 'mlx[cpu]=={MLX_VERSION}' (Linux), "
    f"pip install 'mlx[cuda12]=={MLX_VERSION}' (Linux with an NVIDIA GPU); or build mlx-fused-adam for your mlx: "
    "docs/mlx-releases.md"
)


def installed_mlx() -> dict[str, str]:
    """Versions of mlx and its back ends, as installed."""
    found = {}
    for name in ("mlx", *_BACK_ENDS):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def check_mlx(installed: dict[str, str] | None = None) -> None:
    """Raise ImportError unless the installed mlx, or the given versions, is that of the build and can be imported."""
    for name, found in (installed_mlx() if installed is None else installed).items():
        if found != MLX_VERSION:
            raise ImportError(f"mlx-fused-adam was built for mlx {MLX_VERSION} but {name} {found} is installed. {_FIX}")
    try:
        importlib.import_module("mlx.core")
    except ImportError as error:
        raise ImportError(
            f"mlx-fused-adam needs mlx {MLX_VERSION} with a back end, but mlx.core cannot be imported: {error}. {_FIX}"
        ) from error
