// Runs csrc/cpu/threads.cpp by itself, for test_parallel_for.py: a body that throws must neither end the others nor
// outlive the call, whichever thread it throws in; and later calls have helpers too, whether those of before still look
// out for work or sleep.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "cpu/threads.h"

int main() {
  fused_adam::set_num_threads(4);
  for (int round = 0; round < 2000; ++round) {
    constexpr size_t kCount = 64;
    auto calls = std::make_unique<std::vector<std::atomic<int>>>(kCount);
    bool is_thrown = false;
    try {
      fused_adam::parallel_for(kCount, [&](size_t i) {
        ++(*calls)[i];
        if (i % 16 == size_t(round) % 16) throw std::runtime_error("planted");
      });
    } catch (const std::runtime_error& error) {
      is_thrown = std::string(error.what()) == "planted";
    }
    for (size_t i = 0; i < kCount; ++i) {
      if ((*calls)[i] != 1) return std::printf("round %d: body %zu ran %d times\n", round, i, (*calls)[i].load());
    }
    if (!is_thrown) return std::printf("round %d: nothing was thrown\n", round);
  }
  for (int round = 0; round < 40; ++round) {
    std::mutex mutex;
    std::set<std::thread::id> threads;
    fused_adam::parallel_for(16, [&](size_t) {
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
      std::lock_guard lock(mutex);
      threads.insert(std::this_thread::get_id());
    });
    if (threads.size() < 2) return std::printf("round %d: one thread did everything\n", round);
    if (round % 2) std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
  std::puts("right");
  std::fflush(stdout);
  std::_Exit(0);  // the pool is leaked on purpose; do not wait for its threads
}
