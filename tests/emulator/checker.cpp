// See checker.h. Shadow memory in the manner of ThreadSanitizer (Serebryany & Iskhodzhanov 2009) with exact ownership:
// one thread runs at a time, so a conflict between unordered accesses is always seen, whatever the order of execution.
#include "checker.h"

#include <dlfcn.h>
#include <stdio.h>
#include <sys/mman.h>

#include <algorithm>
#include <cstring>
#include <sstream>
#include <stdexcept>

#include "abi.h"
#include "counter.h"

namespace emulator {

CheckerState checker;

char* arena_slot(size_t slot) {
  if (!checker.arena) {
    void* range =
        mmap(nullptr, kSlots * kSlotSize, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) throw std::runtime_error("[emulator] cannot reserve address space");
    checker.arena = static_cast<char*>(range);
  }
  return checker.arena + slot * kSlotSize;
}

namespace {

constexpr uint32_t kManyReaders = UINT32_MAX;
constexpr uint32_t kAtomic = UINT32_MAX - 1;

enum class Access { read, write, atomic };

// The shader's line that made the access, by its debug information; empty where that cannot be had.
std::string source_line(const void* code) {
  Dl_info info;
  if (!dladdr(code, &info) || !info.dli_fname) return "";
  std::ostringstream command;
  command << "addr2line -i -e '" << info.dli_fname << "' 0x" << std::hex
          << static_cast<const char*>(code) - static_cast<const char*>(info.dli_fbase) - 1 << " 2>/dev/null";
  FILE* pipe = popen(command.str().c_str(), "r");
  if (!pipe) return "";
  // From the innermost inlined function outwards: the first line that is not the shim's own.
  std::string found;
  char line[512];
  while (fgets(line, sizeof line, pipe)) {
    std::string text(line);
    text = text.substr(text.rfind('/') + 1);
    text.erase(std::min(text.find(" (discriminator"), text.find_last_not_of(" \n") + 1));
    if (found.empty() && text[0] != '?' && text.rfind("msl_", 0) != 0) found = " [" + text + "]";
  }
  pclose(pipe);
  return found;
}

struct Accessed {
  const char* address;
  size_t size;
  Access access;
  const void* code;

