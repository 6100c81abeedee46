// The random bits of stochastic rounding. Arguments are passed by value: valid C++14, MSL and CUDA.
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

// The key of a tensor's elements in one step.
ADAM_FUNCTION RoundingKey rounding_key(unsigned seed_low, unsigned seed_high, unsigned step, unsigned tensor) {
  unsigned first = mixed(mixed(mixed(mixed(seed_low) ^ seed_high) ^ step) ^ tensor);
  return {first, mixed(first ^ 0x9E3779B9u)};
}

// 32 bits for one element (its row-major index, modulo 2^32): the lower 16 are for v, the upper 16 for m. The second
// part of the key enters between the rounds, so that two keys' sequences are not one sequence shifted.
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

// One half of random_bits, moved on: shift 0 for v, 16 for m. U as in RoundingOf.
template <typename U>
ADAM_FUNCTION U random_half(U bits, unsigned shift, unsigned advance) {
  return ((bits >> shift) + advance) & 0xFFFFu;
}

// ---- From an optimizer's request to one store ----

// The results that are rounded stochastically; the others to nearest.
enum RoundedResults { kRoundParameter = 1, kRoundM = 2, kRoundV = 4 };

// The request for a node's tensors: 32-bit fields, since kernels receive it as it is.
struct RoundingRequest {
  unsigned results;  // RoundedResults
  unsigned seed_low;
  unsigned seed_high;
};

// The request for one tensor in one step.
struct TensorRounding {
  unsigned results;
  RoundingKey parameter_key;
  RoundingKey state_key;
  unsigned advance;
};

// Quantized state has the same start in every step and goes on by the golden ratio, whose multiples fill the unit
// interval evenly: the same mean as with fresh bits and less noise. `step` is read only if something is rounded
// stochastically.
ADAM_FUNCTION TensorRounding tensor_rounding(RoundingRequest request, unsigned step, unsigned tensor,
                                             bool is_quantized) {
  RoundingKey fresh = rounding_key(request.seed_low, request.seed_high, step, tensor);
  if (!is_quantized) return {request.results, fresh, fresh, 0u};
  RoundingKey fixed = rounding_key(request.seed_low, request.seed_high, 0u, tensor);
  return {request.results, fresh, fixed, step * 0x9E37u};
}

// How one store rounds: with 16 random bits, or to nearest. U is unsigned, or a vector of such.
template <typename U>
struct RoundingOf {
  bool is_stochastic;
  U random;
};
typedef RoundingOf<unsigned> Rounding;

struct ElementRounding {
  Rounding parameter;
  Rounding m;
  Rounding v;
};

ADAM_FUNCTION ElementRounding element_rounding(TensorRounding tensor, unsigned element) {
  unsigned of_state = 0u, of_parameter = 0u;
  if ((tensor.results & (kRoundM | kRoundV)) != 0u) {
    of_state = random_bits(tensor.state_key, element);
  }
  if ((tensor.results & kRoundParameter) != 0u) {
    of_parameter = more_random_bits(tensor.parameter_key, element);
  }
  return {{(tensor.results & kRoundParameter) != 0u, of_parameter & 0xFFFFu},
          {(tensor.results & kRoundM) != 0u, random_half(of_state, 16u, tensor.advance)},
          {(tensor.results & kRoundV) != 0u, random_half(of_state, 0u, tensor.advance)}};
}

}  // namespace fused_adam
