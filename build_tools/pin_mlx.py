"""Metadata provider (pyproject.toml's dynamic-metadata): requires at run time exactly the mlx that the build found.

Plain mlx, since on Linux each back end of MLX (mlx-cpu, mlx-cuda-…) brings a libmlx.so of its own to the same place,
and requiring one would overwrite another that is installed. The extra "cpu" asks for the CPU's. The tests build too,
and need the nanobind of this build.
"""

from importlib.metadata import version


def dynamic_metadata(settings: dict, project: dict) -> dict[str, object]:
    if settings:
        raise RuntimeError(f"pin_mlx takes no settings but got {sorted(settings)}")
    pin = version("mlx")
    return {
        "dependencies": [f"mlx=={pin}"],
        "optional-dependencies": {
            "cpu": [f"mlx[cpu]=={pin}"],
            "test": [f"nanobind=={version('nanobind')}"],
        },
    }


def dynamic_wheel(settings: dict) -> dict[str, bool]:
    """A wheel that is made from the source archive may be for another mlx: no installer may go by the archive's
    metadata.
    """
    return {"dependencies": True}
