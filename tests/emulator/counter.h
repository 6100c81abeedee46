// Counts what the memory system is asked for: the 128-byte lines that each access of a simdgroup touches, and the cycles
// that its accesses to threadgroup memory take. Coalescing and bank conflicts as vendors describe them (NVIDIA, CUDA C++
// Best Practices Guide, 10.2); Apple documents neither, so the counts compare kernels rather than predict times.
// checker.cpp reports every access; bindings.cpp hands the sums to Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace emulator {

constexpr size_t kLineBytes = 128;

// Of one buffer, or of several that share memory, in all dispatches of a kernel.
struct Traffic {
  uint64_t lines = 0;        // touched by each access of a simdgroup, summed: what its load and store units move
  uint64_t group_lines = 0;  // touched by each threadgroup, summed: what memory moves if a cache holds those
  uint64_t own_lines = 0;    // touched by anyone in a dispatch
};

struct Counts {
  std::map<int, Traffic> reads, writes;  // by the lowest index of the buffers that share the memory
  // Of threadgroup memory: 32 banks, 4 bytes a cycle each; how many are used, and how many the accesses' bytes need.
  uint64_t cycles = 0, fewest_cycles = 0;
};

// Between these two, every dispatch is counted, in its first order of execution.
void start_counting();
std::map<std::string, Counts> stop_counting();

// ---- For the emulator itself ----

// Of one run of a grid. Buffers that fit a line are left out: they stay in every cache.
void begin_count(const std::string& kernel, const std::vector<int>& buffer_of_region);
void end_count();
bool is_counting();

// An access by the thread that runs now. The k-th execution of one instruction is one access of its simdgroup.
void count_device_access(size_t region, const char* address, size_t size, bool is_write, const void* instruction);
void count_threadgroup_access(size_t offset, size_t size, const void* instruction);

}  // namespace emulator
