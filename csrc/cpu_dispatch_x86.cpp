// The instruction sets that cpu_kernels.cpp was compiled for and that this x86 CPU and its system run, widest first.
#include "cpu_dispatch.h"

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

std::vector<Kernels> supported_kernels() {
  __builtin_cpu_init();
  bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
            __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
            __builtin_cpu_supports("f16c");
  bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl");
  std::vector<Kernels> sets;
  if (v4) sets.push_back(x86_64_v4::kernels());
  if (v3) sets.push_back(x86_64_v3::kernels());
  sets.push_back(baseline::kernels());
  return sets;
}

}  // namespace fused_adam::cpu