  [[noreturn]] void fail(const std::string& problem) const {
    const char* verbs[] = {"reads ", "writes ", "atomically updates "};
    emulator::fail(verbs[int(access)] + std::to_string(size) + " bytes " + problem + source_line(code));
  }
};

std::string byte(size_t offset) { return "at byte " + std::to_string(offset) + " of "; }

void check_device_cells(Region& region, size_t offset, const Accessed& a, bool is_input) {
  uint32_t self = checker.thread_in_dispatch + 1;
  size_t last = (offset + a.size - 1) >> region.element_shift;
  for (size_t i = offset >> region.element_shift; i <= last; ++i) {
    DeviceCell& cell = region.cells[i];
    if (a.access == Access::read) {
      if (cell.writer == 0 && !is_input) {
        a.fail(byte(offset) + region.description() + ", which is not declared as input and not yet written");
      }
      if (cell.writer != 0 && cell.writer != self) {
        a.fail(byte(offset) + region.description() + ", which another thread writes: a data race");
      }
      cell.reader = cell.reader == 0 || cell.reader == self ? self : kManyReaders;
    } else {
      uint32_t writer = a.access == Access::atomic ? kAtomic : self;
      if (cell.writer != 0 && cell.writer != writer) {
        a.fail(byte(offset) + region.description() + ", which another thread writes too: a data race");
      }
      if (cell.reader != 0 && cell.reader != self) {
        a.fail(byte(offset) + region.description() + ", which another thread reads: a data race");
      }
      cell.writer = writer;
    }
  }
}

void check_region(Region& region, const Accessed& a) {
  size_t offset = a.address - region.begin;
  if (a.address < region.begin) {
    a.fail(std::to_string(region.begin - a.address) + " bytes before the start of " + region.description());
  }
  if (offset + a.size > region.size) {
    a.fail(byte(offset) + region.description() + ", which ends at " + std::to_string(region.size));
  }
  bool input = region.segments[0].input, output = region.segments[0].output;
  // Usually all bindings of a region cover it alike, and it has but one segment.
  for (size_t at = offset; region.segments.size() > 1 && at < offset + a.size;) {
    const Segment& segment = region.segment_at(at);
    if (at == offset) input = output = true;
    input = input && segment.input;
    output = output && segment.output;
    at = segment.end;
  }
  if (a.access == Access::read && !input && !output) {
    a.fail(byte(offset) + region.description() + ", which is not declared as input");
  }
  if (a.access != Access::read && !output) {
    a.fail(byte(offset) + region.description() + ", which is not declared as output");
  }
  if (!region.cells.empty() && output) check_device_cells(region, offset, a, input);
  if (is_counting()) {
    count_device_access(size_t(&region - checker.regions.data()), a.address, a.size, a.access != Access::read, a.code);
  }
}

// A reader or writer of threadgroup memory is a thread's index, or several threads of simdgroup n: kManyOf | n.
constexpr uint16_t kManyOf = 0x8000, kManySimdgroups = 0xffff;

uint16_t join_readers(uint16_t other, uint16_t self) {
  uint16_t simdgroup = other & kManyOf ? other & ~kManyOf : other / kSimdWidth;
  return simdgroup == self / kSimdWidth ? uint16_t(kManyOf | simdgroup) : kManySimdgroups;
}

// Whether a barrier lies between what `other` did at these epochs and the present.
bool is_ordered(uint32_t other, uint32_t epoch, uint32_t simd_epoch) {
  if (epoch < checker.epoch) return true;
  uint32_t simdgroup = checker.thread_in_threadgroup / kSimdWidth;
  uint32_t other_simdgroup = other & kManyOf ? other & ~kManyOf : other / kSimdWidth;
  return other_simdgroup == simdgroup && simd_epoch < checker.simd_epochs[simdgroup];
}

void check_threadgroup(ThreadgroupBlock& block, const Accessed& a) {
  size_t offset = a.address - block.begin;
  auto variable = std::upper_bound(block.variables.begin(), block.variables.end(), offset,
                                   [](size_t at, const auto& v) { return at < v.begin; });
  if (variable == block.variables.begin()) a.fail("outside every threadgroup variable");
  --variable;
  if (offset + a.size > variable->end) {
    a.fail(byte(offset - variable->begin) + "threadgroup memory " + variable->name + ", which ends at " +
           std::to_string(variable->end - variable->begin));
  }
  auto where = [&] { return byte(offset - variable->begin) + "threadgroup memory " + variable->name; };
  uint32_t self = checker.thread_in_threadgroup;
  uint32_t simd_epoch = checker.simd_epochs[self / kSimdWidth];
  for (size_t i = offset; i < offset + a.size; ++i) {
    ThreadgroupCell& cell = block.cells[i];
    bool is_written = cell.write_epoch >= checker.first_epoch;
    if (a.access == Access::read && !is_written) a.fail(where() + ", which is uninitialised");
    if (is_written && cell.writer != self && !is_ordered(cell.writer, cell.write_epoch, cell.write_simd_epoch)) {
      a.fail(where() + ", which another thread writes with no barrier between: a data race");
    }
    if (a.access == Access::read) {
      bool others_read = cell.read_epoch == checker.epoch && cell.reader != self;
      cell.reader = others_read ? join_readers(cell.reader, uint16_t(self)) : uint16_t(self);
      cell.read_epoch = checker.epoch;
      cell.read_simd_epoch = simd_epoch;
    } else {
      if (cell.read_epoch >= checker.first_epoch && cell.reader != self &&
          !is_ordered(cell.reader, cell.read_epoch, cell.read_simd_epoch)) {
        a.fail(where() + ", which another thread reads with no barrier between: a data race");
      }
      cell.writer = uint16_t(self);
      cell.write_epoch = checker.epoch;
      cell.write_simd_epoch = simd_epoch;
    }
  }
  if (is_counting()) count_threadgroup_access(offset, a.size, a.code);
}

void check(const Accessed& a) {
  size_t slot = size_t(a.address - checker.arena) / kSlotSize;
  if (slot < checker.regions.size()) return check_region(checker.regions[slot], a);
  for (Region* region : checker.huge_regions) {
    if (size_t(a.address - region->begin) < region->size) return check_region(*region, a);
  }
  for (ThreadgroupBlock& block : checker.blocks) {
    if (size_t(a.address - block.begin) < block.size) return check_threadgroup(block, a);
  }
  bool in_image = a.address >= checker.image_begin && a.address + a.size <= checker.image_end;
  if (in_image && a.access == Access::read) return;
  a.fail(in_image ? "of a program-scope constant" : "outside every buffer");
}

// `aligned` accesses are of a type whose size is also its alignment.
template <size_t Size, bool aligned>
inline __attribute__((always_inline)) void on_access(const volatile void* p, Access access, size_t size = Size) {
  auto address = const_cast<const char*>(static_cast<const volatile char*>(p));
  if (size_t(address - checker.stacks) < checker.stacks_size || !checker.running || size == 0) return;
  Accessed a{address, size, access, __builtin_return_address(0)};
  if (aligned && reinterpret_cast<uintptr_t>(address) % Size != 0) {
    a.fail("at an address that is not a multiple of " + std::to_string(Size));
  }
  check(a);
}

}  // namespace
}  // namespace emulator

using emulator::Access;
using emulator::on_access;

#define HOOK extern "C" __attribute__((visibility("default"))) void

#define HOOKS_OF_SIZE(n)                                                             \
  HOOK __tsan_read##n(void* p) { on_access<n, true>(p, Access::read); }              \
  HOOK __tsan_write##n(void* p) { on_access<n, true>(p, Access::write); }            \
  HOOK __tsan_unaligned_read##n(void* p) { on_access<n, false>(p, Access::read); }   \
  HOOK __tsan_unaligned_write##n(void* p) { on_access<n, false>(p, Access::write); } \
  HOOK __tsan_volatile_read##n(void* p) { on_access<n, true>(p, Access::read); }     \
  HOOK __tsan_volatile_write##n(void* p) { on_access<n, true>(p, Access::write); }
HOOKS_OF_SIZE(1)
HOOKS_OF_SIZE(2)
HOOKS_OF_SIZE(4)
HOOKS_OF_SIZE(8)
HOOKS_OF_SIZE(16)

HOOK __tsan_read_range(void* p, size_t size) { on_access<1, true>(p, Access::read, size); }
HOOK __tsan_write_range(void* p, size_t size) { on_access<1, true>(p, Access::write, size); }
// What clang makes of copies and fills.
extern "C" __attribute__((visibility("default"))) void* __tsan_memcpy(void* to, const void* from, size_t size) {
  on_access<1, true>(from, Access::read, size);
  on_access<1, true>(to, Access::write, size);
  return std::memcpy(to, from, size);
}
extern "C" __attribute__((visibility("default"))) void* __tsan_memset(void* to, int value, size_t size) {
  on_access<1, true>(to, Access::write, size);
  return std::memset(to, value, size);
}
HOOK __tsan_init() {}
HOOK __tsan_func_entry(void*) {}
HOOK __tsan_func_exit() {}
HOOK emulator_atomic_access(const volatile void* p, size_t size) { on_access<1, true>(p, Access::atomic, size); }
