"""Codes of 8 and 4 bits and remainders in NumPy, written anew from docs/state-codes.md and docs/numerics.md, knowing no
kernel.
"""

import numpy as np

from support.rounding_reference import bits_of_step

BLOCK = 32
TOP = {"m": 135, "v": 262}


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


def decode(
    name: str, codes: np.ndarray, scales: np.ndarray, bits: int = 8, columns: int | None = None
) -> np.ndarray:
    """Codes (int8 of m, uint8 of v; of 4 bits two to a byte, by default of an even row) and scales (float32) to
    float32.
    """
    if bits == 4:
        return _decode_4(name, codes, scales, columns or 2 * codes.shape[-1])
    k = blocks(codes).astype(np.int64)
    if name == "m":
        values = np.sign(k) * (power(np.abs(k) + 8) - np.float32(4096))
    else:
        values = np.where(k > 0, power(k + 7), 0)
    scaled = values.astype(np.float32) * scales.reshape(-1, 1).astype(np.float32)
    return unblocked(scaled.astype(np.float32), codes.shape)


def encode(name: str, x: np.ndarray, draws: np.ndarray, bits: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """float32 to codes and scales; `draws` are 16 bits for each element."""
    if bits == 4:
        return _encode_4(name, x, draws)
    values, draws = blocks(x), blocks(draws).astype(np.int64)
    base = np.float32(4096 if name == "m" else 0)
    top = power(TOP[name]) - base
    cap = np.float32(2.0 ** (63 if name == "m" else 127))
    counted = np.minimum(np.nan_to_num(np.abs(values), nan=0.0), cap)
    largest = counted.max(axis=1, keepdims=True).astype(np.float32)
    exponent = np.ceil(np.log2(np.maximum(largest, 1e-45).astype(np.float64) / np.float64(top)))
    scale = np.exp2(np.maximum(exponent, -126)).astype(np.float32)
    u = ((draws >> 1) / 32768).astype(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        y = np.abs(values) * (np.float32(1) / scale)
        t = root((y + base).astype(np.float32))
        t = t if name == "m" else np.maximum(t, np.float32(8))
        n = np.minimum((t + u).astype(np.float32), np.float32(TOP[name] + 0.5)).astype(np.int64)
    if name == "m":
        codes = np.where(values < 0, -(n - 8), n - 8).astype(np.int8)
    else:
        codes = np.where(values == 0, 0, n - 7).astype(np.uint8)
    return unblocked(codes, x.shape), unblocked_scales(scale, x.shape)


# The levels of 4 bits, in units of the scale.
LEVELS = {
    "m": np.array([0, 1, 4, 8, 16, 24, 32, 48], np.float32),
    "v": np.array(
        [0, 1, 16, 64, 256, 512, 1024, 2048, 4096, 6144, 8192, 12288, 16384, 24576, 32768, 49152], np.float32
    ),
}


def _decode_4(name: str, packed: np.ndarray, scales: np.ndarray, columns: int) -> np.ndarray:
    nibbles = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)[..., :columns]
    k = blocks(nibbles).astype(np.int64)
    levels = LEVELS["m"][k & 7] * np.where(k & 8, -1, 1) if name == "m" else LEVELS["v"][k]
    return unblocked((levels * scales.reshape(-1, 1)).astype(np.float32), (*packed.shape[:-1], columns))


def _encode_4(name: str, x: np.ndarray, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, draws = blocks(x), blocks(draws).astype(np.int64)
    levels = LEVELS[name]
    cap = np.float32(2.0 ** (63 if name == "m" else 127))
    counted = np.minimum(np.nan_to_num(np.abs(values), nan=0.0), cap)
    least = counted.max(axis=1, keepdims=True).astype(np.float32) * (np.float32(1) / levels[-1])
    bits = (least.view(np.uint32).astype(np.int64) + 0xFFFF) >> 16
    scale = (np.maximum(bits, 0x80) << 16).astype(np.uint32).view(np.float32)
    with np.errstate(invalid="ignore", over="ignore"):
        y = np.abs(values) * (np.float32(1) / scale)
        y = np.where(y < levels[-1], y, levels[-1])  # NaN too
    y = np.maximum(y, np.float32(0 if name == "m" else 1)).astype(np.float32)
    lower = np.searchsorted(levels, y, side="right") - 1
    below, above = levels[lower], np.append(levels, 2 * levels[-1])[lower + 1]
    threshold = (draws / 65536).astype(np.float32) * (above - below)
    k = lower + (y - below > threshold)
    k = np.where((values < 0) & (k > 0), k + 8, k) if name == "m" else np.where(values == 0, 0, k)
    nibbles = unblocked(k.astype(np.uint8), x.shape)
    nibbles = np.pad(nibbles, [(0, 0)] * (x.ndim - 1) + [(0, x.shape[-1] % 2)])
    return nibbles[..., ::2] | nibbles[..., 1::2] << 4, unblocked_scales(scale, x.shape)


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
