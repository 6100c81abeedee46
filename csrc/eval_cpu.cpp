// The CPU back end: queues a node's update on its stream, and shares it among threads when it is worth that.
#include <vector>

#include "adam_update.h"
#include "cpu_tensor.h"
#include "in_place.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/device.h"
#include "mlx/stream.h"
#include "threads.h"

namespace fused_adam {

namespace mx = mlx::core;

namespace {

// Below this many elements in a node, waking another thread costs more than it saves.
constexpr size_t kWorthThreads = 1 << 15;

// A parameter that the forward pass has just read stays referenced until the stream's thread is past that read, and could
// not be updated in place. Waiting costs a moment of a thread that only queues work. With a GPU in the process the
// stream might itself be waiting for work that is not committed yet, so there a fresh buffer is the price.
void await_pending_readers(const std::vector<mx::array>& inputs, mx::Stream stream) {
  for (size_t i = 1; i < inputs.size(); ++i) {
    bool is_gradient = (i - 1) % AdamUpdate::kInputsPerTensor == 1;
    if (!is_gradient && inputs[i].data_shared_ptr().use_count() > 1 &&
        !mx::is_available(mx::Device::gpu)) {
      mx::synchronize(stream);
      return;
    }
  }
}

// Runs unit `index` of all the tensors' units taken together.
void run_unit(const std::vector<cpu::Tensor>& tensors, size_t index, AdamScalars<float> scalars,
              AdamConstants constants) {
  for (auto& tensor : tensors) {
    if (index < tensor.units()) return tensor.run(index, scalars, constants);
    index -= tensor.units();
  }
}

}  // namespace

void AdamUpdate::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  release_sibling_inputs(inputs, outputs);
  await_pending_readers(inputs, stream());
  auto& encoder = mx::cpu::get_command_encoder(stream());
  auto rule = rule_ == UpdateRule::adam ? cpu::kAdam : cpu::kTraffic;
  std::vector<cpu::Tensor> tensors;
  size_t units = 0, elements = 0;
  for (size_t i = 0; i < outputs.size() / kOutputsPerTensor; ++i) {
    tensors.emplace_back(&inputs[1 + i * kInputsPerTensor], &outputs[i * kOutputsPerTensor], rule);
    units += tensors.back().units();
    elements += tensors.back().size();
  }
  for (auto& input : inputs) encoder.set_input_array(input);
  for (auto& output : outputs) encoder.set_output_array(output);
  encoder.dispatch([tensors = std::move(tensors), units, elements, packed = inputs[0].data<float>(),
                    count = inputs[0].size(), packed_holder = inputs[0].data_shared_ptr(),
                    constants = constants_] {
    AdamScalars<float> scalars{packed[0], 1.0f, 1.0f};
    if (count > 1) scalars = {packed[0], packed[1], packed[2]};
    if (elements < kWorthThreads) {
      for (size_t i = 0; i < units; ++i) run_unit(tensors, i, scalars, constants);
    } else {
      parallel_for(units, [&](size_t i) { run_unit(tensors, i, scalars, constants); });
    }
  });
  release_inputs(outputs);
}

// Each node costs MLX a task, and each of its tensors costs time for every other: two is where the sum is least.
Backend cpu_backend() { return {"cpu", nullptr, 2}; }

}  // namespace fused_adam
