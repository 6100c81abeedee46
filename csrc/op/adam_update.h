// The operation: validates, builds the graph, and knows its own derivatives; it knows no back end.
// One AdamUpdate node updates a small group of tensors, since MLX copies a node's inputs to each of its outputs.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "math/adam_rule.h"
#include "math/random_bits.h"
#include "mlx/utils.h"
#include "op/fallback.h"
#include "op/formats.h"

namespace fused_adam {

// Which results are rounded stochastically where they are stored in 8 or 16 bits; the others to nearest.
enum class StochasticRounding { nearest, parameter_and_v, all };

// One step of an optimizer: all that its tensors share. Arrays are scalars and may be lazy.
struct AdamStep {
  mlx::core::array learning_rate;
  std::optional<mlx::core::array> step = std::nullopt;  // from 1
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  std::optional<mlx::core::array> weight_decay = std::nullopt;  // none: 0
  bool bias_correction = false;
  StochasticRounding rounding = StochasticRounding::nearest;
  uint64_t seed = 0;
  std::optional<mlx::core::array> gradient_scale = std::nullopt;  // multiplies gradients, to clip them
  std::optional<mlx::core::array> is_applied = std::nullopt;      // false: results are the old values, bit for bit
  bool wide_indices = false;  // 64-bit where 32 bits would do: for checks of what only huge tensors need
};

// One parameter with its gradient and its state. Auxiliary arrays are the correction (int16, or int8 of 24 bits) of a
// bfloat16 parameter, and the scales (bfloat16) of quantized m (int8) and v (uint8), of shape `scale_shape`. In 4 bits,
// m and v are uint8 of shape `packed_shape`.
struct AdamTensor {
  mlx::core::array parameter;
  mlx::core::array gradient;
  mlx::core::array m;
  mlx::core::array v;
  std::optional<mlx::core::array> correction = std::nullopt;
  std::optional<mlx::core::array> m_scale = std::nullopt;
  std::optional<mlx::core::array> v_scale = std::nullopt;
  uint32_t number = 0;     // in the random bits
  bool is_decayed = true;  // whether weight decay applies
};

// Names tensor i in an error message; called only then.
using TensorName = std::function<std::string(size_t)>;

// Whether the stream's device has a kernel to be trusted with tensors of these formats, rounded in this way.
using UsesKernel = std::function<bool(const TensorFormats&, StochasticRounding)>;

// Lazily updates every tensor; results replace the old values. Validates first, then asks `uses_kernel` once
// for each combination of formats, then builds the graph. Where it says no, the update is the fallback of MLX's
// operations, which rounds to nearest; or the CPU's kernel for tensors with auxiliary arrays, which MLX cannot store.
std::vector<AdamTensor> adam_update(std::vector<AdamTensor> tensors, const AdamStep& step,
                                    const UsesKernel& uses_kernel, mlx::core::StreamOrDevice stream,
                                    const TensorName& name);

// The arrays of a tensor by what they are, in the order in which a node's inputs and outputs hold them.
struct Role {
  enum : size_t { parameter, gradient, m, v, correction, m_scale, v_scale, kCount };
};

// One tensor of a node, by role: null where the formats have no such array; `out` has no gradient.
struct NodeTensor {
  const mlx::core::array* in[Role::kCount] = {};
  mlx::core::array* out[Role::kCount] = {};
};

// A node's constants, and the one place that knows where its arrays are. All of its tensors share their formats.
// Inputs: scalars (float32; [], or ScalarCounts' kAllScalars), the step (uint32) if any result is rounded
// stochastically, the tensors' arrays, and a result of the node before it in a chain, which is not read. Outputs: the
// tensors' new arrays.
struct AdamNode {
  AdamConstants constants;
  TensorFormats formats;
  RoundingRequest rounding{};          // of those results that these formats can round
  std::vector<uint32_t> numbers = {};  // one for each tensor, if anything is rounded stochastically
  bool wide_indices = false;
  bool is_chained = false;       // the next node waits for this one
  bool has_predecessor = false;  // and this one for another

  std::vector<NodeTensor> tensors(const std::vector<mlx::core::array>& inputs,
                                  std::vector<mlx::core::array>* outputs = nullptr) const;
  const mlx::core::array& scalars(const std::vector<mlx::core::array>& inputs) const { return inputs[0]; }
  // Null if nothing is rounded stochastically.
  const mlx::core::array* step(const std::vector<mlx::core::array>& inputs) const {
    return rounding.results ? &inputs[1] : nullptr;
  }
};

class AdamUpdate : public PrimitiveWithFallback {
 public:
  AdamUpdate(mlx::core::Stream stream, AdamNode node) : PrimitiveWithFallback(stream), node_(std::move(node)) {}

  void eval_cpu(const std::vector<mlx::core::array>& inputs, std::vector<mlx::core::array>& outputs) override;
  void eval_gpu(const std::vector<mlx::core::array>& inputs, std::vector<mlx::core::array>& outputs) override;

  const char* name() const override { return "AdamUpdate"; }
  // Never: mx.compile would merge equal updates, and loses outputs when it merges nodes that have several.
  bool is_equivalent(const Primitive&) const override { return false; }
  std::vector<mlx::core::Shape> output_shapes(const std::vector<mlx::core::array>& inputs) override;

  // Rejects formats with auxiliary arrays.
  Function fallback() override;

 private:
  // Checks what a compiled graph cannot: quantized state and auxiliary arrays must be row-major.
  void check_layouts(const std::vector<NodeTensor>& tensors) const;

  AdamNode node_;
};

// The back end of a device; each defines its own.
struct Backend {
  const char* name;         // nullptr where there is no kernel ...
  const char* reason;       // ... and then why
  size_t tensors_per_node;  // how many small tensors are best updated together
};
Backend cpu_backend();
Backend gpu_backend();

}  // namespace fused_adam
