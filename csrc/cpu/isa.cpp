// Which of the kernel sets compiled from cpu/kernels.cpp this CPU runs, and the one in use: the best, or the one that
// MLX_FUSED_ADAM_ISA names. CMake defines FUSED_ADAM_X86_LEVELS where it has compiled the wider sets of x86.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/kernels.h"

namespace fused_adam::cpu {

namespace baseline {
KernelSet kernels();
}
#if defined(FUSED_ADAM_X86_LEVELS)
namespace x86_64_v3 {
KernelSet kernels();
}
namespace x86_64_v4 {
KernelSet kernels();
}
#endif

namespace {

std::vector<KernelSet> find_supported() {
  std::vector<KernelSet> sets;
#if defined(FUSED_ADAM_X86_LEVELS)
  __builtin_cpu_init();
  bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
            __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("f16c");
  bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
            __builtin_cpu_supports("avx512vl");
  if (v4) sets.push_back(x86_64_v4::kernels());
  if (v3) sets.push_back(x86_64_v3::kernels());
#endif
  sets.push_back(baseline::kernels());
  return sets;
}

const std::vector<KernelSet>& supported() {
  static const std::vector<KernelSet> sets = find_supported();
  return sets;
}

const KernelSet& choose() {
  const char* asked = std::getenv("MLX_FUSED_ADAM_ISA");
  if (!asked || !*asked) return supported().front();
  std::string names;
  for (auto& set : supported()) {
    if (asked == std::string(set.isa)) return set;
    if (!names.empty()) names += ", ";
    names += set.isa;
  }
  throw std::invalid_argument("[cpu_isa] MLX_FUSED_ADAM_ISA must be one of " + names + " on this machine but got " +
                              asked);
}

}  // namespace

const KernelSet& kernels() {
  static const KernelSet& chosen = choose();
  return chosen;
}

const KernelSet* supported_kernels(std::size_t i) { return i < supported().size() ? &supported()[i] : nullptr; }

}  // namespace fused_adam::cpu
