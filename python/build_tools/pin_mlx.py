"""scikit-build-core metadata provider: requires at run time exactly the mlx that the build found.

Named in pyproject.toml, whose build-system.requires is thereby the only place that pins mlx.
"""

from importlib.metadata import version


def dynamic_metadata(field: str, settings: dict, project: dict | None = None) -> list[str]:
    if field != "dependencies" or settings:
        raise RuntimeError("pin_mlx gives the field 'dependencies' and takes no settings")
    # The extra "cpu" brings the Linux library and adds nothing on macOS.
    return [f"mlx[cpu]=={version('mlx')}"]
