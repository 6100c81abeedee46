// float16 from and to float32 by the conversion instructions that every arm64 has; round to nearest even. n is a
// multiple of kLanes.
#pragma once

#include <arm_neon.h>

#include <cstddef>
#include <cstdint>

namespace fused_adam::cpu {
namespace {
namespace half {

constexpr std::size_t kLanes = 8;

inline void to_float(const std::uint16_t* from, std::size_t n, float* to) {
  for (std::size_t i = 0; i < n; i += kLanes) {
    float16x8_t h = vreinterpretq_f16_u16(vld1q_u16(from + i));
    vst1q_f32(to + i, vcvt_f32_f16(vget_low_f16(h)));
    vst1q_f32(to + i + kLanes / 2, vcvt_high_f32_f16(h));
  }
}

inline void from_float(const float* from, std::size_t n, std::uint16_t* to) {
  for (std::size_t i = 0; i < n; i += kLanes) {
    float16x4_t low = vcvt_f16_f32(vld1q_f32(from + i));
    float16x8_t h = vcvt_high_f16_f32(low, vld1q_f32(from + i + kLanes / 2));
    vst1q_u16(to + i, vreinterpretq_u16_f16(h));
  }
}

// The values at even and at odd places; n is a multiple of 2 * kLanes.
inline void to_floats_apart(const std::uint16_t* from, std::size_t n, float* even, float* odd) {
  float* to[] = {even, odd};
  for (std::size_t i = 0; i < n; i += 2 * kLanes) {
    uint16x8x2_t words = vld2q_u16(from + i);
    for (int place = 0; place < 2; ++place) {
      float16x8_t h = vreinterpretq_f16_u16(words.val[place]);
      vst1q_f32(to[place] + i / 2, vcvt_f32_f16(vget_low_f16(h)));
      vst1q_f32(to[place] + i / 2 + kLanes / 2, vcvt_high_f32_f16(h));
    }
  }
}

inline void from_floats_apart(const float* even, const float* odd, std::size_t n, std::uint16_t* to) {
  const float* from[] = {even, odd};
  for (std::size_t i = 0; i < n; i += 2 * kLanes) {
    uint16x8x2_t words;
    for (int place = 0; place < 2; ++place) {
      float16x4_t low = vcvt_f16_f32(vld1q_f32(from[place] + i / 2));
      float32x4_t high = vld1q_f32(from[place] + i / 2 + kLanes / 2);
      words.val[place] = vreinterpretq_u16_f16(vcvt_high_f16_f32(low, high));
    }
    vst2q_u16(to + i, words);
  }
}

}  // namespace half
}  // namespace
}  // namespace fused_adam::cpu
