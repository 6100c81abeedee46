// Facts about MLX's streams: which of them carry the user's work, and how many tensors were updated there.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "mlx/stream.h"

namespace fused_adam {

// Tells of a stream where nothing but self-checks runs, which wait for their own results.
void note_idle_stream(mlx::core::Stream stream);

// Whether the process has a single stream in use; idle ones do not count.
bool is_only_stream();

// Adds to the count of tensors that a kernel updated on this stream's kind of device, unless the stream is idle. Called
// when a node is evaluated, so it counts what is run, not what is built or traced.
void count_updates(mlx::core::Stream stream, size_t tensors);

// That count since the process began: of the CPU and of the GPU.
std::pair<uint64_t, uint64_t> updated_tensors();

}  // namespace fused_adam
