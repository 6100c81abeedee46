"""A GPU that is correct by Metal's rules and as unhelpful as they allow: what it may do otherwise than the host, by
name.

FUSED_ADAM_EMULATOR_HOSTILE names relaxations, separated by commas, or is 1 for all but no_bfloat. The emulator reads it
at every dispatch and compilation, so ``with relaxed("contraction"):`` around a test is enough. ``active()`` says what
is on; ``scalar_error()`` what a test of bias correction must then allow.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

VARIABLE = "FUSED_ADAM_EMULATOR_HOSTILE"

RELAXATIONS = {
    # Apple's compiler is reported to fuse every a * b + c under MLX's safe math (M4), and to stop at the pragma; one
    # report disagrees. So: where the pragma stands, still within an expression; elsewhere also across statements.
    "contraction": "a * b + c becomes one fused operation wherever the source does not prevent it",
    # MLX sets the math mode alone; the function variant stays Apple's default, fast.
    "functions": "functions of metal:: that are not of metal::precise are off by a few units in the last place",
    "subnormals": "float32 numbers below 2^-126 count as zero, as operands and as results",
    # In the whole process, so that mlx.optimizers on the same device has them too, as on a Mac.
    "scalars": "MLX's pow and rsqrt, which make the scalars of bias correction, are off: see scalar_error",
    "no_bfloat": "a shader that names bfloat does not compile, as on old GPU families and virtual machines",
}
DEFAULT = frozenset(RELAXATIONS) - {"no_bfloat"}

# The error of metal::pow, by the specification; inexact_scalars.cpp makes all of it.
POW_ULPS = 16


def active() -> frozenset[str]:
    """The relaxations that are on; ValueError for a name that is none."""
    value = os.environ.get(VARIABLE, "")
    names = DEFAULT if value == "1" else frozenset(filter(None, value.split(",")))
    if unknown := names - set(RELAXATIONS):
        raise ValueError(f"{VARIABLE} must be 1 or name some of {', '.join(RELAXATIONS)} but got {sorted(unknown)}")
    return names


@contextlib.contextmanager
def relaxed(*names: str) -> Iterator[None]:
    """Exactly these relaxations for a while; none at all for no names."""
    before = os.environ.get(VARIABLE)
    os.environ[VARIABLE] = ",".join(names)
    active()
    try:
        yield
    finally:
        if before is None:
            del os.environ[VARIABLE]
        else:
            os.environ[VARIABLE] = before


def scalar_error(beta1: float, beta2: float, step: float) -> float:
    """Relative error of the change of a parameter under bias correction, if pow is off by POW_ULPS.

    The first steps subtract a power near 1 from 1, which magnifies its error: 1e-3 at step 1 for beta2 = 0.999.
    """

    def error_of_correction(beta: float) -> float:
        power = beta**step
        return POW_ULPS * 2.0**-23 * power / (1 - power) if power else 0.0

    rounding = 4 * 2.0**-23  # of the subtractions, the division, rsqrt and the products with the scalars
    return error_of_correction(beta1) + error_of_correction(beta2) / 2 + rounding
