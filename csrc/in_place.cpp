// See in_place.h. Donation follows MLX's own conditions, so an array that is still held anywhere never changes.
#include "in_place.h"

#include <algorithm>

#include "mlx/allocator.h"
#include "mlx/backend/common/utils.h"

namespace fused_adam {

namespace mx = mlx::core;

namespace {

bool graph_is_needed(const std::vector<mx::array>& outputs) {
  return std::any_of(outputs.begin(), outputs.end(), [](auto& x) { return x.is_tracer(); });
}

}  // namespace

void release_sibling_inputs(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  if (graph_is_needed(outputs)) return;
  for (auto& output : outputs) {
    if (&output.inputs() != &inputs) output.inputs().clear();
  }
}

void release_inputs(std::vector<mx::array>& outputs) {
  if (graph_is_needed(outputs)) return;
  for (auto& output : outputs) output.inputs().clear();
}

bool allocate_in_place(const mx::array& input, mx::array& output) {
  if (input.flags().row_contiguous && input.dtype() == output.dtype() &&
      mx::is_donatable(input, output)) {
    output.copy_shared_buffer(input);
    return true;
  }
  output.set_data(mx::allocator::malloc(output.nbytes()));
  return false;
}

}  // namespace fused_adam
