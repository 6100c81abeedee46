// See streams.h.
#include "op/streams.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <vector>

namespace fused_adam {

namespace mx = mlx::core;

namespace {

// Leaked on purpose: MLX's stream threads may outlive static destructors.
struct IdleStreams {
  std::mutex mutex;
  std::vector<int> indices;

  static IdleStreams& all() {
    static IdleStreams* streams = new IdleStreams;
    return *streams;
  }
};

std::atomic<uint64_t> updated_on_cpu{0}, updated_on_gpu{0};

}  // namespace

void note_idle_stream(mx::Stream stream) {
  auto& idle = IdleStreams::all();
  std::lock_guard lock(idle.mutex);
  idle.indices.push_back(stream.index);
}

bool is_only_stream() {
  auto& idle = IdleStreams::all();
  std::lock_guard lock(idle.mutex);
  return mx::get_streams().size() <= 1 + idle.indices.size();
}

void count_updates(mx::Stream stream, size_t tensors) {
  auto& idle = IdleStreams::all();
  {
    std::lock_guard lock(idle.mutex);
    if (std::count(idle.indices.begin(), idle.indices.end(), stream.index)) return;
  }
  (stream.device == mx::Device::gpu ? updated_on_gpu : updated_on_cpu) += tensors;
}

std::pair<uint64_t, uint64_t> updated_tensors() { return {updated_on_cpu, updated_on_gpu}; }

}  // namespace fused_adam
