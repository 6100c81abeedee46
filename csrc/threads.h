// Shares the work of one update among threads: MLX's own thread pool, plus the calling thread.
#pragma once

#include <cstddef>
#include <functional>

namespace fused_adam {

// Threads an update may use, the caller included. Defaults to MLX_FUSED_ADAM_NUM_THREADS, else to the CPUs of the process.
size_t num_threads();
void set_num_threads(size_t count);

// Runs body(0) ... body(count - 1), each exactly once, and returns when all are done. Callable from several threads.
void parallel_for(size_t count, const std::function<void(size_t)>& body);

}  // namespace fused_adam
