// The widest vectors of the instruction set that kernels.cpp is compiled for, with the names that math/device_math.h
// has for a single value: so encodings.h, included after this, serves vectors too. Where compilers vectorise the loop
// over an element's formula well, it stays one; what they were seen to take apart (values of 8 bits, and the largest of
// several) is in vectors.
#pragma once

#include <cstddef>
#include <cstdint>

#if FUSED_ADAM_VECTOR_BYTES >= 32
#include <immintrin.h>
#endif

#include "math/device_math.h"

#define FUSED_ADAM_INLINE inline __attribute__((always_inline))
#define FUSED_ADAM_INLINE_LAMBDA __attribute__((always_inline))

#if defined(__clang__)
#define FUSED_ADAM_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#else
#define FUSED_ADAM_VECTORIZE _Pragma("GCC ivdep")
#endif

namespace fused_adam {
namespace {

constexpr std::size_t kLanes = FUSED_ADAM_VECTOR_BYTES / sizeof(float);
typedef float Floats __attribute__((vector_size(FUSED_ADAM_VECTOR_BYTES)));
typedef std::int32_t Ints __attribute__((vector_size(FUSED_ADAM_VECTOR_BYTES)));
typedef std::uint32_t Words __attribute__((vector_size(FUSED_ADAM_VECTOR_BYTES)));
typedef std::uint64_t Pairs64 __attribute__((vector_size(FUSED_ADAM_VECTOR_BYTES)));  // of neighbouring lanes

FUSED_ADAM_INLINE Words bits_of(Floats x) { return (Words)x; }
FUSED_ADAM_INLINE Floats float_of(Words u) { return (Floats)u; }
FUSED_ADAM_INLINE Words as_unsigned(Ints i) { return (Words)i; }
FUSED_ADAM_INLINE Ints as_signed(Words u) { return (Ints)u; }
FUSED_ADAM_INLINE Floats to_float(Ints i) { return __builtin_convertvector(i, Floats); }
FUSED_ADAM_INLINE Ints to_int(Floats x) { return __builtin_convertvector(x, Ints); }

template <typename Vector, typename Value>
FUSED_ADAM_INLINE Vector load_vector(const Value* from) {
  Vector x;
  __builtin_memcpy(&x, from, sizeof x);
  return x;
}
template <typename Vector, typename Value>
FUSED_ADAM_INLINE void store_vector(Value* to, Vector x) {
  __builtin_memcpy(to, &x, sizeof x);
}

// Values of 8 bits from and to lanes; and a byte for each pair of lanes. Compilers take __builtin_convertvector between
// these widths apart, lane by lane.
#if FUSED_ADAM_VECTOR_BYTES == 64
FUSED_ADAM_INLINE Ints widen(const std::int8_t* from) { return (Ints)_mm512_cvtepi8_epi32(load_vector<__m128i>(from)); }
FUSED_ADAM_INLINE Ints widen(const std::uint8_t* from) {
  return (Ints)_mm512_cvtepu8_epi32(load_vector<__m128i>(from));
}
FUSED_ADAM_INLINE Pairs64 widen_pairs(const std::uint8_t* from) {
  return (Pairs64)_mm512_cvtepu8_epi64(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from)));
}
FUSED_ADAM_INLINE void narrow(Ints x, std::uint8_t* to) { store_vector(to, _mm512_cvtepi32_epi8((__m512i)x)); }
FUSED_ADAM_INLINE void narrow_pairs(Pairs64 x, std::uint8_t* to) {
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), _mm512_cvtepi64_epi8((__m512i)x));
}
#elif FUSED_ADAM_VECTOR_BYTES == 32
FUSED_ADAM_INLINE __m128i load_8_bytes(const void* from) { return _mm_loadl_epi64(static_cast<const __m128i*>(from)); }
FUSED_ADAM_INLINE Ints widen(const std::int8_t* from) { return (Ints)_mm256_cvtepi8_epi32(load_8_bytes(from)); }
FUSED_ADAM_INLINE Ints widen(const std::uint8_t* from) { return (Ints)_mm256_cvtepu8_epi32(load_8_bytes(from)); }
FUSED_ADAM_INLINE Pairs64 widen_pairs(const std::uint8_t* from) {
  return (Pairs64)_mm256_cvtepu8_epi64(_mm_cvtsi32_si128(load_vector<std::int32_t>(from)));
}
FUSED_ADAM_INLINE void narrow(Ints x, std::uint8_t* to) {
  const __m256i first_bytes = _mm256_set1_epi32(0x0C080400);
  __m256i bytes = _mm256_shuffle_epi8((__m256i)x, first_bytes);
  __m128i both = _mm_unpacklo_epi32(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(to), both);
}
FUSED_ADAM_INLINE void narrow_pairs(Pairs64 x, std::uint8_t* to) {
  const __m256i first_bytes = _mm256_set1_epi16(0x0800);
  __m256i bytes = _mm256_shuffle_epi8((__m256i)x, first_bytes);
  __m128i both = _mm_unpacklo_epi16(_mm256_castsi256_si128(bytes), _mm256_extracti128_si256(bytes, 1));
  store_vector(to, std::int32_t(_mm_cvtsi128_si32(both)));
}
#else
template <typename Value>
FUSED_ADAM_INLINE Ints widen(const Value* from) {
  std::int32_t lanes[kLanes];
  FUSED_ADAM_VECTORIZE
  for (std::size_t i = 0; i < kLanes; ++i) lanes[i] = from[i];
  return load_vector<Ints>(lanes);
}
FUSED_ADAM_INLINE Pairs64 widen_pairs(const std::uint8_t* from) {
  Pairs64 pairs;
  for (std::size_t i = 0; i < kLanes / 2; ++i) pairs[i] = from[i];
  return pairs;
}
FUSED_ADAM_INLINE void narrow(Ints x, std::uint8_t* to) {
  std::int32_t lanes[kLanes];
  store_vector(lanes, x);
  FUSED_ADAM_VECTORIZE
  for (std::size_t i = 0; i < kLanes; ++i) to[i] = std::uint8_t(lanes[i]);
}
FUSED_ADAM_INLINE void narrow_pairs(Pairs64 x, std::uint8_t* to) {
  for (std::size_t i = 0; i < kLanes / 2; ++i) to[i] = std::uint8_t(x[i]);
}
#endif

