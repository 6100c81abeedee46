// Conversion of moments from and to quantized state on the CPU, row by row, by the kernels that updates use.
#include "op/quantize.h"

#include "cpu/kernels.h"
#include "mlx/backend/cpu/encoder.h"
#include "op/allocate.h"
#include "op/layout.h"

namespace fused_adam {

namespace mx = mlx::core;

void ConvertMoment::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  for (auto& output : outputs) allocate(output);
  auto& encoder = mx::cpu::get_command_encoder(stream());
  for (auto& input : inputs) encoder.set_input_array(input);
  for (auto& output : outputs) encoder.set_output_array(output);
  size_t length = columns_, rows = length == 0 ? 0 : inputs[0].size() / inputs[0].shape(-1);
  cpu::Source from{inputs[0].data<char>()};
  cpu::Target to{outputs[0].data<char>()};
  if (inputs.size() > 1) from.auxiliary = inputs[1].data<char>();
  if (outputs.size() > 1) to.auxiliary = outputs[1].data<char>();
  size_t from_bytes = bytes_of(from_, length), to_bytes = bytes_of(to_, length);
  encoder.dispatch([=, from_format = from_, to_format = to_]() mutable {
    size_t scale_bytes = divide_up(length, kBlockElements) * sizeof(uint16_t);
    for (size_t row = 0; row < rows; ++row) {
      cpu::kernels().convert(from, from_format, to, to_format, length);
      from.values += from_bytes;
      to.values += to_bytes;
      if (from.auxiliary) from.auxiliary += scale_bytes;
      if (to.auxiliary) to.auxiliary += scale_bytes;
    }
  });
}

}  // namespace fused_adam
