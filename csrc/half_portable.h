// float16 from and to float32 where no instructions for it can be relied on: storage_formats.h, which compilers vectorise for
// every instruction set. Round to nearest even.
#pragma once

#include <cstddef>
#include <cstdint>

#include "storage_formats.h"

namespace fused_adam::cpu {
namespace {
namespace half {

inline void to_float(const std::uint16_t* from, std::size_t n, float* to) {
  for (std::size_t i = 0; i < n; ++i) to[i] = load_float16(from[i]);
}

inline void from_float(const float* from, std::size_t n, std::uint16_t* to) {
  for (std::size_t i = 0; i < n; ++i) to[i] = store_float16(from[i], {false, 0});
}

}  // namespace half
}  // namespace
}  // namespace fused_adam::cpu
