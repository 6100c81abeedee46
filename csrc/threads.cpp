// See threads.h. Workers claim indices from a shared counter, so a busy pool only means that the caller does more itself.
#include "threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>

#include "mlx/threadpool.h"

namespace fused_adam {

namespace {

constexpr size_t kMostThreads = 256;

size_t default_num_threads() {
  const char* setting = std::getenv("MLX_FUSED_ADAM_NUM_THREADS");
  if (setting && *setting) {
    char* end = nullptr;
    unsigned long count = std::strtoul(setting, &end, 10);
    if (end == setting || *end != '\0' || count < 1 || count > kMostThreads) {
      throw std::invalid_argument("[num_threads] MLX_FUSED_ADAM_NUM_THREADS must be from 1 to " +
                                  std::to_string(kMostThreads) + " but got " + setting);
    }
    return count;
  }
  return std::max(1u, std::thread::hardware_concurrency());
}

std::atomic<size_t>& thread_count() {
  static std::atomic<size_t> count{default_num_threads()};
  return count;
}

// Grows to the largest count ever asked for. Leaked on purpose: MLX's stream threads may outlive static destructors.
ThreadPool& pool(size_t workers) {
  static std::mutex mutex;
  static ThreadPool* threads = new ThreadPool(0);
  static size_t size = 0;
  std::lock_guard lock(mutex);
  if (workers > size) threads->resize(size = workers);
  return *threads;
}

// Shared by the caller and its helpers; a helper that starts late finds nothing left to claim.
struct Work {
  const std::function<void(size_t)>* body;
  size_t count;
  std::atomic<size_t> next{0};
  std::atomic<size_t> done{0};

  void run() {
    for (size_t i; (i = next.fetch_add(1)) < count;) {
      (*body)(i);
      if (done.fetch_add(1) + 1 == count) done.notify_all();
    }
  }
};

// Waking a sleeping thread takes longer than updating a tensor of average size, so a helper that is done looks out for
// the next one for as long as one usually takes to come.
constexpr auto kLinger = std::chrono::microseconds(100);

class Helpers {
 public:
  void offer(const std::shared_ptr<Work>& work, size_t wanted) {
    size_t present;
    {
      std::lock_guard lock(mutex_);
      current_ = work;
      ++offers_;
      present = std::min(wanted, lingering_);
    }
    if (present == wanted) return;
    auto& threads = pool(wanted);
    for (size_t i = present; i < wanted; ++i) {
      threads.enqueue([this, work] { help(work); });
    }
  }

 private:
  void help(std::shared_ptr<Work> work) {
    uint64_t seen = offers_;
    while (work) {
      work->run();
      work = next_after(seen);
    }
  }

  // Null if none comes in time.
  std::shared_ptr<Work> next_after(uint64_t& seen) {
    {
      std::lock_guard lock(mutex_);
      ++lingering_;
    }
    auto end = std::chrono::steady_clock::now() + kLinger;
    while (offers_ == seen && std::chrono::steady_clock::now() < end) std::this_thread::yield();
    std::lock_guard lock(mutex_);
    --lingering_;
    if (offers_ == seen) return nullptr;
    seen = offers_;
    return current_;
  }

  std::mutex mutex_;
  std::shared_ptr<Work> current_;
  std::atomic<uint64_t> offers_{0};
  size_t lingering_ = 0;
};

// Leaked like the pool.
Helpers& helpers() {
  static Helpers* all = new Helpers;
  return *all;
}

}  // namespace

size_t num_threads() { return thread_count(); }

void set_num_threads(size_t count) {
  if (count < 1 || count > kMostThreads) {
    throw std::invalid_argument("[set_num_threads] count must be from 1 to " +
                                std::to_string(kMostThreads) + " but got " + std::to_string(count));
  }
  thread_count() = count;
}

void parallel_for(size_t count, const std::function<void(size_t)>& body) {
  size_t wanted = std::min(num_threads(), count) - (count > 0);
  if (wanted == 0) {
    for (size_t i = 0; i < count; ++i) body(i);
    return;
  }
  auto work = std::make_shared<Work>();
  work->body = &body;
  work->count = count;
  helpers().offer(work, wanted);
  work->run();
  for (size_t done; (done = work->done) < count;) work->done.wait(done);
}

}  // namespace fused_adam
