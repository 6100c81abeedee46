// Stands between MLX and its scheduler (LD_PRELOAD), for test_failing_tasks.py: one call of Scheduler::enqueue throws,
// as it does in the main thread once a task has failed.
#include <dlfcn.h>

#include <atomic>
#include <functional>
#include <stdexcept>

#include "mlx/scheduler.h"

namespace mlx::core::scheduler {

static std::atomic<int> left{0};
static Scheduler* known = nullptr;

extern "C" void fail_at(int call) { left = call; }

// Ends what MLX counts as active though nothing is queued: an error may leave its count too high, and then it hangs.
extern "C" void settle() {
  while (known->n_active_tasks() > 0) known->notify_task_completion(Stream(0, Device::cpu));
}

void Scheduler::enqueue(Stream stream, std::function<void()> task) {
  using Enqueue = void (*)(Scheduler*, Stream, std::function<void()>);
  static auto libmlx = dlopen("libmlx.so", RTLD_NOLOAD | RTLD_LAZY);
  static auto enqueue = reinterpret_cast<Enqueue>(
      dlsym(libmlx, "_ZN3mlx4core9scheduler9Scheduler7enqueueENS0_6StreamESt8functionIFvvEE"));
  known = this;
  if (left > 0 && --left == 0) throw std::runtime_error("planted");
  enqueue(this, stream, std::move(task));
}

}  // namespace mlx::core::scheduler
