// See dispatch.h. Buffers are copied to places with nothing around them, outputs of no input poisoned, and the copies
// brought back at the end; only buffers too large for that are used where they are, in forward order.
#include "dispatch.h"

#include <stdlib.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <mutex>
#include <sstream>
#include <stdexcept>

#include "checker.h"
#include "counter.h"

namespace emulator {

namespace {

constexpr int kMaxBuffers = 31;
constexpr char kPoison = char(0xff);
constexpr size_t kLargestVector = 16;  // bytes of one access

std::mutex mutex;
std::atomic<size_t> most_threads{kMaxThreadsPerThreadgroup};
uint64_t first_threadgroup = 0, end_threadgroup = UINT64_MAX;
Statistics totals;

bool runs_all() { return first_threadgroup == 0 && end_threadgroup == UINT64_MAX; }

// FUSED_ADAM_EMULATOR_ORDERS=forward spares the other two.
std::vector<Order> orders() {
  const char* value = getenv("FUSED_ADAM_EMULATOR_ORDERS");
  std::string names = value ? value : "forward,reverse,shuffled";
  std::vector<Order> result;
  for (Order order : {Order::forward, Order::reverse, Order::shuffled}) {
    if (names.find(name_of(order)) != std::string::npos) result.push_back(order);
  }
  if (result.empty()) throw std::runtime_error("[emulator] FUSED_ADAM_EMULATOR_ORDERS names no order");
  return result;
}

// Parameters without an index of their own take, in turn, the lowest that no other has.
std::vector<int> parameter_indices(const Kernel& kernel, Role role) {
  std::vector<int> indices(kernel.parameter_count, -1);
  std::vector<bool> taken(kernel.parameter_count + kMaxBuffers + 1);
  auto each = [&](auto visit) {
    for (int i = 0; i < kernel.parameter_count; ++i) {
      if (kernel.parameters[i].role == role) visit(i, kernel.parameters[i].index);
    }
  };
  each([&](int i, int index) {
    if (index < 0 || index >= kMaxBuffers) return;
    taken[index] = true;
    indices[i] = index;
  });
  each([&](int i, int index) {
    if (index >= kMaxBuffers) {
      indices[i] = index;
    } else if (index < 0) {
      int lowest = int(std::find(taken.begin(), taken.end(), false) - taken.begin());
      taken[lowest] = true;
      indices[i] = lowest;
    }
  });
  return indices;
}

// A region and where its bytes come from.
struct Placed {
  char* original = nullptr;
  size_t size = 0;
  bool is_huge = false;
  char* scratch = nullptr;  // of huge outputs
  std::vector<const Binding*> bindings;
};

// Joins bindings that overlap.
std::vector<Placed> placements(const Dispatch& dispatch) {
  std::vector<const Binding*> sorted;
  for (auto& binding : dispatch.bindings) sorted.push_back(&binding);
  std::stable_sort(sorted.begin(), sorted.end(), [](auto a, auto b) { return a->start() < b->start(); });
  std::vector<Placed> result;
  for (const Binding* binding : sorted) {
    bool overlaps = !result.empty() && binding->start() < result.back().original + result.back().size;
    if (!overlaps) result.push_back({binding->start(), 0, false, {}});
    Placed& placed = result.back();
    placed.size = std::max(placed.size, size_t(binding->start() + binding->length() - placed.original));
    placed.bindings.push_back(binding);
  }
  // What only the shader's index arithmetic would tell apart keeps its size; the rest is copied.
  for (auto& placed : result) placed.is_huge = placed.size > kLargestCopy;
  return result;
}

std::string describe(const std::vector<const Binding*>& bindings) {
  std::ostringstream text;
  for (auto binding : bindings) {
    if (text.tellp() > 0) text << " = ";
    if (binding->index < 0) {
      text << "a registered array";
    } else {
      text << "buffer " << binding->index;
    }
    text << (binding->input && binding->output ? " (input, output)"
             : binding->output                 ? " (output)"
             : binding->bytes.empty()          ? " (input)"
                                               : " (bytes)");
  }
  return text.str();
}

std::vector<Segment> segments_of(const Placed& placed) {
  std::vector<size_t> cuts;
  for (auto b : placed.bindings) {
    size_t begin = b->start() - placed.original;
    cuts.insert(cuts.end(), {begin, begin + b->length()});
  }
  std::sort(cuts.begin(), cuts.end());
  cuts.erase(std::unique(cuts.begin(), cuts.end()), cuts.end());
  std::vector<Segment> segments;
  for (size_t i = 1; i < cuts.size(); ++i) {
    Segment segment{cuts[i], false, false};
    for (auto b : placed.bindings) {
      size_t begin = b->start() - placed.original;
      if (begin <= cuts[i - 1] && cuts[i] <= begin + b->length()) {
        segment.input |= b->input;
        segment.output |= b->output;
      }
    }
    segments.push_back(segment);
  }
  return segments;
}

class Run {
 public:
  ~Run() {
    for (auto& placed : placed_) {
      if (placed.scratch) munmap(placed.scratch, scratch_size(placed));
    }
  }

