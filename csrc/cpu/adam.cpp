// The CPU back end: queues a node's update on its stream, and shares it among threads when it is worth that.
#include <future>
#include <memory>
#include <vector>

#include "cpu/tensor_update.h"
#include "cpu/threads.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/scheduler.h"
#include "op/adam_update.h"
#include "op/donation.h"
#include "op/streams.h"

namespace fused_adam {

namespace mx = mlx::core;

namespace {

// Where a node costs less than this many row-major elements, waking another thread costs more than it saves.
constexpr size_t kWorthThreads = 1 << 15;

// A parameter that the forward pass has just read stays referenced until the stream's thread is past that read, and could
// not be updated in place: wait for it. Only where that read cannot depend on work that is yet to be queued, that is with a
// single stream in the process, and where the caller waits for the results anyway; else a fresh buffer is the price.
void await_pending_readers(const std::vector<mx::array>& inputs, const mx::array& output,
                           size_t common, size_t per_tensor, mx::Stream stream) {
  bool is_async = output.event().valid();
  for (size_t i = common; i < inputs.size(); ++i) {
    bool is_gradient = (i - common) % per_tensor == 1;
    if (is_gradient || inputs[i].data_shared_ptr().use_count() == 1) continue;
    if (is_async || !is_only_stream()) return;
    // Not mx::synchronize, which throws the errors of earlier tasks: those belong to whoever evaluates them.
    auto drained = std::make_shared<std::promise<void>>();
    mx::scheduler::enqueue(stream, [drained] { drained->set_value(); });
    drained->get_future().wait();
    return;
  }
}

// Runs unit `index` of all the tensors' units taken together.
void run_unit(const std::vector<cpu::TensorUpdate>& tensors, size_t index,
              AdamScalars<float> scalars, AdamConstants constants) {
  for (auto& tensor : tensors) {
    if (index < tensor.units()) return tensor.run(index, scalars, constants);
    index -= tensor.units();
  }
}

}  // namespace

void AdamUpdate::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  check_layouts(inputs);
  SoleInputs sole_inputs(inputs, outputs);
  size_t common = common_inputs();
  await_pending_readers(inputs, outputs[0], common, inputs_per_tensor(), stream());
  auto& encoder = mx::cpu::get_command_encoder(stream());
  std::vector<cpu::TensorUpdate> tensors;
  size_t units = 0, cost = 0;
  for (size_t i = 0; i < outputs.size() / outputs_per_tensor(); ++i) {
    tensors.emplace_back(&inputs[common + i * inputs_per_tensor()],
                         &outputs[i * outputs_per_tensor()], formats_, rule_);
    units += tensors.back().units();
    cost += tensors.back().cost();
  }
  for (auto& input : inputs) encoder.set_input_array(input);
  for (auto& output : outputs) encoder.set_output_array(output);
  auto step = common > 1 ? inputs[1] : inputs[0];
  encoder.dispatch([tensors = std::move(tensors), units, cost, packed = inputs[0].data<float>(),
                    count = inputs[0].size(), packed_holder = inputs[0].data_shared_ptr(),
                    counter = step.data<uint32_t>(), counter_holder = step.data_shared_ptr(),
                    constants = constants_, rounding = rounding_, numbers = numbers_]() mutable {
    AdamScalars<float> scalars{packed[0], 1.0f, 1.0f, 1.0f};
    if (count >= kUnclipped) scalars = {packed[0], packed[1], packed[2], 1.0f};
    if (count == kGuarded) scalars.gradient_scale = packed[3];
    if (count == kGuarded && packed[4] == 0.0f) {
      for (auto& tensor : tensors) tensor.keep();
    } else if (rounding.any()) {
      for (size_t i = 0; i < tensors.size(); ++i) tensors[i].round(rounding, *counter, numbers[i]);
    }
    if (cost < kWorthThreads) {
      for (size_t i = 0; i < units; ++i) run_unit(tensors, i, scalars, constants);
    } else {
      parallel_for(units, [&](size_t i) { run_unit(tensors, i, scalars, constants); });
    }
  });
  count_updates(stream(), outputs.size() / outputs_per_tensor());
  sole_inputs.commit_and_release();
}

// Each node costs MLX a task, and each of its tensors costs time for every other: two is where the sum is least.
Backend cpu_backend() { return {"cpu", nullptr, 2}; }

}  // namespace fused_adam
