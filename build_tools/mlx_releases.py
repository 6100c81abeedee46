"""The mlx releases that the package builds against, and the nanobind whose ABI each was built with: the one place.

Read by build_backend.py, check_abi.py and tests/platforms/releases/run.py. A new release is a line here;
docs/mlx-releases.md says the rest.
"""

# The newest comes first: what is built for, unless the environment variable names another.
NANOBIND = {
    "0.32.4": "3.1.0",
    "0.32.3": "3.1.0",
    "0.32.2": "2.15.0",
    "0.32.1": "2.13.0",
    "0.32.0": "2.13.0",
}
VARIABLE = "MLX_FUSED_ADAM_FOR_MLX"
