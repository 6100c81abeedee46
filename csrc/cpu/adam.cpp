// AdamUpdate on the CPU: queues a node's update on its stream, and shares it among threads when it is worth that.
#include <atomic>
#include <deque>
#include <future>
#include <memory>
#include <optional>
#include <utility>
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
constexpr size_t kWorthThreads = 1 << 14;
// In a chain, waiting for a node that costs less than this takes longer than its gradient's memory is worth.
constexpr size_t kWorthWaiting = 1 << 18;

// Waits until the stream's thread has done all that is queued. Only where that cannot depend on work that is yet to be
// queued, that is with a single stream in the process, and where the caller waits for the results anyway.
void drain(const mx::array& output, mx::Stream stream) {
  bool is_async = output.event().valid();
  if (is_async || !is_only_stream()) return;
  // Not mx::synchronize, which throws the errors of earlier tasks: those belong to whoever evaluates them.
  auto drained = std::make_shared<std::promise<void>>();
  mx::scheduler::enqueue(stream, [drained] { drained->set_value(); });
  drained->get_future().wait();
}

// A parameter that the forward pass has just read stays referenced until the stream's thread is past that read, and
// could not be updated in place. Where it is not waited for, a fresh buffer is the price.
void await_pending_readers(const std::vector<NodeTensor>& tensors, const mx::array& output, mx::Stream stream) {
  for (auto& tensor : tensors) {
    for (size_t role = 0; role < Role::kCount; ++role) {
      auto x = tensor.in[role];
      if (x && role != Role::gradient && x->data_shared_ptr().use_count() > 1) return drain(output, stream);
    }
  }
}

// The values of an array, kept alive without its graph.
template <typename T>
struct Held {
  explicit Held(const mx::array& x) : values(x.data<T>()), size(x.size()), data(x.data_shared_ptr()) {}

  const T* values;
  size_t size;
  std::shared_ptr<mx::array::Data> data;
};

// The task of one node.
struct NodeUpdate {
  NodeUpdate(const AdamNode& node, Held<float> scalars) : node(node), scalars(std::move(scalars)) {}

  AdamNode node;
  Held<float> scalars;
  std::optional<Held<uint32_t>> step;  // where something is rounded stochastically
  // Not a vector: of many small nodes, malloc makes each block beyond 1 kB by tidying up before.
  std::deque<cpu::TensorUpdate> tensors;
  size_t units = 0;
  size_t cost = 0;
  std::atomic<bool> has_begun = false;

  void operator()() {
    has_begun = true;
    auto packed = scalars.values;
    AdamScalars<float> rule{packed[0], 1.0f, 1.0f, 1.0f};
    bool is_applied = true;
    if (scalars.size == kAllScalars) {
      rule = {packed[0], packed[1], packed[2], packed[3]};
      is_applied = packed[4] != 0.0f;
    }
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (!is_applied) {
        tensors[i].keep();
      } else if (step) {
        tensors[i].round(node.rounding, *step->values, node.numbers[i]);
      }
    }
    // Unit `index` of all the tensors' units taken together.
    auto update_unit = [&](size_t index) {
      for (auto& tensor : tensors) {
        if (index < tensor.units()) return tensor.update_unit(index, rule, node.constants);
        index -= tensor.units();
      }
    };
    if (cost < kWorthThreads) {
      for (size_t i = 0; i < units; ++i) update_unit(i);
    } else {
      parallel_for(units, update_unit);
    }
  }
};

}  // namespace

void AdamUpdate::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  // An earlier evaluation has queued this update, and was ended by another task's error before MLX took note of it.
  if (inputs.empty()) return;
  auto tensors = node_.tensors(inputs, &outputs);
  check_layouts(tensors);
  Donation donation(inputs, outputs);
  await_pending_readers(tensors, outputs[0], stream());
  auto& encoder = mx::cpu::get_command_encoder(stream());
  auto update = std::make_shared<NodeUpdate>(node_, Held<float>(node_.scalars(inputs)));
  if (auto step = node_.step(inputs)) update->step.emplace(*step);
  for (auto& tensor : tensors) {
    auto& added = update->tensors.emplace_back(tensor, node_.formats);
    update->units += added.units();
    update->cost += added.cost();
  }
  for (auto& input : inputs) encoder.set_input_array(input);
  for (auto& output : outputs) encoder.set_output_array(output);
  try {
    encoder.dispatch([update] { (*update)(); });
  } catch (...) {
    // The error of an earlier task, which MLX may throw after it has queued this one.
    if (update.use_count() > 1 || update->has_begun) donation.commit_and_release();
    throw;
  }
  count_updates(stream(), tensors.size());
  donation.commit_and_release();
  // MLX queues up to a hundred operations ahead, and allocates their results as it does: in a chain the gradient is
  // released first.
  bool is_large = update->cost >= kWorthWaiting;
  update.reset();
  if (node_.is_chained && is_large) drain(outputs[0], stream());
}

// Each node costs MLX a task, and each of its tensors costs time for every other: two is where the sum is least.
Backend cpu_backend() { return {"cpu", nullptr, 2}; }

}  // namespace fused_adam
