// How a float32 value is stored: the only place where storage formats are written down. By value, so C++14, MSL and CUDA.
// float32 lies as it is; bfloat16 and float16 are rounded to nearest even, or stochastically.
//
// Stochastic rounding: unbiased, since a value goes to either neighbour with the probability that makes the mean right. Its
// bits are a hash of (seed, step, tensor number, element number), so they depend on no thread, layout, device or history.
#pragma once

#include "device_math.h"

namespace fused_adam {

// ---- The bits of stochastic rounding ----

// Integer hash (the two-round xorshift-multiply mixer of C. Wellons' search, "lowbias32").
ADAM_FUNCTION unsigned mixed(unsigned x) {
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

struct RoundingKey {
  unsigned first;
  unsigned second;
};

// What a tensor's elements share in one step.
ADAM_FUNCTION RoundingKey rounding_key(unsigned seed_low, unsigned seed_high, unsigned step,
                                       unsigned tensor) {
  unsigned first = mixed(mixed(mixed(mixed(seed_low) ^ seed_high) ^ step) ^ tensor);
  return {first, mixed(first ^ 0x9E3779B9u)};
}

// 32 bits for one element (its row-major index, modulo 2^32): the lower 16 are for v, the upper 16 for m. The second part of
// the key enters between the rounds, so that two keys' sequences are not one sequence shifted.
ADAM_FUNCTION unsigned random_bits(RoundingKey key, unsigned element) {
  unsigned x = element + key.first;
  x ^= x >> 16;
  x *= 0x7FEB352Du;
  x ^= x >> 15;
  x += key.second;
  x *= 0x846CA68Bu;
  return x ^ (x >> 16);
}

// Others, of which the lower 16 are for the parameter.
ADAM_FUNCTION unsigned more_random_bits(RoundingKey key, unsigned element) {
  return random_bits({key.second, key.first}, element);
}

// How a store rounds: with 16 random bits, or to nearest.
struct Rounding {
  bool is_stochastic;
  unsigned random;
};

// ---- 16-bit floats ----

ADAM_FUNCTION float load_bfloat16(unsigned short h) { return float_of(unsigned(h) << 16); }

// Every NaN becomes the one that MLX stores.
ADAM_FUNCTION unsigned store_bfloat16(float x, Rounding rounding) {
  unsigned u = bits_of(x);
  unsigned nearest = 0x7FFFu + ((u >> 16) & 1u);
  unsigned rounded = (u + (rounding.is_stochastic ? rounding.random : nearest)) >> 16;
  return x != x ? 0x7FC0u : rounded;
}

// In integers but for the subnormals, whose arithmetic is of normal float32 numbers (the method of F. Giesen's conversions).
ADAM_FUNCTION float load_float16(unsigned short h) {
  unsigned normal = ((h & 0x7FFFu) << 13) + ((127u - 15u) << 23);
  unsigned special = normal + ((128u - 16u) << 23);
  unsigned subnormal = bits_of(float_of(normal + (1u << 23)) - float_of(113u << 23));
  unsigned u = (h & 0x7C00u) == 0x7C00u ? special : normal;
  u = (h & 0x7C00u) == 0u ? subnormal : u;
  return float_of(u | ((h & 0x8000u) << 16));
}

ADAM_FUNCTION unsigned store_float16(float x, Rounding rounding) {
  const unsigned magic = ((127u - 15u) + (23u - 10u) + 1u) << 23;
  unsigned sign = bits_of(x) & 0x80000000u;
  unsigned u = bits_of(x) ^ sign;
  unsigned addend = rounding.is_stochastic ? rounding.random >> 3 : 0xFFFu + ((u >> 13) & 1u);
  unsigned normal = (u - ((127u - 15u) << 23) + addend) >> 13;
  unsigned nearest = bits_of(float_of(u) + float_of(magic)) - magic;
  // The least subnormal is 2^-24, so this counts 2^-40; bits below are lost. Larger numbers are not for this branch.
  bool is_subnormal = u < (113u << 23);
  float small = is_subnormal ? float_of(u) : 0.0f;
  unsigned fixed = unsigned(int(small * 1099511627776.0f));
  unsigned subnormal = rounding.is_stochastic ? (fixed + rounding.random) >> 16 : nearest;
  unsigned h = is_subnormal ? subnormal : normal;
  h = h > 0x7C00u || u >= ((127u + 16u) << 23) ? 0x7C00u : h;
  h = u > (255u << 23) ? 0x7E00u : h;
  return h | (sign >> 16);
}

}  // namespace fused_adam
