// See fibers.h.
#undef _FORTIFY_SOURCE  // its longjmp rejects to leave one stack for another
#include "fibers.h"

#include <sys/mman.h>
#include <ucontext.h>

#include <stdexcept>

namespace emulator {

namespace {
FiberPool* starting_pool = nullptr;  // makecontext passes no pointers
}

FiberPool::FiberPool() {
  void* range =
      mmap(nullptr, stacks_size(), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (range == MAP_FAILED) throw std::runtime_error("[emulator] cannot reserve fiber stacks");
  stacks_ = static_cast<char*>(range);
}

void FiberPool::enter() {
  FiberPool& pool = *starting_pool;
  Fiber& self = *pool.current_;
  for (;;) {
    pool.body(self);
    pool.idle_.push_back(&self);
    pool.wait(self);
  }
}

Fiber& FiberPool::idle() {
  if (idle_.empty()) {
    if (fibers_.size() == kMaxFibers) throw std::logic_error("[emulator] too many fibers");
    auto fiber = std::make_unique<Fiber>();
    fiber->stack = stacks_ + fibers_.size() * kStackSize;
    fibers_.push_back(std::move(fiber));
    return *fibers_.back();
  }
  Fiber& fiber = *idle_.back();
  idle_.pop_back();
  return fiber;
}

void FiberPool::resume(Fiber& fiber) {
  current_ = &fiber;
  if (_setjmp(caller_) != 0) return;
  if (fiber.is_started) _longjmp(fiber.place, 1);
  fiber.is_started = true;
  starting_pool = this;
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack;
  context.uc_stack.ss_size = kStackSize;
  context.uc_link = nullptr;
  makecontext(&context, &FiberPool::enter, 0);
  setcontext(&context);
}

void FiberPool::wait(Fiber& fiber) {
  if (_setjmp(fiber.place) == 0) _longjmp(caller_, 1);
}

void FiberPool::abandon() { _longjmp(caller_, 1); }

void FiberPool::reset() {
  idle_.clear();
  for (auto& fiber : fibers_) {
    fiber->is_started = false;
    idle_.push_back(fiber.get());
  }
}

}  // namespace emulator
