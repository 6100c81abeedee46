// See grid.h. The threads of a threadgroup are fibers of one operating system thread: one fiber runs thread after
// thread and only where a thread must wait does the next fiber take over, so kernels without barriers never switch.
#include "grid.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>

#include "checker.h"
#include "fibers.h"
#include "relaxations.h"

namespace emulator {

const char* name_of(Order order) {
  const char* names[] = {"forward", "reverse", "shuffled"};
  return names[int(order)];
}

namespace {

enum class Wait { none, threadgroup_barrier, simdgroup_barrier, simdgroup_function };

struct ThreadState {
  Fiber* fiber = nullptr;
  Wait wait = Wait::none;
  int line = 0;
  int mem_flags = 0;
  bool is_done = false;
  const void* value = nullptr;  // given to the other lanes of the simdgroup
};

std::string position(Position p) {
  std::ostringstream text;
  text << "(" << p.x << ", " << p.y << ", " << p.z << ")";
  return text.str();
}

Position unravel(uint64_t index, Size size) {
  return {uint32_t(index % size.x), uint32_t(index / size.x % size.y), uint32_t(index / size.x / size.y)};
}

// While it lives, and if asked to, float32 subnormals count as zero on this thread of the operating system.
class FlushedSubnormals {
 public:
  explicit FlushedSubnormals(bool asked) : before_(control()) {
    if (asked) set_control(before_ | kFlush);
  }
  ~FlushedSubnormals() { set_control(before_); }

 private:
#if defined(__x86_64__)
  static constexpr uint64_t kFlush = 0x8040;  // flush to zero, denormals are zero
  static uint64_t control() { return __builtin_ia32_stmxcsr(); }
  static void set_control(uint64_t value) { __builtin_ia32_ldmxcsr(uint32_t(value)); }
#elif defined(__aarch64__)
  static constexpr uint64_t kFlush = 1 << 24;  // FZ
  static uint64_t control() {
    uint64_t value;
    asm volatile("mrs %0, fpcr" : "=r"(value));
    return value;
  }
  static void set_control(uint64_t value) { asm volatile("msr fpcr, %0" : : "r"(value)); }
#else
#error "the emulator must know how this processor flushes subnormals"
#endif
  uint64_t before_;
};

class Runner {
 public:
  void run(const Kernel& kernel, void* const* arguments, const Grid& grid, Order order);

  void threadgroup_barrier(int mem_flags, int line);
  void simdgroup_barrier(int mem_flags, int line);
  uint32_t simd_exchange(const void* value, size_t size, void* lanes, int line);
  uint32_t lane() const { return current_ % kSimdWidth; }
  [[noreturn]] void fail(const std::string& what);

 private:
  void run_threadgroup(uint64_t index);
  void start_thread(uint32_t thread);
  void make_current(uint32_t thread);
  void wait(Wait kind, int line, int mem_flags);
  void release_waiting();
  bool release_simdgroups();
  void resume(uint32_t thread);
  void diverged(uint32_t thread, const std::string& what);
  std::string name_of_thread(uint32_t thread) const;

