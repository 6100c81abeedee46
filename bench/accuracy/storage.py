"""Ways to store m and v in few bits, for state_codes.py to compare: levels, scale of a block, rounding.

A code is the table of its non-negative levels, in units of the block's scale; m has a sign besides. The kernels compute
levels instead. `Stored.put` does what a store and the next load make of values.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

GOLDEN = 0x9E3779B9 / 2**32  # multiples of it, modulo 1, fill the unit interval evenly


def power(exponent: int, codes: int, shift: int = 0) -> np.ndarray:
    """0 and (shift + k) ** exponent for k = 1 to codes."""
    k = np.arange(1, codes + 1, dtype=np.float64)
    return np.append(0, (shift + k) ** exponent).astype(np.float32)


def bent(codes: int, shift: int, from_zero: bool) -> np.ndarray:
    """0 and the power of codes + shift whose float32 bits are four times theirs: the fourth, straight between powers of 16.

    With ``from_zero``, less the power of the shift.
    """
    k = np.arange(codes + 1, dtype=np.float32) + np.float32(shift)
    levels = (4 * k.view(np.uint32) - np.uint32(0xBE800000)).view(np.float32)
    return levels - levels[0] if from_zero else np.append(np.float32(0), levels[1:])


def floating(mantissa_bits: int, codes: int) -> np.ndarray:
    """0, and a float's values from 1 downwards, as many as there are codes; no subnormals."""
    k = np.arange(codes) - (codes - 1)
    octave, step = np.divmod(k, 1 << mantissa_bits)
    return np.append(0, np.ldexp(1 + step / (1 << mantissa_bits), octave)).astype(np.float32)


def softsign(codes: int) -> np.ndarray:
    """FlashOptim's m: 2 x / (1 + |x|) is stored evenly."""
    y = np.arange(codes + 1) / codes
    return (y / (2 - y)).astype(np.float32)


V_LEVELS = {
    "square": power(2, 255),
    "cube": power(3, 255),
    "4th power": power(4, 255),
    "shifted 4th power": power(4, 255, shift=7),
    "bent 4th power": bent(255, 7, from_zero=False),
    "8th power": power(8, 255),
    "float e5m3": floating(3, 255),
    "float e4m4": floating(4, 255),
}
M_LEVELS = {
    "linear": power(1, 127),
    "square": power(2, 127),
    "cube": power(3, 127),
    "4th power": power(4, 127),
    "bent 4th power": bent(127, 8, from_zero=True),
    "softsign": softsign(127),
    "float e4m3": floating(3, 127),
    "float e3m4": floating(4, 127),
}


@dataclass(frozen=True)
class Storage:
    """One of m and v: which levels, and how values and scales are rounded.

    rounding  "nearest"; "random": up with the probability that makes the mean right; "even": the same with multiples of the
              golden ratio, from a random start per element, in place of random numbers; "fade": nearest, and towards zero
              where steps of a tenth would be lost
    scale     "power of 2": the least one not below the block's maximum; "kept power of 2": the last step's as long as the
              maximum is above a quarter of it; "bf16": the maximum, rounded up; "maximum": itself
    """

    levels: str
    rounding: str = "nearest"
    scale: str = "power of 2"
    keeps_nonzero: bool = True  # for v: what is not 0 is not stored as 0

    @property
    def name(self) -> str:
        """What differs from the usual: nearest, and a power of two."""
        words = [self.levels]
        if self.rounding != "nearest":
            words.append(self.rounding)
        if self.scale != "power of 2":
            words.append(f"scale: {self.scale}")
        if not self.keeps_nonzero:
            words.append("may become 0")
        return ", ".join(words)


class Stored:
    """m or v of all blocks as stored after the last step; `put` rounds new values, which are then `values`."""

    def __init__(self, storage: Storage, signed: bool, shape: tuple[int, ...], seed: int = 0):
        self.storage, self.signed = storage, signed
        self.values = np.zeros(shape, np.float32)
        self.scale = np.zeros((shape[0], 1), np.float32)
        self.random = np.random.default_rng(seed)
        self.start = self.random.random(shape, np.float32)
        self.step = 0
        if storage.levels not in ("bfloat16", "float32"):
            self.levels = (M_LEVELS if signed else V_LEVELS)[storage.levels]
            gap = np.diff(self.levels)
            self.fades = 0.1 * self.levels[1:] <= 0.5 * gap  # a step of a tenth rounds back

    def _thresholds(self) -> np.ndarray | np.float32:
        """A value goes up where its place between two levels is above this."""
        self.step += 1
        if self.storage.rounding == "random":
            return self.random.random(self.values.shape, np.float32)
        if self.storage.rounding == "even":
            return (self.start + np.float32(self.step * GOLDEN % 1)) % np.float32(1)
        return np.float32(0.5)

    def _scale_of(self, maximum: np.ndarray) -> np.ndarray:
        """The factor of the levels, so that the largest is not below the maximum."""
        kind = self.storage.scale
        maximum = maximum / self.levels[-1]
        if kind == "maximum":
            return maximum
        if kind == "bf16":
            return ((maximum.view(np.uint32) + 0xFFFF) & 0xFFFF0000).view(np.float32)
        fraction, exponent = np.frexp(maximum)
        least = np.where(maximum > 0, np.ldexp(np.float32(1), exponent - (fraction == 0.5)), 0)
        if kind == "kept power of 2":
            keep = (maximum <= self.scale) & (maximum > self.scale / 4)
            least = np.where(keep, self.scale, least)
        return least.astype(np.float32)

    def put(self, x: np.ndarray) -> None:
        if self.storage.levels == "float32":
            self.values = x
            return
        threshold = self._thresholds()
        if self.storage.levels == "bfloat16":
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
        low = np.searchsorted(self.levels, y, side="right") - 1
        low = np.minimum(low, len(self.levels) - 2)
        below = self.levels[low]
        above = self.levels[low + 1]
        up = y - below > threshold * (above - below)
        if self.storage.rounding == "fade":
            up &= ~self.fades[low]
        if self.storage.rounding in ("random", "even"):
            up |= y >= above
        if not self.signed and self.storage.keeps_nonzero:
            up |= (low == 0) & (y > 0)
        value = np.where(up, above, below) * self.scale
        self.values = np.copysign(value, x) if self.signed else value


def simulate_m(s: Storage, g: np.ndarray, beta: float, seed: int = 0) -> Iterator[np.ndarray]:
    """Yields the fresh float32 m of each step, from what was stored of the last."""
    stored = Stored(s, True, g.shape[1:], seed)
    b, c = np.float32(beta), np.float32(1 - beta)
    for gradient in g:
        m = b * stored.values + c * gradient
        yield m
        stored.put(m)


def simulate_v(s: Storage, g: np.ndarray, beta: float, seed: int = 1) -> Iterator[np.ndarray]:
    """The same of v."""
    stored = Stored(s, False, g.shape[1:], seed)
    b, c = np.float32(beta), np.float32(1 - beta)
    for gradient in g:
        v = b * stored.values + c * (gradient * gradient)
        yield v
        stored.put(v)
