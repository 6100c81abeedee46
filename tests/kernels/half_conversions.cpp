// Compares float16 conversions by instructions (HALF_HEADER) with those in integer arithmetic: every float16, and
// float32 at and around every point where rounding changes; and those that put even and odd places apart with those
// that do not. Compiled and run by test_half_conversions.py.
#if defined(__aarch64__)
#include <arm_neon.h>
#else
#include <immintrin.h>
#endif

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

namespace instructions {
#include HALF_HEADER
}
namespace portable {
#include "cpu/half/portable.h"
}
namespace tested = instructions::fused_adam::cpu::half;
namespace reference = portable::fused_adam::cpu::half;

static std::uint32_t bits(float x) {
  std::uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

int main() {
  std::vector<std::uint16_t> halves(65536);  // conversions take whole vectors
  for (std::size_t i = 0; i < halves.size(); ++i) halves[i] = std::uint16_t(65535 - i);
  std::vector<float> actual(halves.size()), expected(halves.size());
  tested::to_float(halves.data(), halves.size(), actual.data());
  reference::to_float(halves.data(), halves.size(), expected.data());
  for (std::size_t i = 0; i < halves.size(); ++i) {
    bool equal = bits(actual[i]) == bits(expected[i]) || (std::isnan(actual[i]) && std::isnan(expected[i]));
    if (!equal) return std::printf("float16 %04x: %a instead of %a\n", halves[i], actual[i], expected[i]), 1;
  }

  // A float16 has 13 bits fewer than a float32; half of its last place is bit 12. Below float16's normal numbers, more
  // bits go, and the same patterns step over the halves of those places.
  std::vector<float> numbers;
  for (std::uint64_t high = 0; high < (1u << 20); ++high) {
    for (int low : {-1, 0, 1}) {
      std::uint32_t u = std::uint32_t((high << 12) + std::uint64_t(std::int64_t(low)));
      float x;
      std::memcpy(&x, &u, sizeof x);
      numbers.push_back(x);
    }
  }
  std::vector<std::uint16_t> rounded(numbers.size()), wanted(numbers.size());
  tested::from_float(numbers.data(), numbers.size(), rounded.data());
  reference::from_float(numbers.data(), numbers.size(), wanted.data());
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    bool is_nan = (rounded[i] & 0x7C00) == 0x7C00 && (rounded[i] & 0x3FF);
    bool equal = std::isnan(numbers[i]) ? is_nan : rounded[i] == wanted[i];
    if (!equal) return std::printf("%a: %04x instead of %04x\n", numbers[i], rounded[i], wanted[i]), 1;
  }

  // Apart: even places in the lower half, odd ones in the upper.
  std::size_t half = halves.size() / 2;
  std::vector<float> apart(halves.size());
  tested::to_floats_apart(halves.data(), halves.size(), &apart[0], &apart[half]);
  for (std::size_t i = 0; i < halves.size(); ++i) {
    if (bits(apart[i / 2 + i % 2 * half]) != bits(actual[i]))
      return std::printf("apart, float16 %04x at place %zu\n", halves[i], i), 1;
  }
  half = numbers.size() / 2;
  apart.resize(numbers.size());
  for (std::size_t i = 0; i < numbers.size(); ++i) apart[i / 2 + i % 2 * half] = numbers[i];
  std::vector<std::uint16_t> together(numbers.size());
  tested::from_floats_apart(&apart[0], &apart[half], numbers.size(), together.data());
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    if (together[i] != rounded[i]) return std::printf("from apart, %a at place %zu\n", numbers[i], i), 1;
  }
  std::puts("equal");
}
