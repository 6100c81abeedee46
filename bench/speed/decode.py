"""What a state holds, as numbers: decoded with NumPy from tables of levels, knowing no kernel (docs/state-codes.md)."""

from collections.abc import Callable

import mlx.core as mx
import numpy as np

from .codes import M_LEVELS, V_LEVELS

Take = Callable[[mx.array, np.ndarray], np.ndarray]

BLOCK = 32  # neighbours along the last axis that share a scale
M_OF_CODE = M_LEVELS["bent 4th power"].astype(np.float64)
V_OF_CODE = V_LEVELS["bent 4th power"].astype(np.float64)


def moments(state: dict[str, mx.array], indices: np.ndarray, take: Take) -> dict[str, np.ndarray]:
    """m and v at these row-major places, in float64; codes with the scale of their block."""
    found = {name: take(state[name], indices) for name in "mv"}
    for name in "mv":
        if f"{name}_scale" not in state:
            continue
        row, column = np.divmod(indices, state[name].shape[-1])
        scale = state[f"{name}_scale"]
        code = found[name].astype(np.int64)
        level = V_OF_CODE[code] if name == "v" else np.sign(code) * M_OF_CODE[np.abs(code)]
        found[name] = level * take(scale, row * scale.shape[-1] + column // BLOCK)
    return found


def joined(parameter: np.ndarray, remainder: np.ndarray) -> np.ndarray:
    """The float32 of which a bfloat16 is the upper half, rounded, and the remainder what that took away; as float64."""
    bits = parameter.astype(np.float32).view(np.uint32).astype(np.int64)
    magnitude = np.maximum((bits & 0x7FFFFFFF) + remainder.astype(np.int64), 0)
    return ((bits & 0x80000000) | magnitude).astype(np.uint32).view(np.float32).astype(np.float64)


def bytes_of(parameters: dict[str, mx.array], state: dict[str, dict[str, mx.array]]) -> int:
    """Of the parameters and all that is kept for each of them: neither gradients nor a step's few numbers."""
    kept = [x for path in parameters for x in state[path].values()]
    return sum(x.nbytes for x in [*parameters.values(), *kept])
