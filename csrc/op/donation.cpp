// See donation.h.
#include "op/donation.h"

#include <algorithm>

#include "mlx/backend/common/utils.h"
#include "op/allocate.h"

namespace fused_adam {

namespace mx = mlx::core;

Donation::Donation(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs)
    : inputs_(inputs),
      outputs_(outputs),
      may_drop_(std::none_of(outputs.begin(), outputs.end(), [](auto& x) { return x.is_tracer(); })) {
  if (!may_drop_) return;
  for (auto& output : outputs_) {
    if (&output.inputs() != &inputs_) output.inputs().clear();
  }
}

Donation::~Donation() {
  if (is_done_ || !may_drop_) return;
  for (auto& output : outputs_) {
    if (&output.inputs() != &inputs_) output.inputs() = inputs_;
  }
}

void Donation::commit_and_release() {
  is_done_ = true;
  if (!may_drop_) return;
  for (auto& output : outputs_) output.inputs().clear();
}

// Kernels may then load and store one buffer under two names, which MLX and Metal take for two. So each thread loads an
// element before it stores it, never after, and no element that another thread stores.
static void allocate_in_place(const mx::array& input, mx::array& output) {
  if (input.flags().row_contiguous && input.dtype() == output.dtype() && input.size() == output.size() &&
      mx::is_donatable(input, output)) {
    output.copy_shared_buffer(input);
  } else {
    allocate(output);
  }
}

void allocate_outputs(const NodeTensor& tensor) {
  for (size_t role = 0; role < Role::kCount; ++role) {
    if (tensor.out[role]) allocate_in_place(*tensor.in[role], *tensor.out[role]);
  }
}

}  // namespace fused_adam
