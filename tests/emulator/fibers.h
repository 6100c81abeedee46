// Coroutines with stacks of their own, so that a kernel's threads can wait for each other at barriers.
// makecontext starts a fiber; _setjmp and _longjmp switch, since swapcontext would make a system call each time.
#pragma once

#include <setjmp.h>

#include <cstddef>
#include <functional>
#include <memory>
#include <vector>

namespace emulator {

class Fiber {
  friend class FiberPool;
  jmp_buf place;
  char* stack = nullptr;
  bool is_started = false;
};

// Belongs to one operating system thread at a time.
class FiberPool {
 public:
  static constexpr size_t kStackSize = 64 << 10;
  static constexpr size_t kMaxFibers = 1024;

  FiberPool();

  // What a fiber does each time it is taken from the idle ones; when it returns the fiber is idle again.
  std::function<void(Fiber&)> body;

  Fiber& idle();                // an idle fiber
  void resume(Fiber& fiber);    // runs it until it waits or its body returns
  void wait(Fiber& fiber);      // from within: gives way until resumed
  [[noreturn]] void abandon();  // from within: gives way for ever
  void reset();                 // forgets whatever the fibers were doing

  char* stacks() const { return stacks_; }
  size_t stacks_size() const { return kMaxFibers * kStackSize; }

 private:
  static void enter();

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
  Fiber* current_ = nullptr;
  jmp_buf caller_;
  char* stacks_ = nullptr;
};

}  // namespace emulator
