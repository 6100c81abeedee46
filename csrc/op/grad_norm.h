// The sum of the squares of all gradients, of which the global norm is the root: one pass over them, no copies, float32.
// Like AdamUpdate it knows no back end: those are norm_cpu.cpp and norm_metal.cpp.
#pragma once

#include <functional>
#include <vector>

#include "mlx/utils.h"
#include "op/fallback.h"

namespace fused_adam {

// Whether the stream's device has a kernel to be trusted with gradients of this dtype.
using IsNormFused = std::function<bool(mlx::core::Dtype)>;

// A lazy float32 scalar. Infinite or NaN if any gradient holds infinity or NaN, or if the sum is beyond float32. Gradients of
// which `is_fused` says false, and those of dtypes that the kernels do not have, are summed by MLX's operations. A result depends
// on shapes and layouts, never on threads.
mlx::core::array sum_of_squares(const std::vector<mlx::core::array>& gradients,
                                const IsNormFused& is_fused, mlx::core::StreamOrDevice stream);

// Inputs: gradients of plain dtypes. Output: the sum, a scalar.
class SumOfSquares : public ComposedPrimitive {
 public:
  using ComposedPrimitive::ComposedPrimitive;

  void eval_cpu(const std::vector<mlx::core::array>& inputs,
                std::vector<mlx::core::array>& outputs) override;
  void eval_gpu(const std::vector<mlx::core::array>& inputs,
                std::vector<mlx::core::array>& outputs) override;

  std::function<std::vector<mlx::core::array>(const std::vector<mlx::core::array>&)> composed()
      override;

  const char* name() const override { return "SumOfSquares"; }
  std::vector<mlx::core::Shape> output_shapes(const std::vector<mlx::core::array>&) override {
    return {{}};
  }
};

}  // namespace fused_adam