  FiberPool fibers_;
  const Kernel* kernel_ = nullptr;
  void* const* arguments_ = nullptr;
  Grid grid_;
  Size groups_;
  Thread thread_ = {};              // what all threads of the threadgroup share, and the current one's place
  Size threads_here_;               // of this threadgroup
  std::vector<uint32_t> sequence_;  // the threads of a threadgroup in the order they run
  Order order_ = Order::forward;
  std::mt19937 random_;
  uint32_t next_ = 0;  // in sequence_: the next thread to start
  uint32_t current_ = 0;
  uint32_t first_thread_ = 0;  // number in the dispatch of the threadgroup's first thread
  std::vector<ThreadState> states_;
  std::string error_;
};

template <typename T>
void arrange(std::vector<T>& sequence, Order order, std::mt19937& random) {
  std::iota(sequence.begin(), sequence.end(), T(0));
  if (order == Order::reverse) std::reverse(sequence.begin(), sequence.end());
  if (order == Order::shuffled) std::shuffle(sequence.begin(), sequence.end(), random);
}

void Runner::run(const Kernel& kernel, void* const* arguments, const Grid& grid, Order order) {
  kernel_ = &kernel;
  arguments_ = arguments;
  grid_ = grid;
  order_ = order;
  random_.seed(20150507);
  sequence_.clear();
  auto& group = grid.threads_per_threadgroup;
  groups_ = {(grid.threads.x + group.x - 1) / group.x, (grid.threads.y + group.y - 1) / group.y,
             (grid.threads.z + group.z - 1) / group.z};
  auto narrow = [](Size s) { return Position{uint32_t(s.x), uint32_t(s.y), uint32_t(s.z)}; };
  thread_.threads_per_grid = narrow(grid.threads);
  thread_.threadgroups_per_grid = narrow(groups_);
  thread_.dispatch_threads_per_threadgroup = narrow(group);
  thread_.threads_per_simdgroup = kSimdWidth;

  checker.stacks = fibers_.stacks();
  checker.stacks_size = fibers_.stacks_size();
  fibers_.body = [this](Fiber& fiber) {
    while (next_ < sequence_.size()) {
      uint32_t thread = sequence_[next_++];
      states_[thread].fiber = &fiber;
      start_thread(thread);
      // The thread may have waited, and others run, before it came back here.
      states_[thread].is_done = true;
    }
  };
  error_.clear();
  uint64_t first = std::min(grid.first_threadgroup, groups_.count());
  uint64_t end = std::min(grid.end_threadgroup, groups_.count());
  std::vector<uint64_t> sequence(end - first);
  arrange(sequence, order, random_);
  checker.running = true;
  {
    FlushedSubnormals flushed(is_relaxed("subnormals"));
    for (uint64_t i : sequence) {
      run_threadgroup(first + i);
      if (!error_.empty()) break;
    }
  }
  checker.running = false;
  if (!error_.empty()) {
    fibers_.reset();  // some still wait
    throw std::runtime_error(error_);
  }
}

void Runner::run_threadgroup(uint64_t index) {
  auto& group = grid_.threads_per_threadgroup;
  Position at = unravel(index, groups_);
  thread_.threadgroup_position_in_grid = at;
  threads_here_ = {std::min(group.x, grid_.threads.x - at.x * group.x),
                   std::min(group.y, grid_.threads.y - at.y * group.y),
                   std::min(group.z, grid_.threads.z - at.z * group.z)};
  uint32_t count = uint32_t(threads_here_.count());
  thread_.threads_per_threadgroup = {uint32_t(threads_here_.x), uint32_t(threads_here_.y), uint32_t(threads_here_.z)};
  thread_.simdgroups_per_threadgroup = (count + kSimdWidth - 1) / kSimdWidth;
  if (sequence_.size() != count || order_ == Order::shuffled) {
    sequence_.resize(count);
    arrange(sequence_, order_, random_);
  }
  states_.assign(count, ThreadState());
  first_thread_ = uint32_t(index * group.count());
  checker.first_epoch = ++checker.epoch;
  std::fill(std::begin(checker.simd_epochs), std::end(checker.simd_epochs), 0);
  // Not zero, which a kernel might happen to need; the checker rejects to read it in any case.
  for (auto& block : checker.blocks) std::memset(block.begin, 0xff, block.size);

  next_ = 0;
  while (next_ < count && error_.empty()) fibers_.resume(fibers_.idle());
  auto is_done = [](const ThreadState& s) { return s.is_done; };
  while (error_.empty() && !std::all_of(states_.begin(), states_.end(), is_done)) release_waiting();
}

void Runner::start_thread(uint32_t thread) {
  auto& group = thread_.threadgroup_position_in_grid;
  auto& full = thread_.dispatch_threads_per_threadgroup;
  Thread mine = thread_;
  Position p = unravel(thread, threads_here_);
  mine.thread_position_in_threadgroup = p;
  mine.thread_position_in_grid = {group.x * full.x + p.x, group.y * full.y + p.y, group.z * full.z + p.z};
  mine.thread_index_in_threadgroup = thread;
  mine.thread_index_in_simdgroup = thread % kSimdWidth;
  mine.simdgroup_index_in_threadgroup = thread / kSimdWidth;
  make_current(thread);
  kernel_->run(mine, arguments_);
}

void Runner::make_current(uint32_t thread) {
  current_ = thread;
  checker.thread_in_threadgroup = thread;
  checker.thread_in_dispatch = first_thread_ + thread;
}

void Runner::resume(uint32_t thread) {
  states_[thread].wait = Wait::none;
  make_current(thread);
  fibers_.resume(*states_[thread].fiber);
}

void Runner::wait(Wait kind, int line, int mem_flags) {
  ThreadState& state = states_[current_];
  state.wait = kind;
  state.line = line;
  state.mem_flags = mem_flags;
  fibers_.wait(*state.fiber);
}

// Every unfinished thread waits. Lets the simdgroups go on whose lanes have met, or else the whole threadgroup.
void Runner::release_waiting() {
  if (release_simdgroups() || !error_.empty()) return;
  uint32_t first = sequence_[0];
  for (uint32_t thread : sequence_) {
    if (states_[thread].is_done != states_[first].is_done) {
      uint32_t waiting = states_[thread].is_done ? first : thread;
      return diverged(waiting, "waits at the threadgroup barrier in line " + std::to_string(states_[waiting].line) +
                                   ", which other threads never reach: they have returned");
    }
    if (states_[thread].line != states_[first].line) {
      return diverged(thread, "waits at the threadgroup barrier in line " + std::to_string(states_[thread].line) +
                                  ", other threads at that in line " + std::to_string(states_[first].line));
    }
  }
  // A barrier that names no threadgroup memory orders no accesses to it.
  if (states_[first].mem_flags & mem_threadgroup) ++checker.epoch;
  for (uint32_t thread : sequence_) {
    if (error_.empty()) resume(thread);
  }
}

bool Runner::release_simdgroups() {
  bool any = false;
  uint32_t count = uint32_t(states_.size());
  for (uint32_t begin = 0; begin < count; begin += kSimdWidth) {
    uint32_t end = std::min(count, begin + kSimdWidth);
    const ThreadState* waiting = nullptr;
    for (uint32_t t = begin; t < end; ++t) {
      if (!states_[t].is_done && states_[t].wait != Wait::threadgroup_barrier) waiting = &states_[t];
    }
    if (!waiting) continue;
    any = true;
    Wait kind = waiting->wait;
    int line = waiting->line;
    for (uint32_t t = begin; t < end; ++t) {
      // Lanes that have returned are inactive; the others must all be here.
      if (!states_[t].is_done && (states_[t].wait != kind || states_[t].line != line)) {
        diverged(t, "waits in line " + std::to_string(states_[t].line) + ", other threads of its simdgroup in line " +
                        std::to_string(line));
        return false;
      }
    }
    if (kind == Wait::simdgroup_barrier && waiting->mem_flags & mem_threadgroup) {
      ++checker.simd_epochs[begin / kSimdWidth];
    }
    for (uint32_t thread : sequence_) {
      if (thread >= begin && thread < end && !states_[thread].is_done && error_.empty()) resume(thread);
    }
  }
  return any;
}

void Runner::threadgroup_barrier(int mem_flags, int line) { wait(Wait::threadgroup_barrier, line, mem_flags); }

void Runner::simdgroup_barrier(int mem_flags, int line) { wait(Wait::simdgroup_barrier, line, mem_flags); }

uint32_t Runner::simd_exchange(const void* value, size_t size, void* lanes, int line) {
  uint32_t begin = current_ - lane();
  uint32_t self = current_;
  states_[self].value = value;
  wait(Wait::simdgroup_function, line, 0);
  uint32_t mask = 0;
  // The other lanes' values lie on their stacks, still as they were: none returns from here before all have read.
  for (uint32_t t = begin; t < std::min<size_t>(begin + kSimdWidth, states_.size()); ++t) {
    if (!states_[t].value) continue;
    mask |= 1u << (t - begin);
    std::memcpy(static_cast<char*>(lanes) + (t - begin) * size, states_[t].value, size);
  }
  wait(Wait::simdgroup_function, line, 0);
  states_[self].value = nullptr;
  return mask;
}

std::string Runner::name_of_thread(uint32_t thread) const {
  return std::string("[emulator] ") + kernel_->name + ": thread " + position(unravel(thread, threads_here_)) +
         " of threadgroup " + position(thread_.threadgroup_position_in_grid) + " ";
}

void Runner::diverged(uint32_t thread, const std::string& what) { error_ = name_of_thread(thread) + what; }

void Runner::fail(const std::string& what) {
  error_ = name_of_thread(current_) + what;
  fibers_.abandon();
}

Runner& runner() {
  static Runner runner;
  return runner;
}

}  // namespace

void run_grid(const Kernel& kernel, void* const* arguments, const Grid& grid, Order order) {
  runner().run(kernel, arguments, grid, order);
}

void fail(const std::string& what) { runner().fail(what); }

}  // namespace emulator

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void emulator_threadgroup_barrier(int mem_flags, int line) {
  emulator::runner().threadgroup_barrier(mem_flags, line);
}
EXPORT void emulator_simdgroup_barrier(int mem_flags, int line) {
  emulator::runner().simdgroup_barrier(mem_flags, line);
}
EXPORT uint32_t emulator_simd_exchange(const void* value, size_t size, void* lanes, int line) {
  return emulator::runner().simd_exchange(value, size, lanes, line);
}
EXPORT uint32_t emulator_simd_lane() { return emulator::runner().lane(); }
