// The completion handlers of a GPU's command buffers, which run after mx.eval has returned, late and in another order.
// MLX's gpu::eval leaves to them whatever buffers a node has used, so none can be donated before; mx.synchronize waits
// for them. FUSED_ADAM_EMULATOR_LATE_HANDLERS is the seed of order and delays; unset, nothing is held.
#pragma once

#include <vector>

#include "mlx/array.h"
#include "mlx/stream.h"

namespace emulator {

// At the end of a node's evaluation: holds what gpu::eval would hold, until the node's handler has run.
void hold_until_handled(mlx::core::Stream stream, const std::vector<mlx::core::array>& inputs,
                        const std::vector<mlx::core::array>& outputs);

}  // namespace emulator
