// Compiles a shader's kernels on the user's machine, from the embedded text: command line tools lack an offline Metal
// compiler. Each kernel and combination of types is a Metal library of its own, so that only what runs is compiled.
#pragma once

#include <span>
#include <string>
#include <vector>

#include "mlx/backend/metal/device.h"
#include "op/formats.h"

namespace fused_adam {

// The type in a shader that is named after a format.
const char* metal_type(Format format);

// A kernel, or a template of kernels, which is instantiated for the library's types.
struct ShaderKernel {
  const char* name;
  bool is_template = true;
};

class ShaderLibrary {
 public:
  // `types`, separated by commas, and `definition`, a line in front of the text, tell instances of a kernel apart.
  // `op` is for errors.
  ShaderLibrary(mlx::core::Stream stream, const char* op, const char* name, const char* shader,
                std::span<const ShaderKernel> kernels, const std::string& types, unsigned long threads_per_threadgroup,
                const std::string& definition = "");

  // Compiles the kernel where it has not been asked for yet. Throws where this GPU lacks the kernel or so many
  // threads.
  MTL::ComputePipelineState* kernel(size_t index);

 private:
  std::string source(const ShaderKernel& kernel) const;

  mlx::core::metal::Device& device_;
  const char* op_;
  const char* shader_;
  std::span<const ShaderKernel> kernels_;
  std::string types_;
  std::string definition_;
  std::string name_;
  unsigned long threads_;
  std::vector<MTL::ComputePipelineState*> loaded_;
};

}  // namespace fused_adam
