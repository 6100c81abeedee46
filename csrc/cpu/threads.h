// Shares the work of one update among threads: MLX's own thread pool, plus the calling thread.
#pragma once

#include <cstddef>
#include <functional>

namespace fused_adam {

constexpr size_t kMostThreads = 256;

// Threads an update may use, the caller included; 1 until the package's import has set it.
size_t num_threads();
void set_num_threads(size_t count);

// Runs body(0) ... body(count - 1), each exactly once, and returns when all are done, by as many threads as can be had.
// If a body throws, the others run all the same, and then the first exception is thrown again. Callable from several
// threads.
void parallel_for(size_t count, const std::function<void(size_t)>& body);

}  // namespace fused_adam
