"""Marks tests of what only later releases of MLX do: ``@since_mlx("0.32.2", "MLX checks its arguments")``.

docs/mlx-releases.md lists them; tests/platforms/releases/run.py runs the suite with each release.
"""

from importlib.metadata import version

import pytest


def _parts(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in release.split(".")[:3])


def is_before(release: str) -> bool:
    """Whether this mlx is an older one."""
    return _parts(version("mlx")) < _parts(release)


def since_mlx(release: str, what: str) -> pytest.MarkDecorator:
    """Skips with mlx before `release`, of which `what` says what it does that they do not."""
    reason = f"since mlx {release} {what}; this is {version('mlx')}"
    return pytest.mark.skipif(is_before(release), reason=reason)


errors_in_tasks_are_raised = since_mlx(
    "0.32.1", "MLX raises what a task of the CPU throws, which ended the process before"
)
