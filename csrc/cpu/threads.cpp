// See threads.h. Workers claim indices from a shared counter, so a busy pool only means that the caller does more
// itself.
#include "cpu/threads.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <exception>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <system_error>
#include <thread>
#include <utility>

#include "mlx/threadpool.h"

namespace fused_adam {

namespace {

std::atomic<size_t>& thread_count() {
  static std::atomic<size_t> count{1};
  return count;
}

// MLX's pool, and how many of its threads could be started. Leaked on purpose: MLX's stream threads may outlive static
// destructors.
class Workers {
 public:
  static Workers& all() {
    static Workers* workers = new Workers;
    return *workers;
  }

  // Grows to `wanted` threads, or as far as the system lets it; returns how many of those wanted there are.
  size_t grow(size_t wanted) {
    std::lock_guard lock(mutex_);
    try {
      for (; started_ < wanted; ++started_) pool_.resize(started_ + 1);
    } catch (const std::system_error&) {
      // A limit on processes or memory. The threads there are do the work, and the next call tries again.
    }
    return std::min(wanted, started_);
  }

  template <typename Task>
  void enqueue(Task&& task) {
    pool_.enqueue(std::forward<Task>(task));
  }

 private:
  std::mutex mutex_;
  ThreadPool pool_{0};
  size_t started_ = 0;
};

// Shared by the caller and its helpers; a helper that starts late finds nothing left to claim.
struct Work {
  const std::function<void(size_t)>* body;
  size_t count;
  std::atomic<size_t> next{0};
  std::atomic<size_t> done{0};
  std::mutex error_mutex;
  std::exception_ptr error;

  // Lets nothing escape: the caller must not return, and so end the body's life, before every index is done.
  void run() noexcept {
    for (size_t i; (i = next.fetch_add(1)) < count;) {
      try {
        (*body)(i);
      } catch (...) {
        std::lock_guard lock(error_mutex);
        if (!error) error = std::current_exception();
      }
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
    wanted = Workers::all().grow(wanted);
    size_t present;
    {
      std::lock_guard lock(mutex_);
      current_ = work;
      ++offers_;
      present = std::min(wanted, lingering_);
    }
    for (size_t i = present; i < wanted; ++i) {
      Workers::all().enqueue([this, work] { help(work); });
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
    throw std::invalid_argument("[set_num_threads] count must be from 1 to " + std::to_string(kMostThreads) +
                                " but got " + std::to_string(count));
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
  try {
    helpers().offer(work, wanted);
  } catch (const std::bad_alloc&) {
    // Fewer helpers then; those that were asked are waited for as ever.
  }
  work->run();
  for (size_t done; (done = work->done) < count;) work->done.wait(done);
  if (work->error) std::rethrow_exception(work->error);
}

}  // namespace fused_adam
