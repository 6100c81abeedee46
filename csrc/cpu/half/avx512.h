// float16 from and to float32 by AVX-512's conversions of 16 values; round to nearest even. n is a multiple of kLanes.
#pragma once

#include <immintrin.h>

#include <cstddef>
#include <cstdint>

namespace fused_adam::cpu {
namespace {
namespace half {

constexpr std::size_t kLanes = 16;

inline void to_float(const std::uint16_t* from, std::size_t n, float* to) {
  for (std::size_t i = 0; i < n; i += kLanes) {
    __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    _mm512_storeu_ps(to + i, _mm512_cvtph_ps(h));
  }
}

inline void from_float(const float* from, std::size_t n, std::uint16_t* to) {
  for (std::size_t i = 0; i < n; i += kLanes) {
    __m256i h = _mm512_cvtps_ph(_mm512_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), h);
  }
}

// The values at even and at odd places; n is a multiple of 2 * kLanes.
inline void to_floats_apart(const std::uint16_t* from, std::size_t n, float* even, float* odd) {
  for (std::size_t i = 0; i < n; i += 2 * kLanes) {
    __m512i words = _mm512_loadu_si512(from + i);
    _mm512_storeu_ps(even + i / 2, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(words)));
    __m512i upper = _mm512_srli_epi32(words, 16);
    _mm512_storeu_ps(odd + i / 2, _mm512_cvtph_ps(_mm512_cvtepi32_epi16(upper)));
  }
}

inline void from_floats_apart(const float* even, const float* odd, std::size_t n, std::uint16_t* to) {
  auto words = [](const float* from) {
    return _mm512_cvtepu16_epi32(_mm512_cvtps_ph(_mm512_loadu_ps(from), _MM_FROUND_TO_NEAREST_INT));
  };
  for (std::size_t i = 0; i < n; i += 2 * kLanes) {
    __m512i upper = _mm512_slli_epi32(words(odd + i / 2), 16);
    _mm512_storeu_si512(to + i, _mm512_or_si512(words(even + i / 2), upper));
  }
}

}  // namespace half
}  // namespace
}  // namespace fused_adam::cpu
