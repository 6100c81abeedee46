// Moments from and to 8-bit codes, outside an update: for states that were stored otherwise. Run by the CPU's kernels.
#pragma once

#include <utility>

#include "mlx/array.h"

namespace fused_adam {

mlx::core::Shape scale_shape(mlx::core::Shape shape);

// Codes (int8 for m, uint8 for v) and the scales of their blocks, rounded to nearest.
std::pair<mlx::core::array, mlx::core::array> encode_moment(const mlx::core::array& moment,
                                                            bool is_v);

// The float32 values that codes and scales stand for.
mlx::core::array decode_moment(const mlx::core::array& codes, const mlx::core::array& scales);

}  // namespace fused_adam
