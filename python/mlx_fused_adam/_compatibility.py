"""Refuses to run with another mlx than the extension was compiled for: libmlx's C++ interface has no stable version."""

from importlib.metadata import version

from ._build_info import MLX_VERSION


def check_mlx(installed: str | None = None) -> None:
    """Raise ImportError unless the installed mlx (or the version given) is the one of the build."""
    installed = installed or version("mlx")
    if installed != MLX_VERSION:
        raise ImportError(
            f"mlx-fused-adam was built for mlx {MLX_VERSION} but mlx {installed} is installed. "
            f"Mend it with: pip install 'mlx[cpu]=={MLX_VERSION}'  (on macOS 'mlx=={MLX_VERSION}')"
        )