  explicit Run(const Dispatch& dispatch) : dispatch_(dispatch), placed_(placements(dispatch)) {
    if (placed_.size() > kSlots) throw std::runtime_error("[emulator] too many buffers");
    place();
    bind_threadgroup_memory();
    bind_arguments();
  }

  void run() {
    Grid grid{dispatch_.grid, dispatch_.threads_per_threadgroup, first_threadgroup, end_threadgroup};
    std::vector<Order> sequence = orders();
    bool has_huge = std::any_of(placed_.begin(), placed_.end(), [](auto& p) { return p.is_huge; });
    if (has_huge) sequence = {Order::forward};
    for (Order order : sequence) {
      fill();
      if (order == sequence[0]) begin_count(dispatch_.kernel->name, counted_buffers());
      run_grid(*dispatch_.kernel, arguments_.data(), grid, order);
      end_count();
      if (runs_all()) check_all_written();
      if (sequence.size() > 1) compare(sequence[0], order);
    }
    copy_back();
  }

 private:
  // The lowest index of the buffers in each region; -1 where it is not to be counted.
  std::vector<int> counted_buffers() const {
    std::vector<int> result;
    for (auto& placed : placed_) {
      int lowest = kMaxBuffers;
      for (auto b : placed.bindings) {
        if (b->index >= 0) lowest = std::min(lowest, b->index);
      }
      result.push_back(placed.size <= kLineBytes || lowest == kMaxBuffers ? -1 : lowest);
    }
    return result;
  }

  void place() {
    checker.regions.resize(placed_.size());
    checker.huge_regions.clear();
    for (size_t i = 0; i < placed_.size(); ++i) {
      Placed& placed = placed_[i];
      Region& region = checker.regions[i];
      region.segments = segments_of(placed);
      region.size = placed.size;
      region.description = [&placed] { return describe(placed.bindings); };
      size_t element = placed.bindings[0]->element_size;
      for (auto b : placed.bindings) element = std::min(element, b->element_size);
      region.element_shift = unsigned(__builtin_ctzll(element));
      if (placed.is_huge) {
        region.begin = placed.original;
        if (is_output_alone(placed) && !is_aligned(placed)) region.begin = make_scratch(placed);
        region.cells.clear();
        checker.huge_regions.push_back(&region);
      } else {
        // As far from a page's start as on Metal, with half a slot before it.
        region.begin = arena_slot(i) + kSlotSize / 4 + placed.bindings[0]->offset % 4096;
      }
    }
  }

  void bind_threadgroup_memory() {
    auto& library = *dispatch_.library;
    auto& variables = checker.blocks[0];
    variables.begin = library.thread_local_anchor() - library.anchor_offset;
    variables.size = library.threadgroup_size;
    variables.variables = library.variables;
    checker.image_begin = library.image_begin;
    checker.image_end = library.image_end;

    auto& sized = checker.blocks[1];
    sized.variables.clear();
    size_t end = 0;
    constexpr size_t kGap = 64;
    for (auto& [index, bytes] : dispatch_.threadgroup_memory) {
      sized.variables.push_back({end, end + bytes, "argument " + std::to_string(index)});
      end = (end + bytes + kGap + 15) / 16 * 16;
    }
    threadgroup_memory_.resize(end / 16 + 1);
    sized.begin = reinterpret_cast<char*>(threadgroup_memory_.data());
    sized.size = end;
    // Cells of earlier dispatches need no clearing: their epochs have passed.
    for (auto& block : checker.blocks) {
      if (block.cells.size() < block.size) block.cells.resize(block.size);
    }
  }

  void bind_arguments() {
    const Kernel& kernel = *dispatch_.kernel;
    arguments_.assign(kernel.parameter_count, nullptr);
    auto buffers = parameter_indices(kernel, Role::buffer);
    auto threadgroups = parameter_indices(kernel, Role::threadgroup);
    for (int i = 0; i < kernel.parameter_count; ++i) {
      if (kernel.parameters[i].role == Role::buffer) arguments_[i] = address_of(buffers[i]);
      if (kernel.parameters[i].role != Role::threadgroup) continue;
      for (size_t k = 0; k < dispatch_.threadgroup_memory.size(); ++k) {
        if (dispatch_.threadgroup_memory[k].first != threadgroups[i]) continue;
        arguments_[i] = checker.blocks[1].begin + checker.blocks[1].variables[k].begin;
      }
    }
  }

