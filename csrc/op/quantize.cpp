// See quantize.h.
#include "op/quantize.h"

#include <memory>
#include <stdexcept>

#include "mlx/ops.h"
#include "op/errors.h"
#include "op/layout.h"

namespace fused_adam {

namespace mx = mlx::core;

std::pair<mx::array, mx::array> quantize_moment(const mx::array& moment, bool is_v) {
  if (moment.ndim() == 0) reject("m and v must have an axis to be int8 but got a scalar");
  auto stream = mx::default_stream(mx::Device::cpu);
  auto values = mx::contiguous(mx::astype(moment, mx::float32, stream), false, stream);
  auto to = is_v ? Format::uint8 : Format::int8;
  auto outputs =
      mx::array::make_arrays({moment.shape(), scale_shape(moment.shape())}, {is_v ? mx::uint8 : mx::int8, mx::bfloat16},
                             std::make_shared<ConvertMoment>(stream, Format::float32, to), {values});
  return {outputs[0], outputs[1]};
}

mx::array dequantize_moment(const mx::array& quantized, const mx::array& scales) {
  auto dtype = quantized.dtype();
  if (dtype != mx::int8 && dtype != mx::uint8) {
    reject("a quantized moment must be int8 or uint8 but got ", dtype);
  }
  auto shape = scale_shape(quantized.shape());
  if (quantized.ndim() == 0 || scales.dtype() != mx::bfloat16 || scales.shape() != shape) {
    reject("scales must be bfloat16 of shape ", shape, " but got ", scales.dtype(), " of shape ", scales.shape());
  }
  auto stream = mx::default_stream(mx::Device::cpu);
  return mx::array(quantized.shape(), mx::float32,
                   std::make_shared<ConvertMoment>(stream, format_of(dtype), Format::float32),
                   {mx::contiguous(quantized, false, stream), mx::contiguous(scales, false, stream)});
}

void ConvertMoment::eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) {
  throw std::logic_error("[ConvertMoment] stream must be the CPU's");
}

std::vector<mx::Shape> ConvertMoment::output_shapes(const std::vector<mx::array>& inputs) {
  auto& shape = inputs[0].shape();
  if (to_ == Format::float32) return {shape};
  return {shape, scale_shape(shape)};
}

}  // namespace fused_adam
