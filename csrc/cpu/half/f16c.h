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

// The values at even and at odd places; n is a multiple of 2 * kLanes.
inline void to_floats_apart(const std::uint16_t* from, std::size_t n, float* even, float* odd) {
  const __m256i apart = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,  //
                                         0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
  for (std::size_t i = 0; i < n; i += 2 * kLanes) {
    __m256i h = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i));
    h = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(h, apart), 0xD8);
    _mm256_storeu_ps(even + i / 2, _mm256_cvtph_ps(_mm256_castsi256_si128(h)));
    _mm256_storeu_ps(odd + i / 2, _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1)));
  }
}

inline void from_floats_apart(const float* even, const float* odd, std::size_t n, std::uint16_t* to) {
  for (std::size_t i = 0; i < n; i += 2 * kLanes) {
    __m128i a = _mm256_cvtps_ph(_mm256_loadu_ps(even + i / 2), _MM_FROUND_TO_NEAREST_INT);
    __m128i b = _mm256_cvtps_ph(_mm256_loadu_ps(odd + i / 2), _MM_FROUND_TO_NEAREST_INT);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm_unpacklo_epi16(a, b));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i + kLanes), _mm_unpackhi_epi16(a, b));
  }
}

}  // namespace half
}  // namespace
}  // namespace fused_adam::cpu
