// See library.h.
#include "metal/library.h"

#include <stdexcept>

namespace fused_adam {

namespace mx = mlx::core;

const char* metal_type(Format format) {
  switch (format) {
    case Format::float32:
      return "float";
    case Format::bfloat16:
      return "bfloat";
    case Format::float16:
      return "half";
    case Format::bfloat16_correction_16:
      return "BfloatCorrection<short>";
    case Format::bfloat16_correction_8:
      return "BfloatCorrection<int8_t>";
    case Format::int8:
    case Format::uint8:
      return "QuantizedState<8>";
    case Format::int4:
    case Format::uint4:
      return "QuantizedState<4>";
  }
  throw std::logic_error("format has no name in the shaders");
}

ShaderLibrary::ShaderLibrary(mx::Stream stream, const char* op, const char* name, const char* shader,
                             std::span<const ShaderKernel> kernels, const std::string& types,
                             unsigned long threads_per_threadgroup, const std::string& definition)
    : device_(mx::metal::device(stream.device)),
      op_(op),
      shader_(shader),
      kernels_(kernels),
      types_(types),
      definition_(definition),
      name_(std::string(name) + "<" + types + ">"),
      threads_(threads_per_threadgroup),
      loaded_(kernels.size()) {}

std::string ShaderLibrary::source(const ShaderKernel& kernel) const {
  std::string text = definition_ + shader_;
  if (!kernel.is_template) return text;
  auto instance = std::string(kernel.name) + "<" + types_ + ">";
  return text + "template [[host_name(\"" + kernel.name + "\")]] [[kernel]] decltype(" + instance + ") " + instance +
         ";\n";
}

MTL::ComputePipelineState* ShaderLibrary::kernel(size_t index) {
  if (loaded_[index]) return loaded_[index];
  std::string name = kernels_[index].name;
  // All types share what is no template.
  auto instance = kernels_[index].is_template ? name_ + definition_ + name : op_ + ("." + name);
  try {
    auto library = device_.get_library(instance, [&] { return source(kernels_[index]); });
    auto kernel = device_.get_kernel(name, library);
    auto most = kernel->maxTotalThreadsPerThreadgroup();
    if (most < threads_) {
      throw std::runtime_error("this GPU supports only " + std::to_string(most) + " threads per threadgroup, " +
                               std::to_string(threads_) + " needed");
    }
    return loaded_[index] = kernel;
  } catch (const std::exception& error) {
    throw std::runtime_error("[" + std::string(op_) + "] failed to load Metal kernel " + name + " of " + name_ + ": " +
                             error.what() +
                             "\nNothing was updated. Set MLX_FUSED_ADAM_BACKEND=stock to train "
                             "without Metal kernels");
  }
}

}  // namespace fused_adam
