// Donates the buffers of inputs that nobody else holds to the outputs; used by every back end. Donation follows MLX's
// own conditions, so arrays that are still referenced are never modified.
#pragma once

#include <vector>

#include "mlx/array.h"
#include "op/adam_update.h"

namespace fused_adam {

// MLX gives every output of a primitive its own copy of the inputs vector, so none of the inputs would ever look
// unused. Drops the copies of all outputs but the one being evaluated (unless a transformation still needs the graph),
// and gives them back if the evaluation ends by an exception, so that it can be tried again.
class Donation {
 public:
  Donation(const std::vector<mlx::core::array>& inputs, std::vector<mlx::core::array>& outputs);
  ~Donation();
  Donation(const Donation&) = delete;
  Donation& operator=(const Donation&) = delete;

  // The evaluation has succeeded.
  void commit() { is_done_ = true; }

  // It has, and its task holds the buffers that it reads: drops the last copy too. With many small tensors, MLX's own
  // set of buffers to hold for each node costs more than the update.
  void commit_and_release();

 private:
  const std::vector<mlx::core::array>& inputs_;
  std::vector<mlx::core::array>& outputs_;
  bool may_drop_;
  bool is_done_ = false;
};

// Gives a tensor's outputs the buffers of its inputs where nobody else can see them, else fresh row-major ones.
void allocate_outputs(const NodeTensor& tensor);

}  // namespace fused_adam
