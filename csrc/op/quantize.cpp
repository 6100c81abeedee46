// See quantize.h.
#include "op/quantize.h"

#include <memory>
#include <stdexcept>

#include "mlx/ops.h"
#include "op/errors.h"
#include "op/layout.h"

namespace fused_adam {

namespace mx = mlx::core;

std::pair<mx::array, mx::array> quantize_moment(const mx::array& moment, bool is_v, int bits) {
  if (bits != 8 && bits != 4) reject("bits must be 8 or 4 but got ", bits);
  if (moment.ndim() == 0) reject("m and v must have an axis to be quantized but got a scalar");
  auto stream = mx::default_stream(mx::Device::cpu);
  auto values = mx::contiguous(mx::astype(moment, mx::float32, stream), false, stream);
  auto to = bits == 8 ? (is_v ? Format::uint8 : Format::int8) : (is_v ? Format::uint4 : Format::int4);
  auto shape = moment.shape();
  auto outputs = mx::array::make_arrays(
      {bits == 8 ? shape : packed_shape(shape), scale_shape(shape)}, {dtype_of(to), mx::bfloat16},
      std::make_shared<ConvertMoment>(stream, Format::float32, to, shape.back()), {values});
  return {outputs[0], outputs[1]};
}

mx::array dequantize_moment(const mx::array& quantized, const mx::array& scales, bool is_v,
                            std::optional<int> columns) {
  auto dtype = quantized.dtype();
  if (dtype != mx::uint8 && (columns || dtype != mx::int8)) {
    reject("a quantized moment must be ", columns ? "" : "int8 or ", "uint8 but got ", dtype);
  }
  auto shape = quantized.shape();
  if (columns && !shape.empty()) shape.back() = *columns;
  if (columns && packed_shape(shape) != quantized.shape()) {
    reject("a moment of ", *columns, " columns in 4 bits must have shape ", packed_shape(shape), " but got ",
           quantized.shape());
  }
  if (quantized.ndim() == 0 || scales.dtype() != mx::bfloat16 || scales.shape() != scale_shape(shape)) {
    reject("scales must be bfloat16 of shape ", scale_shape(shape), " but got ", scales.dtype(), " of shape ",
           scales.shape());
  }
  auto from = !columns ? format_of(dtype) : is_v ? Format::uint4 : Format::int4;
  auto stream = mx::default_stream(mx::Device::cpu);
  return mx::array(shape, mx::float32, std::make_shared<ConvertMoment>(stream, from, Format::float32, shape.back()),
                   {mx::contiguous(quantized, false, stream), mx::contiguous(scales, false, stream)});
}

void ConvertMoment::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  throw std::logic_error("[ConvertMoment] stream must be the CPU's");
}

std::vector<mx::Shape> ConvertMoment::output_shapes(const std::vector<mx::array>& inputs) {
  auto shape = inputs[0].shape();
  shape.back() = columns_;
  if (to_ == Format::float32) return {shape};
  return {value_bits(to_) == 4 ? packed_shape(shape) : shape, scale_shape(shape)};
}

}  // namespace fused_adam
