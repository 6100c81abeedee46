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

}  // namespace half
}  // namespace
}  // namespace fused_adam::cpu
