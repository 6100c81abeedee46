// Allocates results by MLX's allocator; throws if it has no memory.
#pragma once

#include "mlx/allocator.h"
#include "mlx/array.h"

namespace fused_adam {

// Gives an output a buffer of its own, row-major. Throws if there is no memory.
void allocate(mlx::core::array& output);

}  // namespace fused_adam
