// Moments from and to quantized state (math/encodings.h) outside an update: for states that were stored otherwise.
// Lazy and on the CPU; used by bindings.cpp for the Python package's conversions and its self-check.
#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "mlx/primitives.h"
#include "op/formats.h"

namespace fused_adam {

// Quantized values (int8 for m, uint8 for v; of 4 bits uint8, two to a byte) and the scales of their blocks, rounded to
// nearest.
std::pair<mlx::core::array, mlx::core::array> quantize_moment(const mlx::core::array& moment, bool is_v, int bits);

// The float32 values of a quantized moment. Of 4 bits if `columns` tells how many elements the last axis has.
mlx::core::array dequantize_moment(const mlx::core::array& quantized, const mlx::core::array& scales, bool is_v,
                                   std::optional<int> columns);

// Inputs: values, and scales if they are quantized; outputs alike. All row-major; `columns` is the last axis of what is
// not packed.
class ConvertMoment : public mlx::core::Primitive {
 public:
  ConvertMoment(mlx::core::Stream stream, Format from, Format to, int columns)
      : Primitive(stream), from_(from), to_(to), columns_(columns) {}

  void eval_cpu(const std::vector<mlx::core::array>& inputs, std::vector<mlx::core::array>& outputs) override;
  void eval_gpu(const std::vector<mlx::core::array>& inputs, std::vector<mlx::core::array>& outputs) override;

  const char* name() const override { return "ConvertMoment"; }
  std::vector<mlx::core::Shape> output_shapes(const std::vector<mlx::core::array>& inputs) override;

 private:
  Format from_;
  Format to_;
  int columns_;
};

}  // namespace fused_adam
