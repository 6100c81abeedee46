// Picks the widest of the instruction sets that cpu_kernels.cpp was compiled for and this x86 CPU (and its system) runs.
#include "cpu_kernels.h"

namespace fused_adam::cpu {

namespace baseline {
Kernels kernels();
}
namespace x86_64_v3 {
Kernels kernels();
}
namespace x86_64_v4 {
Kernels kernels();
}

const Kernels& kernels() {
  static const Kernels best = [] {
    __builtin_cpu_init();
    bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl");
    return v4 ? x86_64_v4::kernels() : v3 ? x86_64_v3::kernels() : baseline::kernels();
  }();
  return best;
}

}  // namespace fused_adam::cpu
