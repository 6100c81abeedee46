// Runs a kernel over a grid: threadgroup after threadgroup, each thread until it returns or meets a barrier.
// Barriers and simdgroup functions hold a thread back until the others have come to the same place.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "abi.h"

namespace emulator {

struct Size {
  uint64_t x = 1, y = 1, z = 1;
  uint64_t count() const { return x * y * z; }
};

enum class Order { forward, reverse, shuffled };
const char* name_of(Order order);

struct Grid {
  Size threads;  // of the whole grid; threadgroups at its far edges may be smaller
  Size threads_per_threadgroup;
  // Threadgroups by row-major index that are run; the others are left out.
  uint64_t first_threadgroup = 0, end_threadgroup = UINT64_MAX;
};

constexpr uint32_t kMaxThreadsPerThreadgroup = 1024;

// Throws std::runtime_error at the first fault that checker.h finds, or at a barrier that not all threads reach.
void run_grid(const Kernel& kernel, void* const* arguments, const Grid& grid, Order order);

}  // namespace emulator
