// See donation.h. Donation follows MLX's own conditions, so an array that is still held anywhere never changes.
#include "op/donation.h"

#include <algorithm>

#include "mlx/backend/common/utils.h"
#include "op/allocate.h"

namespace fused_adam {

namespace mx = mlx::core;

SoleInputs::SoleInputs(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs)
    : inputs_(inputs),
      outputs_(outputs),
      may_drop_(
          std::none_of(outputs.begin(), outputs.end(), [](auto& x) { return x.is_tracer(); })) {
  if (!may_drop_) return;
  for (auto& output : outputs_) {
    if (&output.inputs() != &inputs_) output.inputs().clear();
  }
}

SoleInputs::~SoleInputs() {
  if (is_done_ || !may_drop_) return;
  for (auto& output : outputs_) {
    if (&output.inputs() != &inputs_) output.inputs() = inputs_;
  }
}

void SoleInputs::commit_and_release() {
  is_done_ = true;
  if (!may_drop_) return;
  for (auto& output : outputs_) output.inputs().clear();
}

static void allocate_in_place(const mx::array& input, mx::array& output) {
  if (input.flags().row_contiguous && input.dtype() == output.dtype() &&
      input.size() == output.size() && mx::is_donatable(input, output)) {
    output.copy_shared_buffer(input);
  } else {
    allocate(output);
  }
}

void allocate_outputs(const mx::array* in, mx::array* out, size_t extras) {
  allocate_in_place(in[0], out[0]);
  allocate_in_place(in[2], out[1]);
  allocate_in_place(in[3], out[2]);
  for (size_t i = 0; i < extras; ++i) allocate_in_place(in[4 + i], out[3 + i]);
}

}  // namespace fused_adam