  char* address_of(int index) const {
    for (size_t i = 0; i < placed_.size(); ++i) {
      for (auto b : placed_[i].bindings) {
        if (b->index != index) continue;
        return checker.regions[i].begin + (b->start() - placed_[i].original) + b->first;
      }
    }
    return nullptr;
  }

  template <typename Visit>
  void each_copied(Visit visit) {
    for (size_t i = 0; i < placed_.size(); ++i) {
      if (!placed_[i].is_huge) visit(i, placed_[i], checker.regions[i]);
    }
  }

  static bool is_written(const Region& region) {
    return std::any_of(region.segments.begin(), region.segments.end(), [](auto& s) { return s.output; });
  }

  template <typename Visit>
  static void each_segment(const Region& region, Visit visit) {
    size_t begin = 0;
    for (auto& segment : region.segments) {
      visit(segment, begin);
      begin = segment.end;
    }
  }

  void fill() {
    each_copied([&](size_t, Placed& placed, Region& region) {
      each_segment(region, [&](const Segment& segment, size_t begin) {
        if (segment.input) {
          std::memcpy(region.begin + begin, placed.original + begin, segment.end - begin);
        } else {
          std::memset(region.begin + begin, kPoison, segment.end - begin);
        }
      });
      size_t cells = is_written(region) ? ((region.size - 1) >> region.element_shift) + 1 : 0;
      region.cells.assign(region.size ? cells : 0, DeviceCell());
    });
  }

  void check_all_written() {
    each_copied([&](size_t, Placed&, Region& region) {
      each_segment(region, [&](const Segment& segment, size_t begin) {
        if (segment.input || !segment.output) return;
        for (size_t at = begin; at < segment.end; at += size_t{1} << region.element_shift) {
          if (region.cells[at >> region.element_shift].writer == 0) {
            throw std::runtime_error(prefix() + "no thread writes byte " + std::to_string(at) + " of " +
                                     region.description() + ", which ends at " + std::to_string(region.size));
          }
        }
      });
    });
  }

  void compare(Order first, Order order) {
    first_results_.resize(placed_.size());
    each_copied([&](size_t i, Placed&, Region& region) {
      if (!is_written(region)) return;
      if (order == first) {
        first_results_[i].assign(region.begin, region.begin + region.size);
      } else if (std::memcmp(first_results_[i].data(), region.begin, region.size) != 0) {
        size_t at = 0;
        while (first_results_[i][at] == region.begin[at]) ++at;
        throw std::runtime_error(prefix() + "byte " + std::to_string(at) + " of " + region.description() +
                                 " depends on the order of execution: " + name_of(first) + " and " + name_of(order) +
                                 " differ");
      }
    });
  }

  // MLX's CPU allocator aligns to 8 bytes, Metal's to pages. Only pages that are touched exist, and are brought back.
  static constexpr size_t kPage = 4096;
  static bool is_output_alone(const Placed& placed) {
    return std::none_of(placed.bindings.begin(), placed.bindings.end(), [](auto b) { return b->input; });
  }
  static bool is_aligned(const Placed& placed) {
    auto binding = placed.bindings[0];
    return (reinterpret_cast<uintptr_t>(placed.original) - binding->offset) % kLargestVector == 0;
  }
  static size_t scratch_size(const Placed& placed) { return placed.size + kPage; }

