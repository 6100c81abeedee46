"""Elements of arrays and of optimizer states as float64, quantized state decoded by tables, independent of the
kernels.
"""

import mlx.core as mx
import numpy as np

from .reference import to_numpy

BLOCK = 32  # neighbours along the last axis that share a scale


def bent_fourth_power(count: int, shift: int, from_zero: bool) -> np.ndarray:
    """0 and P(shift + k) for k = 1 to count; with ``from_zero``, less P(shift). docs/state-codes.md explains P.

    The float32 bits of P(x) are four times those of x: the fourth power, straight between powers of 16.
    """
    k = np.arange(count + 1, dtype=np.float32) + np.float32(shift)
    values = (4 * k.view(np.uint32) - np.uint32(0xBE800000)).view(np.float32)
    return values - values[0] if from_zero else np.append(np.float32(0), values[1:])


M_OF_CODE = bent_fourth_power(127, 8, from_zero=True)
V_OF_CODE = bent_fourth_power(255, 7, from_zero=False)
# The same in 4 bits.
M_OF_HALF = bent_fourth_power(7, 5, from_zero=True)
V_OF_HALF = bent_fourth_power(15, 3, from_zero=False)


def take(x: mx.array, indices: np.ndarray) -> np.ndarray:
    """Elements by their row-major number, without a copy of the whole of a column-major array."""
    places = np.unravel_index(indices, x.shape)
    return to_numpy(x[tuple(mx.array(place.astype(np.uint32)) for place in places)])


def moments(state: dict[str, mx.array], indices: np.ndarray, columns: int) -> dict[str, np.ndarray]:
    """m and v at these row-major places of a parameter of so many columns."""
    if "m_scale" not in state:
        return {name: take(state[name], indices) for name in "mv"}
    found = {}
    row, column = np.divmod(indices, columns)
    has_4_bits = state["m"].dtype == mx.uint8
    of_m, of_v = (M_OF_HALF, V_OF_HALF) if has_4_bits else (M_OF_CODE, V_OF_CODE)
    for name in "mv":
        scale = state[f"{name}_scale"]
        if has_4_bits:  # two to a byte
            both = take(state[name], row * state[name].shape[-1] + column // 2).astype(np.int64)
            code = both >> 4 * (column % 2) & 15
            code = (code ^ 8) - 8 if name == "m" else code
        else:
            code = take(state[name], indices).astype(np.int64)
        value = of_v[code] if name == "v" else np.sign(code) * of_m[np.abs(code)]
        found[name] = value.astype(np.float64) * take(scale, row * scale.shape[-1] + column // BLOCK)
    return found


def joined(parameter: np.ndarray, remainder: np.ndarray, unit: int = 1) -> np.ndarray:
    """The float32 master weights: bfloat16 parameters and the correction of their low bits (the state's remainder, in
    units of 256 of these if it has 8 bits).
    """
    bits = parameter.astype(np.float32).view(np.uint32).astype(np.int64)
    magnitude = np.maximum((bits & 0x7FFFFFFF) + remainder.astype(np.int64) * unit, 0)
    return ((bits & 0x80000000) | magnitude).astype(np.uint32).view(np.float32).astype(np.float64)


def bytes_of(parameters: dict[str, mx.array], state: dict[str, dict[str, mx.array]]) -> int:
    """Bytes of the parameters and their state, without gradients and scalars."""
    kept = [x for path in parameters for x in state[path].values()]
    return sum(x.nbytes for x in [*parameters.values(), *kept])
