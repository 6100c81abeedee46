// See state_codes.h.
#include "state_codes.h"

#include <stdexcept>

#include "allocate.h"
#include "cpu_kernels.h"
#include "layout.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "refuse.h"
#include "storage.h"

namespace fused_adam {

namespace mx = mlx::core;

namespace {

// Inputs: values, and scales where they are codes; outputs alike. All row-major.
class ConvertMoment : public mx::Primitive {
 public:
  ConvertMoment(mx::Stream stream, Format from, Format to)
      : Primitive(stream), from_(from), to_(to) {}

  void eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) override {
    for (auto& output : outputs) allocate(output);
    auto& encoder = mx::cpu::get_command_encoder(stream());
    for (auto& input : inputs) encoder.set_input_array(input);
    for (auto& output : outputs) encoder.set_output_array(output);
    size_t length = inputs[0].shape(-1), rows = length == 0 ? 0 : inputs[0].size() / length;
    cpu::Source from{inputs[0].data<char>()};
    cpu::Target to{outputs[0].data<char>()};
    if (inputs.size() > 1) from.extra = inputs[1].data<char>();
    if (outputs.size() > 1) to.extra = outputs[1].data<char>();
    size_t from_bytes = inputs[0].itemsize(), to_bytes = outputs[0].itemsize();
    encoder.dispatch([=, from_format = from_, to_format = to_]() mutable {
      size_t scale_bytes = divide_up(length, kBlockElements) * sizeof(uint16_t);
      for (size_t row = 0; row < rows; ++row) {
        cpu::kernels().convert(from, from_format, to, to_format, length);
        from.values += length * from_bytes;
        to.values += length * to_bytes;
        if (from.extra) from.extra += scale_bytes;
        if (to.extra) to.extra += scale_bytes;
      }
    });
  }

  void eval_gpu(const std::vector<mx::array>&, std::vector<mx::array>&) override {
    throw std::logic_error("[ConvertMoment] stream must be the CPU's");
  }

  const char* name() const override { return "ConvertMoment"; }
  std::vector<mx::Shape> output_shapes(const std::vector<mx::array>& inputs) override {
    if (to_ == Format::float32) return {inputs[0].shape()};
    return {inputs[0].shape(), scale_shape(inputs[0].shape())};
  }

 private:
  Format from_;
  Format to_;
};

}  // namespace

mx::Shape scale_shape(mx::Shape shape) {
  if (!shape.empty()) shape.back() = divide_up(shape.back(), kBlockElements);
  return shape;
}

std::pair<mx::array, mx::array> encode_moment(const mx::array& moment, bool is_v) {
  if (moment.ndim() == 0) refuse("m and v must have an axis to be int8 but got a scalar");
  auto stream = mx::default_stream(mx::Device::cpu);
  auto values = mx::contiguous(mx::astype(moment, mx::float32, stream), false, stream);
  auto to = is_v ? Format::uint8 : Format::int8;
  auto outputs = mx::array::make_arrays(
      {moment.shape(), scale_shape(moment.shape())}, {is_v ? mx::uint8 : mx::int8, mx::bfloat16},
      std::make_shared<ConvertMoment>(stream, Format::float32, to), {values});
  return {outputs[0], outputs[1]};
}

mx::array decode_moment(const mx::array& codes, const mx::array& scales) {
  if (codes.dtype() != mx::int8 && codes.dtype() != mx::uint8) {
    refuse("codes must be int8 or uint8 but got ", codes.dtype());
  }
  if (codes.ndim() == 0 || scales.dtype() != mx::bfloat16 ||
      scales.shape() != scale_shape(codes.shape())) {
    refuse("scales must be bfloat16 of shape ", scale_shape(codes.shape()), " but got ",
           scales.dtype(), " of shape ", scales.shape());
  }
  auto stream = mx::default_stream(mx::Device::cpu);
  return mx::array(
      codes.shape(), mx::float32,
      std::make_shared<ConvertMoment>(stream, format_of(codes.dtype()), Format::float32),
      {mx::contiguous(codes, false, stream), mx::contiguous(scales, false, stream)});
}

}  // namespace fused_adam
