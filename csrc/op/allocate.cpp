// See allocate.h.
#include "op/allocate.h"

#include <stdexcept>
#include <string>
#include <utility>

namespace fused_adam {

namespace mx = mlx::core;

// MLX's allocator gives a buffer, or since mlx 0.32.4 the owner of one.
static bool is_empty(auto& memory) {
  if constexpr (requires { memory.buffer(); }) {
    return !memory.buffer().ptr();
  } else {
    return !memory.ptr();
  }
}

void allocate(mx::array& output) {
  auto memory = mx::allocator::malloc(output.nbytes());
  if (output.nbytes() > 0 && is_empty(memory)) {
    throw std::runtime_error("[adam_update] failed to allocate " + std::to_string(output.nbytes()) + " bytes");
  }
  output.set_data(std::move(memory));
}

}  // namespace fused_adam
