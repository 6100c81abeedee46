// The random bits of stochastic rounding, by value: C++14, MSL and CUDA.
// A hash of (seed, step, tensor number, element number), so they depend on no thread, layout, device or history.
#pragma once

#include "math/device_math.h"

namespace fused_adam {

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

// What the elements of a tensor share in one step.
struct TensorRandom {
  RoundingKey of_parameter;
  RoundingKey of_state;
  unsigned advance;
};

// 8-bit codes have the same start in every step and go on by the golden ratio, whose multiples fill the unit interval evenly:
// the same mean as with fresh bits and less noise.
ADAM_FUNCTION TensorRandom tensor_random(unsigned seed_low, unsigned seed_high, unsigned step,
                                         unsigned tensor, bool has_codes) {
  RoundingKey fresh = rounding_key(seed_low, seed_high, step, tensor);
  if (!has_codes) return {fresh, fresh, 0u};
  return {fresh, rounding_key(seed_low, seed_high, 0u, tensor), step * 0x9E37u};
}

// One half of random_bits, moved on: shift 0 for v, 16 for m.
ADAM_FUNCTION unsigned random_half(unsigned bits, unsigned shift, unsigned advance) {
  return ((bits >> shift) + advance) & 0xFFFFu;
}

// How a store rounds: with 16 random bits, or to nearest.
struct Rounding {
  bool is_stochastic;
  unsigned random;
};

}  // namespace fused_adam
