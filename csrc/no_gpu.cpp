// Stands in for a GPU back end where MLX was built without Metal; the optimizers never send work here.
#include <stdexcept>

#include "op/adam_update.h"
#include "op/grad_norm.h"

namespace fused_adam {

void AdamUpdate::eval_gpu(const std::vector<mlx::core::array>&, std::vector<mlx::core::array>&) {
  throw std::runtime_error("[AdamUpdate] this build has no GPU kernel; use a CPU stream");
}

void SumOfSquares::eval_gpu(const std::vector<mlx::core::array>&, std::vector<mlx::core::array>&) {
  throw std::runtime_error("[SumOfSquares] this build has no GPU kernel; use a CPU stream");
}

Backend gpu_backend() { return {nullptr, "built for an MLX without Metal", 1}; }

}  // namespace fused_adam
