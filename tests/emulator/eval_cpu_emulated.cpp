// The CPU back end of the emulated build: takes the Metal path, whose dispatches the emulator runs on the CPU stream.
#include "late_handlers.h"
#include "op/adam_update.h"
#include "op/grad_norm.h"

namespace fused_adam {

void AdamUpdate::eval_cpu(const std::vector<mlx::core::array>& inputs, std::vector<mlx::core::array>& outputs) {
  eval_gpu(inputs, outputs);
  emulator::hold_until_handled(stream(), inputs, outputs);
}

void SumOfSquares::eval_cpu(const std::vector<mlx::core::array>& inputs, std::vector<mlx::core::array>& outputs) {
  eval_gpu(inputs, outputs);
  emulator::hold_until_handled(stream(), inputs, outputs);
}

Backend cpu_backend() { return {"metal (emulated)", nullptr, gpu_backend().tensors_per_node}; }

}  // namespace fused_adam
