// See allocate.h.
#include "allocate.h"

#include <stdexcept>
#include <string>
#include <utility>

namespace fused_adam {

namespace mx = mlx::core;

void allocate(mx::array& output) {
  auto buffer = mx::allocator::malloc(output.nbytes());
  if (output.nbytes() > 0 && !buffer.buffer().ptr()) {
    throw std::runtime_error("[adam_update] memory must be had for " +
                             std::to_string(output.nbytes()) + " bytes but got none");
  }
  output.set_data(std::move(buffer));
}

}  // namespace fused_adam
