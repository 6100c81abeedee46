// Compiling a Metal kernel from text on the user's machine, once, with an error that says what to do when it fails.
#pragma once

#include <functional>
#include <string>

#include "mlx/backend/metal/device.h"

namespace fused_adam {

// The kernel of this name in the library, whose text `source` gives when the library is not known yet. `op` is the operation,
// for errors; a GPU that cannot run so many threads together is an error too.
MTL::ComputePipelineState* metal_kernel(mlx::core::metal::Device& device,
                                        const std::string& library,
                                        const std::function<std::string()>& source,
                                        const std::string& name, const char* op,
                                        unsigned long threads);

}  // namespace fused_adam
