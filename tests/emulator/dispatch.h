// One dispatch: a kernel, what is bound to its parameters, a grid. Runs it in several orders and compares.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

#include "grid.h"
#include "library.h"

namespace emulator {

struct Binding {
  int index = -1;        // of the buffer; -1 for memory that is declared but not bound
  char* data = nullptr;  // first byte that may be accessed
  size_t size = 0;       // up to and with the last one
  size_t first = 0;      // where in these bytes the kernel's pointer points: negative strides lead before it
  size_t offset = 0;     // of data in its allocation, which on Metal starts at a page: decides the alignment
  size_t element_size = 1;
  bool input = false, output = false;
  std::optional<std::weak_ptr<void>> memory;  // of data, which its owner must keep until the dispatch has run
  std::vector<char> bytes;                    // of set_bytes: the data itself, in place of data and size

  char* start() const { return bytes.empty() ? data : const_cast<char*>(bytes.data()); }
  size_t length() const { return bytes.empty() ? size : bytes.size(); }
};

struct Dispatch {
  std::shared_ptr<Library> library;
  const Kernel* kernel = nullptr;
  std::vector<Binding> bindings;
  std::vector<std::pair<int, size_t>> threadgroup_memory;  // index and bytes
  Size grid;                                               // in threads
  Size threads_per_threadgroup;
};

// Metal's limits, and that every parameter has what it needs. Throws std::invalid_argument.
void validate(const Dispatch& dispatch);

// A GPU whose kernels run no more threads in a threadgroup than this; 1024 unless set.
void set_largest_threadgroup(size_t threads);
size_t largest_threadgroup();

// Throws std::runtime_error that says which thread did what.
void run(const Dispatch& dispatch);

// For tests of dispatches too large to run: only threadgroups [first, end) by row-major index are run from now on,
// and outputs may stay unwritten. run_all_threadgroups() ends it.
void run_only_threadgroups(uint64_t first, uint64_t end);
void run_all_threadgroups();

// What has been run since the process began; a test can see that the emulator was at work.
struct Statistics {
  uint64_t dispatches = 0;
  std::map<std::string, uint64_t> by_kernel;
};
Statistics statistics();

// Held while a dispatch runs, and while a library is loaded, whose initialisers the checker must not see.
std::unique_lock<std::mutex> exclusive();

}  // namespace emulator
