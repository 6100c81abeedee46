// Letting outputs take over the buffers of inputs that nobody else holds; used by every back end.
#pragma once

#include <vector>

#include "mlx/array.h"

namespace fused_adam {

// MLX gives every output of a primitive its own copy of the inputs vector, so none of the inputs would ever look unused.
// Drops the copies of all outputs but the one being evaluated (unless a transformation still needs the graph), and gives
// them back if the evaluation ends by an exception, so that it can be tried again.
class SoleInputs {
 public:
  SoleInputs(const std::vector<mlx::core::array>& inputs, std::vector<mlx::core::array>& outputs);
  ~SoleInputs();
  SoleInputs(const SoleInputs&) = delete;
  SoleInputs& operator=(const SoleInputs&) = delete;

  // The evaluation has succeeded.
  void commit() { is_done_ = true; }

  // It has, and its task holds the buffers that it reads: drops the last copy too. With many small tensors, MLX's own set
  // of buffers to hold for each node costs more than the update.
  void commit_and_release();

 private:
  const std::vector<mlx::core::array>& inputs_;
  std::vector<mlx::core::array>& outputs_;
  bool may_drop_;
  bool is_done_ = false;
};

// Gives the outputs of one tensor (parameter, m, v, extras) the buffers of its inputs (parameter, gradient, m, v, extras) where
// nobody else can see them, else fresh row-major ones.
void allocate_outputs(const mlx::core::array* in, mlx::core::array* out, size_t extras);

}  // namespace fused_adam
