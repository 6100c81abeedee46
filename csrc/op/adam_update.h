// The operation: validates, builds the graph, and knows its own derivatives; it knows no back end.
// One AdamUpdate node updates a small group of tensors, since MLX copies a node's inputs to each of its outputs.
#pragma once

#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "math/adam_rule.h"
#include "mlx/utils.h"
#include "op/fallback.h"
#include "op/formats.h"

namespace fused_adam {

struct AdamHyperparameters {
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0.0;
  bool bias_correction = false;
};

// Which results are rounded stochastically (encodings.h) where they are stored in 8 or 16 bits; the others to nearest.
struct AdamRounding {
  bool parameter = false;
  bool m = false;
  bool v = false;
  uint64_t seed = 0;

  bool any() const { return parameter || m || v; }
};

// What the step's gradients say about it: what they are multiplied by (to clip them), and whether it is applied at all. Scalars
// of the device, formed while the step runs.
struct AdamGuard {
  std::optional<mlx::core::array> gradient_scale;
  std::optional<mlx::core::array> is_applied;

  bool any() const { return gradient_scale || is_applied; }
};

// What some storage formats need beside the values: the remainder (int16) of a bfloat16 parameter, or for codes m (int8) and
// v (uint8) the scales (bfloat16) of each row's blocks, so of shape [..., ceil(last / kBlockElements)]. All row-major.
struct AdamExtras {
  std::optional<mlx::core::array> remainder;
  std::optional<mlx::core::array> m_scale;
  std::optional<mlx::core::array> v_scale;
};

// Parallel lists: element i of each belongs to the same parameter. `extras` may be empty: no tensor has any.
struct AdamTensors {
  std::vector<mlx::core::array> parameters;
  std::vector<mlx::core::array> gradients;
  std::vector<mlx::core::array> m;
  std::vector<mlx::core::array> v;
  std::vector<AdamExtras> extras = {};
};

struct AdamResults {
  std::vector<mlx::core::array> parameters;
  std::vector<mlx::core::array> m;
  std::vector<mlx::core::array> v;
  std::vector<AdamExtras> extras = {};
};

// Names tensor i in an error message; called only then.
using TensorName = std::function<std::string(size_t)>;

// Whether the stream's device has a kernel to be trusted with these dtypes: of a parameter, its gradient, its m, and of its
// remainder if there is one.
using IsFused = std::function<bool(mlx::core::Dtype, mlx::core::Dtype, mlx::core::Dtype,
                                   std::optional<mlx::core::Dtype>)>;

// Lazily updates every tensor. `step` counts from 1 and may be absent without bias correction. Tensors of which `is_fused`
// says false get the same update as a composition of MLX's operations, which rounds to nearest; those with extras, which MLX's
// operations cannot store, from the CPU's kernel. A step that the guard does not let pass gives back what it was given, bit for
// bit. Stochastic rounding needs a step; `numbers` are the tensors' in its hash, or empty: their places in the lists.
// `wide_indices` makes kernels index in 64 bits where 32 would do, so that a self-check can run what only huge tensors need.
AdamResults adam_update(const AdamTensors& tensors, const mlx::core::array& learning_rate,
                        const std::optional<mlx::core::array>& step, const AdamGuard& guard,
                        const AdamHyperparameters& hyperparameters, const AdamRounding& rounding,
                        const std::vector<uint32_t>& numbers, const IsFused& is_fused,
                        bool wide_indices, mlx::core::StreamOrDevice stream,
                        const TensorName& name);

// The traffic of adam_update without its arithmetic, through the same back ends: what a benchmark compares with. All four
// arrays must share one dtype.
AdamResults traffic_probe(const AdamTensors& tensors, mlx::core::StreamOrDevice stream,
                          const TensorName& name);

// Names one of the rules of adam_rule.h.
enum class UpdateRule { adam, traffic };

// Inputs: scalars (float32; [] or of one of AdamScalarCounts), then step
// (uint32) if any result is rounded stochastically, then for each tensor parameter, gradient, m, v and extras.
// Outputs: for each tensor parameter, m, v and extras. Extras are remainder, m_scale, v_scale, as far as the formats have them.
// All tensors of a node share their formats.
class AdamUpdate : public ComposedPrimitive {
 public:
  static constexpr size_t kFirstExtraInput = 4;
  static constexpr size_t kFirstExtraOutput = 3;

  // `numbers` has one for each of the node's tensors, or none without stochastic rounding.
  AdamUpdate(mlx::core::Stream stream, UpdateRule rule, AdamConstants constants,
             TensorFormats formats, AdamRounding rounding = {}, std::vector<uint32_t> numbers = {},
             bool wide_indices = false)
      : ComposedPrimitive(stream),
        rule_(rule),
        constants_(constants),
        formats_(formats),
        rounding_(rounding),
        numbers_(std::move(numbers)),
        wide_indices_(wide_indices) {}

  // Inputs before those of tensors.
  size_t common_inputs() const { return rounding_.any() ? 2 : 1; }
  size_t inputs_per_tensor() const { return kFirstExtraInput + extra_count(formats_); }
  size_t outputs_per_tensor() const { return kFirstExtraOutput + extra_count(formats_); }

  void eval_cpu(const std::vector<mlx::core::array>& inputs,
                std::vector<mlx::core::array>& outputs) override;
  void eval_gpu(const std::vector<mlx::core::array>& inputs,
                std::vector<mlx::core::array>& outputs) override;

  const char* name() const override { return "AdamUpdate"; }
  // Never: mx.compile would merge equal updates, and loses outputs when it merges nodes that have several.
  bool is_equivalent(const Primitive&) const override { return false; }
  std::vector<mlx::core::Shape> output_shapes(const std::vector<mlx::core::array>& inputs) override;

  // The same update as a composition of MLX's own operations, whose derivatives MLX knows. Refuses formats with extras.
  std::function<std::vector<mlx::core::array>(const std::vector<mlx::core::array>&)> composed()
      override;

 private:
  // What the graph cannot see: throws for codes and extras that are not row-major.
  void check_layouts(const std::vector<mlx::core::array>& inputs) const;

  UpdateRule rule_;
  AdamConstants constants_;
  TensorFormats formats_;
  AdamRounding rounding_;
  std::vector<uint32_t> numbers_;
  bool wide_indices_;
};

// What runs updates on a device; each defined by its back end.
struct Backend {
  const char* name;         // nullptr where there is no kernel ...
  const char* reason;       // ... and then why
  size_t tensors_per_node;  // how many small tensors are best updated together
};
Backend cpu_backend();
Backend gpu_backend();

}  // namespace fused_adam
