// Where the compiler's default target already is what the CPU offers (arm64), there is nothing to choose from.
#include "cpu_dispatch.h"

namespace fused_adam::cpu {

namespace baseline {
Kernels kernels();
}

std::vector<Kernels> supported_kernels() { return {baseline::kernels()}; }

}  // namespace fused_adam::cpu
