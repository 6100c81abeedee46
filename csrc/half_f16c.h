// float16 from and to float32 by the conversion instructions that x86 has since F16C; round to nearest even. n is a
// multiple of kLanes.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace fused_adam::cpu {
namespace {
namespace half {

constexpr std::size_t kLanes = 8;

inline void to_float(const std::uint16_t* from, std::size_t n, float* to) {
  for (std::size_t i = 0; i < n; i += kLanes) {
    __m128i h = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    _mm256_storeu_ps(to + i, _mm256_cvtph_ps(h));
  }
}

inline void from_float(const float* from, std::size_t n, std::uint16_t* to) {
  for (std::size_t i = 0; i < n; i += kLanes) {
    __m128i h = _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), h);
  }
}

}  // namespace half
}  // namespace
}  // namespace fused_adam::cpu
