// What a compiled shader and the emulator's runtime know of each other.
// The shader (built by compile_shader.py) exports a table of its kernels and calls the emulator_* functions; grid.cpp
// defines them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace emulator {

struct Position {
  uint32_t x, y, z;
};

// Where a thread stands; one field for each attribute that a kernel parameter may have.
struct Thread {
  Position thread_position_in_grid;
  Position thread_position_in_threadgroup;
  Position threadgroup_position_in_grid;
  Position threadgroups_per_grid;
  Position threads_per_grid;
  Position threads_per_threadgroup;  // of this threadgroup, which is smaller at the edge of the grid
  Position dispatch_threads_per_threadgroup;
  uint32_t thread_index_in_threadgroup;
  uint32_t thread_index_in_simdgroup;
  uint32_t simdgroup_index_in_threadgroup;
  uint32_t simdgroups_per_threadgroup;
  uint32_t threads_per_simdgroup;
};

enum class Role {
  buffer,
  threadgroup,
  thread_position_in_grid,
  thread_position_in_threadgroup,
  threadgroup_position_in_grid,
  threadgroups_per_grid,
  threads_per_grid,
  threads_per_threadgroup,
  dispatch_threads_per_threadgroup,
  thread_index_in_threadgroup,
  thread_index_in_simdgroup,
  simdgroup_index_in_threadgroup,
  simdgroups_per_threadgroup,
  threads_per_simdgroup,
};

struct Parameter {
  Role role;
  int index;            // of a buffer or of threadgroup memory; -1: the lowest that no other parameter names
  size_t pointee_size;  // what a reference must find behind it; 0 for a pointer
  size_t pointee_align;
};

struct Kernel {
  const char* name;
  // Runs one thread; arguments[i] is the address for parameter i, where that is a pointer or a reference.
  void (*run)(const Thread& thread, void* const* arguments);
  const Parameter* parameters;
  int parameter_count;
};

struct KernelTable {
  const Kernel* kernels;
  int count;
  char* (*thread_local_anchor)();  // locates this thread's copy of the threadgroup variables
};

enum MemFlags { mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4 };

constexpr uint32_t kSimdWidth = 32;

}  // namespace emulator

extern "C" {
// `line` tells barriers apart: all threads of a threadgroup must meet at the same one.
void emulator_threadgroup_barrier(int mem_flags, int line);
void emulator_simdgroup_barrier(int mem_flags, int line);
// Gives every lane of the simdgroup the values of all 32 (lanes[i], each `size` bytes); returns the mask of lanes that
// took part.
uint32_t emulator_simd_exchange(const void* value, size_t size, void* lanes, int line);
uint32_t emulator_simd_lane();
// Checks an atomic access like any other, except that atomics do not race with each other.
void emulator_atomic_access(const volatile void* address, size_t size);
}
