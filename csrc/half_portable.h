// float16 from and to float32 in integer arithmetic with selects (the method of F. Giesen's conversions), which
// compilers vectorise for every instruction set. Round to nearest even; subnormals kept.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fused_adam::cpu {
namespace {
namespace half {

inline std::uint32_t bits(float x) {
  std::uint32_t u;
  __builtin_memcpy(&u, &x, sizeof u);
  return u;
}

inline float number(std::uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, sizeof x);
  return x;
}

inline void to_float(const std::uint16_t* from, std::size_t n, float* to) {
  for (std::size_t i = 0; i < n; ++i) {
    std::uint16_t h = from[i];
    std::uint32_t normal = (std::uint32_t(h & 0x7FFFu) << 13) + ((127u - 15u) << 23);
    std::uint32_t special = normal + ((128u - 16u) << 23);
    std::uint32_t subnormal = bits(number(normal + (1u << 23)) - number(113u << 23));
    std::uint32_t u = (h & 0x7C00u) == 0x7C00u ? special : normal;
    u = (h & 0x7C00u) == 0u ? subnormal : u;
    to[i] = number(u | (std::uint32_t(h & 0x8000u) << 16));
  }
}

inline void from_float(const float* from, std::size_t n, std::uint16_t* to) {
  const std::uint32_t magic = ((127u - 15u) + (23u - 10u) + 1u) << 23;
  for (std::size_t i = 0; i < n; ++i) {
    std::uint32_t sign = bits(from[i]) & 0x80000000u;
    std::uint32_t u = bits(from[i]) ^ sign;
    std::uint32_t normal = (u - ((127u - 15u) << 23) + 0xFFFu + ((u >> 13) & 1u)) >> 13;
    std::uint32_t subnormal = bits(number(u) + number(magic)) - magic;
    std::uint32_t h = u < (113u << 23) ? subnormal : normal;
    h = u >= ((127u + 16u) << 23) ? 0x7C00u : h;
    h = u > (255u << 23) ? 0x7E00u : h;
    to[i] = std::uint16_t(h | (sign >> 16));
  }
}

}  // namespace half
}  // namespace
}  // namespace fused_adam::cpu
