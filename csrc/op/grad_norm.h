// The sum of the squares of all gradients, of which the global norm is the root: one pass over them, no copies,
// float32. Like AdamUpdate it knows no back end: those are csrc/cpu/grad_norm.cpp and csrc/metal/grad_norm.cpp.
#pragma once

#include <functional>
#include <vector>

#include "mlx/utils.h"
#include "op/fallback.h"

namespace fused_adam {

// Whether the stream's device has a kernel to be trusted with gradients of this dtype.
using UsesNormKernel = std::function<bool(mlx::core::Dtype)>;

// A lazy float32 scalar. Infinite or NaN if any gradient holds infinity or NaN, or if the sum is beyond float32.
// Gradients of which `uses_kernel` says false, and those of dtypes that the kernels do not have, are summed by MLX's
// operations. A result depends on shapes and layouts, never on threads.
mlx::core::array sum_of_squares(const std::vector<mlx::core::array>& gradients, const UsesNormKernel& uses_kernel,
                                mlx::core::StreamOrDevice stream);

// Inputs: gradients of plain dtypes. Output: the sum, a scalar.
class SumOfSquares : public PrimitiveWithFallback {
 public:
  using PrimitiveWithFallback::PrimitiveWithFallback;

  void eval_cpu(const std::vector<mlx::core::array>& inputs, std::vector<mlx::core::array>& outputs) override;
  void eval_gpu(const std::vector<mlx::core::array>& inputs, std::vector<mlx::core::array>& outputs) override;

  std::function<std::vector<mlx::core::array>(const std::vector<mlx::core::array>&)> fallback() override;

  const char* name() const override { return "SumOfSquares"; }
  std::vector<mlx::core::Shape> output_shapes(const std::vector<mlx::core::array>&) override { return {{}}; }
};

}  // namespace fused_adam
