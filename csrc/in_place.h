// Letting outputs take over the buffers of inputs that nobody else holds; used by every back end.
#pragma once

#include <vector>

#include "mlx/array.h"

namespace fused_adam {

// MLX gives every output of a primitive its own copy of the inputs vector, so none of the inputs would ever look unused.
// Drops the copies of all outputs but the one being evaluated, unless a transformation still needs the graph.
void release_sibling_inputs(const std::vector<mlx::core::array>& inputs,
                            std::vector<mlx::core::array>& outputs);

// Drops what is left of them, once a task holds the buffers that it reads: with many small tensors, MLX's own set of
// buffers to hold for each node costs more than the update.
void release_inputs(std::vector<mlx::core::array>& outputs);

// Gives `output` the buffer of `input` if nobody else can see it, else a fresh row-major one. True if in place.
bool allocate_in_place(const mlx::core::array& input, mlx::core::array& output);

}  // namespace fused_adam
