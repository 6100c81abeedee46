"""The build backend: scikit-build-core's, and which mlx and nanobind an isolated build gets (PEP 517, pyproject.toml).

    MLX_FUSED_ADAM_FOR_MLX=0.32.2 pip install '.[cpu]'

builds for that release, and without the variable for the newest in mlx_releases.py. Without build isolation, whatever
mlx and nanobind are installed are built with; check_abi.py says if they do not fit.
"""

import os
import sys

# pip runs this file before it reads requires-python, so 3.9 (Apple's command line tools) must be able to parse it.
if sys.version_info < (3, 10):  # noqa: UP036
    found = f"{sys.version_info[0]}.{sys.version_info[1]} ({sys.executable})"
    raise SystemExit(
        f"mlx-fused-adam needs Python 3.10 or newer, but this is {found}: install a newer one (python.org, or "
        "brew install python) and make the virtual environment with it"
    )

import scikit_build_core.build as _build  # noqa: E402
from mlx_releases import NANOBIND, VARIABLE  # noqa: E402
from scikit_build_core.build import *  # noqa: E402, F403 - the hooks that stay as they are

_Settings = dict[str, str | list[str]] | None


def _mlx_and_nanobind() -> list[str]:
    mlx = os.environ.get(VARIABLE) or next(iter(NANOBIND))
    if mlx not in NANOBIND:
        raise SystemExit(
            f"{VARIABLE} must be one of {', '.join(NANOBIND)} but got {mlx!r}. For another mlx install it and its "
            "nanobind, and build with --no-build-isolation: docs/mlx-releases.md"
        )
    # libmlx and its headers: on Linux they come with the extra "cpu", on macOS with plain mlx, where that extra adds
    # nothing.
    return [f"mlx[cpu]=={mlx}", f"nanobind=={NANOBIND[mlx]}"]


def get_requires_for_build_wheel(config_settings: _Settings = None) -> list[str]:
    return _build.get_requires_for_build_wheel(config_settings) + _mlx_and_nanobind()


def get_requires_for_build_editable(config_settings: _Settings = None) -> list[str]:
    return _build.get_requires_for_build_editable(config_settings) + _mlx_and_nanobind()


def get_requires_for_build_sdist(config_settings: _Settings = None) -> list[str]:
    return _build.get_requires_for_build_sdist(config_settings) + _mlx_and_nanobind()
