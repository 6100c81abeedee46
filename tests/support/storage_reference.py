"""Codes of 8 and 4 bits and remainders in NumPy, written anew from docs/state-codes.md and docs/numerics.md, knowing no
kernel.
"""

import numpy as np

from support.rounding_reference import bits_of_step

BLOCK = 32
# How far m and v are shifted along the power, and their largest codes, by the number of bits.
SHIFT = {8: {"m": 8, "v": 7}, 4: {"m": 5, "v": 3}}
MOST = {8: {"m": 127, "v": 255}, 4: {"m": 7, "v": 15}}


def power(n: np.ndarray) -> np.ndarray:
    bits = np.asarray(n, np.float32).view(np.uint32).astype(np.int64)
    return ((4 * bits - 3 * 0x3F800000) & 0xFFFFFFFF).astype(np.uint32).view(np.float32)


def root(y: np.ndarray) -> np.ndarray:
    return ((y.view(np.uint32) >> 2) + np.uint32(0x2FA00000)).view(np.float32)


def blocks(x: np.ndarray) -> np.ndarray:
    """Rows cut into blocks, the last one filled with zeros."""
    rows = x.reshape(-1, x.shape[-1])
    short = -rows.shape[1] % BLOCK
    return np.pad(rows, ((0, 0), (0, short))).reshape(-1, BLOCK)


def unblocked(x: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    rows = x.reshape(int(np.prod(shape[:-1])), -1)
    return np.ascontiguousarray(rows[:, : shape[-1]]).reshape(shape)


def decode(name: str, codes: np.ndarray, scales: np.ndarray, bits: int = 8, columns: int | None = None) -> np.ndarray:
    """Codes (int8 of m, uint8 of v; of 4 bits two to a byte, by default of an even row) and scales (float32) to
    float32.
    """
    if bits == 4:
        codes = unpacked(codes, columns or 2 * codes.shape[-1])
        if name == "m":
            codes = np.where(codes & 8, codes.astype(np.int8) - 16, codes.astype(np.int8))
    k, shift = blocks(codes).astype(np.int64), SHIFT[bits][name]
    if name == "m":
        values = np.sign(k) * (power(np.abs(k) + shift) - power(shift))
    else:
        values = np.where(k > 0, power(k + shift), 0)
    scaled = values.astype(np.float32) * scales.reshape(-1, 1).astype(np.float32)
    return unblocked(scaled.astype(np.float32), codes.shape)


def encode(name: str, x: np.ndarray, draws: np.ndarray, bits: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """float32 to codes and scales; `draws` are 16 bits for each element."""
    values, draws = blocks(x), blocks(draws).astype(np.int64)
    shift, most = SHIFT[bits][name], MOST[bits][name]
    base = power(shift) if name == "m" else np.float32(0)
    top = power(most + shift) - base
    cap = np.float32(2.0 ** (63 if name == "m" else 127))
    counted = np.minimum(np.nan_to_num(np.abs(values), nan=0.0), cap)
    least = counted.max(axis=1, keepdims=True).astype(np.float32) * (np.float32(1) / top)
    if bits == 4 and name == "m":  # the next bfloat16
        upper = (least.view(np.uint32).astype(np.int64) + 0xFFFF) >> 16
        scale = (upper << 16).astype(np.uint32).view(np.float32)
    else:
        exponent = np.ceil(np.log2(np.maximum(least, 1e-45).astype(np.float64)))
        scale = np.exp2(np.maximum(exponent, -126)).astype(np.float32)
    scale = np.maximum(scale, np.float32(2.0**-126))
    u = ((draws >> 1) / 32768).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        y = np.abs(values) * (np.float32(1) / scale)
        t = root((y + base).astype(np.float32))
        t = t if name == "m" else np.maximum(t, np.float32(shift + 1))
        n = np.minimum((t + u).astype(np.float32), np.float32(most + shift + 0.5)).astype(np.int64)
    k = n - shift
    if name == "v":
        codes = np.where(values == 0, 0, k).astype(np.uint8)
    elif bits == 8:
        codes = np.where(values < 0, -k, k).astype(np.int8)
    else:
        codes = (np.where(values < 0, -k, k) & 15).astype(np.uint8)
    codes = unblocked(codes, x.shape)
    return codes if bits == 8 else packed(codes), unblocked_scales(scale, x.shape)


def packed(codes: np.ndarray) -> np.ndarray:
    """Two codes of a row to a byte, the first in its lower half."""
    even = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    return even[..., ::2] | even[..., 1::2] << 4


def unpacked(codes: np.ndarray, columns: int) -> np.ndarray:
    """The reverse."""
    return np.stack([codes & 15, codes >> 4], axis=-1).reshape(*codes.shape[:-1], -1)[..., :columns]


def unblocked_scales(scale: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    return scale.reshape(*shape[:-1], -1)


def draws_of_step(seed: int, step: int, tensor: int, shape: tuple[int, ...]) -> dict:
    """The bits for m and v: those of step 0, moved on by the golden ratio."""
    start = bits_of_step(seed, 0, tensor, int(np.prod(shape)))
    return {name: ((start[name].astype(np.int64) + step * 0x9E37) & 0xFFFF).reshape(shape) for name in ("m", "v")}


def joined(upper: np.ndarray, remainder: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits (uint16) and remainders (int16)."""
    sign, size = upper & 0x8000, (upper & 0x7FFF).astype(np.int64) << 16
    total = np.maximum(size + remainder, 0)
    total = np.where((size == 0x7F800000) & (remainder > 0), size, total)
    return (total | (sign.astype(np.int64) << 16)).astype(np.uint32).view(np.float32)


def rounded_to_24(x: np.ndarray, draws: np.ndarray | None) -> np.ndarray:
    """The float32 values of 24 bits that values are stored as: by `draws`, 16 bits for each, or to nearest even.

    What is not finite stays; what is finite never becomes infinite.
    """
    x = np.asarray(x, np.float32)
    size = np.abs(np.where(np.isfinite(x), x, 0).astype(np.float64))
    exponent = np.maximum(np.frexp(size)[1] - 1, -126)
    units = size / np.exp2(exponent - 15.0)
    down = np.floor(units)
    if draws is None:
        found = np.round(units)
    else:
        found = down + (np.floor((units - down) * 256) + (draws.astype(np.int64) >> 8) >= 256)
    found = np.minimum(found * np.exp2(exponent - 15.0), (2 - 2.0**-15) * 2.0**127)
    return np.where(np.isfinite(x), np.copysign(found, x), x).astype(np.float32)


def upper_half(x: np.ndarray) -> np.ndarray:
    """The bfloat16 bits nearest to float32 values that are not NaN, ties away from zero."""
    return ((x.view(np.uint32).astype(np.int64) + 0x8000) >> 16).astype(np.uint16)