  char* make_scratch(Placed& placed) {
    void* range =
        mmap(nullptr, scratch_size(placed), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (range == MAP_FAILED) throw std::runtime_error("[emulator] cannot reserve address space");
    placed.scratch = static_cast<char*>(range);
    return placed.scratch + placed.bindings[0]->offset % kPage;
  }

  void bring_back_scratch(Placed& placed, const Region& region) {
    std::vector<unsigned char> resident(scratch_size(placed) / kPage + 1);
    mincore(placed.scratch, scratch_size(placed), resident.data());
    for (char* page = placed.scratch; page < region.begin + placed.size; page += kPage) {
      if (!(resident[(page - placed.scratch) / kPage] & 1)) continue;
      char* begin = std::max(page, region.begin);
      char* end = std::min(page + kPage, region.begin + placed.size);
      std::memcpy(placed.original + (begin - region.begin), begin, end - begin);
    }
  }

  void copy_back() {
    for (size_t i = 0; i < placed_.size(); ++i) {
      if (placed_[i].scratch) bring_back_scratch(placed_[i], checker.regions[i]);
    }
    each_copied([&](size_t i, Placed& placed, Region& region) {
      each_segment(region, [&](const Segment& segment, size_t begin) {
        if (!segment.output) return;
        std::memcpy(placed.original + begin, region.begin + begin, segment.end - begin);
      });
      // Large copies are given back to the system, small ones kept for the next dispatch.
      constexpr size_t kKept = 4 << 20;
      if (region.size > kKept) {
        madvise(arena_slot(i), kSlotSize, MADV_DONTNEED);
        std::vector<DeviceCell>().swap(region.cells);
      }
    });
  }

  std::string prefix() const { return std::string("[emulator] ") + dispatch_.kernel->name + ": "; }

  const Dispatch& dispatch_;
  std::vector<Placed> placed_;
  std::vector<void*> arguments_;
  std::vector<std::vector<char>> first_results_;
  struct alignas(16) Block {
    char bytes[16];
  };
  std::vector<Block> threadgroup_memory_;
};

}  // namespace

void validate(const Dispatch& dispatch) {
  const Kernel& kernel = *dispatch.kernel;
  auto reject = [&](const std::string& what) {
    throw std::invalid_argument(std::string("[emulator] ") + kernel.name + ": " + what);
  };
  auto number = [](size_t n) { return std::to_string(n); };
  auto& group = dispatch.threads_per_threadgroup;
  if (group.count() == 0 || dispatch.grid.count() == 0) reject("the grid or threadgroup is empty");
  if (group.count() > most_threads) {
    reject(number(group.count()) + " threads in a threadgroup; at most " + number(most_threads) + " fit");
  }
  for (uint64_t length : {dispatch.grid.x, dispatch.grid.y, dispatch.grid.z}) {
    if (length > UINT32_MAX) reject("a grid " + number(length) + " threads wide; at most 2^32 - 1 fit");
  }
  std::vector<bool> is_bound(kMaxBuffers);
  for (auto& binding : dispatch.bindings) {
    if (binding.index < 0) continue;
    if (binding.index >= kMaxBuffers) {
      reject("buffer index " + number(binding.index) + "; the highest is 30");
    }
    if (is_bound[binding.index]) reject("buffer " + number(binding.index) + " is bound twice");
    is_bound[binding.index] = true;
  }
  auto indices = parameter_indices(kernel, Role::buffer);
  for (int i = 0; i < kernel.parameter_count; ++i) {
    auto& parameter = kernel.parameters[i];
    if (parameter.role != Role::buffer) continue;
    if (indices[i] >= kMaxBuffers) {
      reject("a parameter at buffer index " + number(indices[i]) + "; the highest is 30");
    }
    if (!is_bound[indices[i]]) reject("nothing is bound to buffer " + number(indices[i]));
    for (auto& binding : dispatch.bindings) {
      if (binding.index == indices[i] && binding.length() < parameter.pointee_size) {
        reject("buffer " + number(indices[i]) + " holds " + number(binding.length()) + " bytes, the kernel expects " +
               number(parameter.pointee_size));
      }
    }
  }
  indices = parameter_indices(kernel, Role::threadgroup);
  size_t threadgroup_bytes = 0;
  for (auto& [index, bytes] : dispatch.threadgroup_memory) threadgroup_bytes += bytes;
  if (threadgroup_bytes > kMaxThreadgroupMemory) {
    reject(number(threadgroup_bytes) + " bytes of threadgroup memory; at most 32768 fit");
  }
  for (int i = 0; i < kernel.parameter_count; ++i) {
    if (kernel.parameters[i].role != Role::threadgroup) continue;
    auto sized = std::find_if(dispatch.threadgroup_memory.begin(), dispatch.threadgroup_memory.end(),
                              [&](auto& m) { return m.first == indices[i]; });
    if (sized == dispatch.threadgroup_memory.end()) {
      reject("threadgroup memory " + number(indices[i]) + " has no length");
    }
  }
}

void set_largest_threadgroup(size_t threads) { most_threads = threads; }

size_t largest_threadgroup() { return most_threads; }

std::unique_lock<std::mutex> exclusive() { return std::unique_lock(mutex); }

void run(const Dispatch& dispatch) {
  for (auto& binding : dispatch.bindings) {
    if (binding.memory && binding.memory->expired()) {
      throw std::runtime_error(std::string("[emulator] ") + dispatch.kernel->name + ": the memory of buffer " +
                               std::to_string(binding.index) + " was let go before the dispatch ran");
    }
  }
  auto lock = exclusive();
  Run(dispatch).run();
  ++totals.dispatches;
  ++totals.by_kernel[dispatch.kernel->name];
}

void run_only_threadgroups(uint64_t first, uint64_t end) {
  auto lock = exclusive();
  first_threadgroup = first;
  end_threadgroup = end;
}

void run_all_threadgroups() { run_only_threadgroups(0, UINT64_MAX); }

Statistics statistics() {
  auto lock = exclusive();
  return totals;
}

}  // namespace emulator
