"""Refuses to run without the MLX that the extension was compiled for, before the extension is loaded and may crash.

libmlx's C++ interface has no stable version; and on Linux the package mlx comes without libmlx, which a back end brings.
"""

import importlib
from importlib.metadata import PackageNotFoundError, version

from ._build_info import MLX_VERSION

# Whichever of these is installed holds libmlx.
_BACK_ENDS = ("mlx-metal", "mlx-cpu", "mlx-cuda-12", "mlx-cuda-13")
_MEND = (
    f"Mend it with one of: pip install 'mlx=={MLX_VERSION}' (macOS), "
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
    """Raise ImportError unless the installed mlx (or the versions given) is the one of the build, and loads."""
    for name, found in (installed_mlx() if installed is None else installed).items():
        if found != MLX_VERSION:
            raise ImportError(
                f"mlx-fused-adam was built for mlx {MLX_VERSION} but {name} {found} is installed. {_MEND}"
            )
    try:
        importlib.import_module("mlx.core")
    except ImportError as error:
        raise ImportError(
            f"mlx-fused-adam needs mlx {MLX_VERSION} with a back end, but mlx.core cannot be imported: "
            f"{error}. {_MEND}"
        ) from error
