"""Ways to store m and v in 4, 8 or 16 bits, simulated in NumPy for bench/quantized_state.py: values, scale of a block,
rounding.

A quantized state is a table of its non-negative values, in units of the block's scale; m also has a sign. `Stored.put`
does what a store and the next load make of numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ..speed.decode import M_OF_CODE, M_OF_HALF, V_OF_CODE, V_OF_HALF, bent_fourth_power

GOLDEN = 0x9E3779B9 / 2**32  # multiples of it, modulo 1, fill the unit interval evenly


def power(exponent: int, count: int, shift: int = 0) -> np.ndarray:
    """0 and (shift + k) ** exponent for k = 1 to count."""
    k = np.arange(1, count + 1, dtype=np.float64)
    return np.append(0, (shift + k) ** exponent).astype(np.float32)


def floating(mantissa_bits: int, count: int) -> np.ndarray:
    """0, and a float's values from 1 downwards, ``count`` of them; no subnormals."""
    k = np.arange(count) - (count - 1)
    octave, step = np.divmod(k, 1 << mantissa_bits)
    return np.append(0, np.ldexp(1 + step / (1 << mantissa_bits), octave)).astype(np.float32)


def softsign(count: int) -> np.ndarray:
    """FlashOptim's m: 2 x / (1 + |x|) is stored evenly."""
    y = np.arange(count + 1) / count
    return (y / (2 - y)).astype(np.float32)


V_TABLES = {
    "square": power(2, 255),
    "4th power": power(4, 255),
    "shifted 4th power": power(4, 255, shift=7),
    "bent 4th power": V_OF_CODE,
    "8th power": power(8, 255),
    "float e5m3": floating(3, 255),
    "4 bits": V_OF_HALF,
    "4 bits, shifted by 1": bent_fourth_power(15, 1, from_zero=False),
    "4 bits, 4th power": power(4, 15),
    "4 bits, square": power(2, 15),
    "4 bits, float e3m1": floating(1, 15),
}
M_TABLES = {
    "square": power(2, 127),
    "4th power": power(4, 127),
    "bent 4th power": M_OF_CODE,
    "softsign": softsign(127),
    "float e4m3": floating(3, 127),
    "4 bits": M_OF_HALF,
    "4 bits, square": power(2, 7),
}


@dataclass(frozen=True)
class Storage:
    """A way to store m or v: its table, or "bfloat16" or "float32", and the rounding of values and scales.

    rounding  "nearest"; "random": up with the probability that makes the mean right; "even": the same with multiples of
              the golden ratio, from a random start per element, in place of random numbers
    scale     "power of 2": the least one not below the block's maximum; "bf16": the maximum, rounded up; "maximum":
    itself
    """

    table: str
    rounding: str = "nearest"
    scale: str = "power of 2"
    keeps_nonzero: bool = True  # for v: a number other than 0 is not stored as 0


class Stored:
    """m or v of all blocks as stored after the last step; `put` stores new ones, and `values` has them rounded."""

    def __init__(self, storage: Storage, signed: bool, shape: tuple[int, ...], seed: int = 0):
        self.storage, self.signed = storage, signed
        self.values = np.zeros(shape, np.float32)
        self.scale = np.zeros((shape[0], 1), np.float32)
        self.random = np.random.default_rng(seed)
        self.start = self.random.random(shape, np.float32)
        self.step = 0
        if storage.table not in ("bfloat16", "float32"):
            self.table = (M_TABLES if signed else V_TABLES)[storage.table]

    def _thresholds(self) -> np.ndarray | np.float32:
        """A number goes up where its position between two values is above this."""
        self.step += 1
        if self.storage.rounding == "random":
            return self.random.random(self.values.shape, np.float32)
        if self.storage.rounding == "even":
            return (self.start + np.float32(self.step * GOLDEN % 1)) % np.float32(1)
        return np.float32(0.5)

    def _scale_of(self, maximum: np.ndarray) -> np.ndarray:
        """The factor of the table, so that its largest value is not below the maximum."""
        kind = self.storage.scale
        maximum = maximum / self.table[-1]
        if kind == "maximum":
            return maximum
        if kind == "bf16":
            return ((maximum.view(np.uint32) + 0xFFFF) & 0xFFFF0000).view(np.float32)
        fraction, exponent = np.frexp(maximum)
        least = np.where(maximum > 0, np.ldexp(np.float32(1), exponent - (fraction == 0.5)), 0)
        return least.astype(np.float32)

    def put(self, x: np.ndarray) -> None:
        if self.storage.table == "float32":
            self.values = x
            return
        threshold = self._thresholds()
        if self.storage.table == "bfloat16":
            bits = x.view(np.uint32)
            if self.storage.rounding == "nearest":
                added = 0x7FFF + ((bits >> 16) & 1)
            else:
                added = ((1 - threshold) * 0xFFFF).astype(np.uint32)
            self.values = ((bits + added) & 0xFFFF0000).view(np.float32)
            return
        size = np.abs(x)
        self.scale = self._scale_of(size.max(axis=1, keepdims=True))
        y = size / np.where(self.scale > 0, self.scale, 1)
        low = np.searchsorted(self.table, y, side="right") - 1
        low = np.minimum(low, len(self.table) - 2)
        below = self.table[low]
        above = self.table[low + 1]
        up = y - below > threshold * (above - below)
        if self.storage.rounding in ("random", "even"):
            up |= y >= above
        if not self.signed and self.storage.keeps_nonzero:
            up |= (low == 0) & (y > 0)
        value = np.where(up, above, below) * self.scale
        self.values = np.copysign(value, x) if self.signed else value


def simulate_m(s: Storage, g: np.ndarray, beta: float, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield the new float32 m of each step, computed from the stored one of the last."""
    stored = Stored(s, True, g.shape[1:], seed)
    b, c = np.float32(beta), np.float32(1 - beta)
    for gradient in g:
        m = b * stored.values + c * gradient
        yield m
        stored.put(m)


def simulate_v(s: Storage, g: np.ndarray, beta: float, seed: int = 1) -> Iterator[np.ndarray]:
    """The same for v."""
    stored = Stored(s, False, g.shape[1:], seed)
    b, c = np.float32(beta), np.float32(1 - beta)
    for gradient in g:
        v = b * stored.values + c * (gradient * gradient)
        yield v
        stored.put(v)
