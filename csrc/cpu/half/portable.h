// float16 from and to float32 where no instructions for it can be relied on: encodings.h, which compilers vectorise for
// every instruction set. Round to nearest even.
#pragma once

#include <cstddef>
#include <cstdint>

#include "math/encodings.h"

namespace fused_adam::cpu {
namespace {
namespace half {

inline void to_float(const std::uint16_t* from, std::size_t n, float* to) {
  for (std::size_t i = 0; i < n; ++i) to[i] = load_float16(from[i]);
}

inline void from_float(const float* from, std::size_t n, std::uint16_t* to) {
  for (std::size_t i = 0; i < n; ++i) to[i] = store_float16(from[i], {false, 0});
}

// The values at even and at odd places.
inline void to_floats_apart(const std::uint16_t* from, std::size_t n, float* even, float* odd) {
  for (std::size_t i = 0; i < n / 2; ++i) {
    even[i] = load_float16(from[2 * i]);
    odd[i] = load_float16(from[2 * i + 1]);
  }
}

inline void from_floats_apart(const float* even, const float* odd, std::size_t n, std::uint16_t* to) {
  for (std::size_t i = 0; i < n / 2; ++i) {
    to[2 * i] = store_float16(even[i], {false, 0});
    to[2 * i + 1] = store_float16(odd[i], {false, 0});
  }
}

}  // namespace half
}  // namespace
}  // namespace fused_adam::cpu
