// Moments from and to quantized state (math/encodings.h) outside an update: for states that were stored otherwise.
// Lazy and on the CPU; used by bindings.cpp for the Python package's conversions and its self-check.
#pragma once

#include <utility>
#include <vector>

#include "mlx/primitives.h"
#include "op/formats.h"

namespace fused_adam {

// Quantized values (int8 for m, uint8 for v) and the scales of their blocks, rounded to nearest.
std::pair<mlx::core::array, mlx::core::array> quantize_moment(const mlx::core::array& moment, bool is_v);

// The float32 values of a quantized moment.
mlx::core::array dequantize_moment(const mlx::core::array& quantized, const mlx::core::array& scales);

// Inputs: values, and scales if they are quantized; outputs alike. All row-major.
class ConvertMoment : public mlx::core::Primitive {
 public:
  ConvertMoment(mlx::core::Stream stream, Format from, Format to) : Primitive(stream), from_(from), to_(to) {}

  void eval_cpu(const std::vector<mlx::core::array>& inputs, std::vector<mlx::core::array>& outputs) override;
  void eval_gpu(const std::vector<mlx::core::array>& inputs, std::vector<mlx::core::array>& outputs) override;

  const char* name() const override { return "ConvertMoment"; }
  std::vector<mlx::core::Shape> output_shapes(const std::vector<mlx::core::array>& inputs) override;

 private:
  Format from_;
  Format to_;
};

}  // namespace fused_adam
