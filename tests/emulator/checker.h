// Watches every memory access of a running kernel: bounds, declared use, alignment, initialisation, data races.
// Shaders are compiled with -fsanitize=thread but without its library: the __tsan_* functions they call stand in
// checker.cpp and look each address up here. A fault ends the kernel through fail().
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace emulator {

// What one thread of a dispatch has done to one element; 0 means nobody, otherwise the thread's number + 1.
struct DeviceCell {
  uint32_t writer = 0;
  uint32_t reader = 0;
};

struct ThreadgroupCell {
  uint32_t write_epoch = 0, read_epoch = 0;  // barriers before the access
  uint32_t write_simd_epoch = 0, read_simd_epoch = 0;
  uint16_t writer = 0, reader = 0;
};

// A stretch of a region whose bytes the host declared alike.
struct Segment {
  size_t end;
  bool input, output;
};

// Memory behind one buffer binding, or behind several that overlap.
struct Region {
  char* begin = nullptr;
  size_t size = 0;
  unsigned element_shift = 0;  // log2 of the smallest element of its bindings
  std::vector<Segment> segments;
  std::vector<DeviceCell> cells;  // one an element; empty where nothing is written, or the region is huge
  std::function<std::string()> description;

  const Segment& segment_at(size_t offset) const {
    size_t i = 0;
    while (segments[i].end <= offset) ++i;
    return segments[i];
  }
};

struct ThreadgroupVariable {
  size_t begin, end;  // within its block
  std::string name;
};

// Threadgroup memory: the shader's own variables, or what the host sized for [[threadgroup(n)]] parameters.
struct ThreadgroupBlock {
  char* begin = nullptr;
  size_t size = 0;
  std::vector<ThreadgroupVariable> variables;
  std::vector<ThreadgroupCell> cells;  // one a byte
};

// Regions that are not huge live in slots of one reserved range, so that a slot follows from an address, and an index
// that runs past its buffer meets nothing else for half a slot's width.
constexpr size_t kSlotSize = size_t{1} << 28;
constexpr size_t kSlots = 64;
constexpr size_t kLargestCopy = kSlotSize / 2;

struct CheckerState {
  bool running = false;
  char* stacks = nullptr;
  size_t stacks_size = 0;
  char* arena = nullptr;
  std::vector<Region> regions;  // regions[i] lies in slot i unless huge
  std::vector<Region*> huge_regions;
  ThreadgroupBlock blocks[2];
  const char* image_begin = nullptr;  // the shader's library: its constants may be read
  const char* image_end = nullptr;

  // Of the thread that runs now; grid.cpp keeps them.
  uint32_t thread_in_dispatch = 0;
  uint32_t thread_in_threadgroup = 0;
  uint32_t epoch = 1;             // grows with every barrier and threadgroup, never falls
  uint32_t first_epoch = 1;       // of this threadgroup: what was written before is uninitialised
  uint32_t simd_epochs[32] = {};  // of each simdgroup of this threadgroup
};

extern CheckerState checker;

char* arena_slot(size_t slot);

// Ends the running kernel; `what` follows the names of kernel and thread in the message. Defined in grid.cpp.
[[noreturn]] void fail(const std::string& what);

}  // namespace emulator
