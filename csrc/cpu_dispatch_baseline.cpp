// Where the compiler's default target already is what the CPU offers (arm64), there is nothing to choose from.
#include "cpu_kernels.h"

namespace fused_adam::cpu {

namespace baseline {
Kernels kernels();
}

const Kernels& kernels() {
  static const Kernels only = baseline::kernels();
  return only;
}

}  // namespace fused_adam::cpu
