"""Stochastic rounding in NumPy, written anew from the description in docs/numerics.md, knowing no kernel."""

import mlx.core as mx
import numpy as np


def mixed(x: np.ndarray | int) -> np.ndarray:
    x = np.atleast_1d(np.asarray(x, np.uint32))
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def key_of(seed: int, step: int, tensor: int) -> tuple[np.ndarray, np.ndarray]:
    first = mixed(seed & 0xFFFFFFFF)
    for part in (seed >> 32, step, tensor):
        first = mixed(first ^ np.uint32(part))
    return first, mixed(first ^ np.uint32(0x9E3779B9))


def random_bits(first: np.ndarray, second: np.ndarray, count: int) -> np.ndarray:
    x = np.arange(count, dtype=np.uint32) + first
    x = (x ^ (x >> 16)) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) + second
    x *= np.uint32(0x846CA68B)
    return x ^ (x >> 16)


def bits_of_step(seed: int, step: int, tensor: int, count: int) -> dict[str, np.ndarray]:
    first, second = key_of(seed, step, tensor)
    of_state = random_bits(first, second, count)
    of_parameter = random_bits(second, first, count)
    return {"parameter": of_parameter & 0xFFFF, "m": of_state >> 16, "v": of_state & 0xFFFF}


def rounded(x: np.ndarray, bits: np.ndarray, dtype: mx.Dtype) -> np.ndarray:
    """float32 values between two neighbours of a 16-bit dtype go up in magnitude where the bits say so."""
    size = np.abs(x.astype(np.float64))
    fraction_bits, least = (7, -126) if dtype == mx.bfloat16 else (10, -14)
    exponent = np.maximum(np.frexp(size)[1] - 1, least)
    unit = np.exp2(exponent.astype(np.float64) - fraction_bits)
    down = np.floor(size / unit)
    # float16 has 13 bits to round away in its normal numbers.
    digits = 13 if dtype == mx.float16 else 16
    part = np.floor((size / unit - down) * 2.0**digits)
    draws = bits >> (16 - digits)
    if dtype == mx.float16:  # and 16 are kept of its subnormal ones
        is_small = size < 2.0**-14
        part = np.where(is_small, np.floor((size / unit - down) * 2.0**16), part)
        draws = np.where(is_small, bits, draws)
        digits = np.where(is_small, 16, digits)
    up = part + draws >= 2.0**digits
    return np.copysign((down + up) * unit, x)