// Values of 4 bits, two to a byte, the first in its lower half, from and to lanes.
FUSED_ADAM_INLINE Ints unpack(const std::uint8_t* from) {
  Pairs64 both = widen_pairs(from);
  return (Ints)((both | both << 28) & 0x0000000F0000000Fu);
}
FUSED_ADAM_INLINE void pack(Ints x, std::uint8_t* to) {
  Pairs64 both = (Pairs64)x;
  narrow_pairs(both | both >> 28, to);
}

FUSED_ADAM_INLINE std::uint32_t largest_lane(Words x) {
  typedef std::uint32_t Quarter __attribute__((vector_size(16)));
  Quarter parts[kLanes / 4];
  __builtin_memcpy(parts, &x, sizeof parts);
  for (std::size_t half = kLanes / 8; half > 0; half /= 2) {
    for (std::size_t i = 0; i < half; ++i) parts[i] = parts[i] > parts[i + half] ? parts[i] : parts[i + half];
  }
  Quarter swapped = __builtin_shufflevector(parts[0], parts[0], 2, 3, 0, 1);
  Quarter pair = parts[0] > swapped ? parts[0] : swapped;
  swapped = __builtin_shufflevector(pair, pair, 1, 0, 3, 2);
  pair = pair > swapped ? pair : swapped;
  return pair[0];
}

}  // namespace
}  // namespace fused_adam
