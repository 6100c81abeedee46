// See library.h.
#include "metal/library.h"

#include <stdexcept>

namespace fused_adam {

MTL::ComputePipelineState* metal_kernel(mlx::core::metal::Device& device,
                                        const std::string& library,
                                        const std::function<std::string()>& source,
                                        const std::string& name, const char* op,
                                        unsigned long threads) {
  try {
    auto kernel = device.get_kernel(name, device.get_library(library, source));
    if (kernel->maxTotalThreadsPerThreadgroup() < threads) {
      throw std::runtime_error("this GPU runs too few of its threads together");
    }
    return kernel;
  } catch (const std::exception& error) {
    throw std::runtime_error("[" + std::string(op) + "] Metal kernel " + name + " of " + library +
                             " must compile and load but got: " + error.what() +
                             "\nNothing was updated. MLX_FUSED_ADAM_BACKEND=stock does without");
  }
}

}  // namespace fused_adam
