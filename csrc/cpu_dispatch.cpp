// Chooses among the kernel sets that this CPU runs: the best one, or the one that MLX_FUSED_ADAM_ISA names.
#include "cpu_dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace fused_adam::cpu {

const Kernels& kernels() {
  static const Kernels chosen = [] {
    auto sets = supported_kernels();
    const char* asked = std::getenv("MLX_FUSED_ADAM_ISA");
    if (!asked || !*asked) return sets.front();
    std::string names;
    for (auto& set : sets) {
      if (asked == std::string(set.isa)) return set;
      names += (names.empty() ? "" : ", ") + std::string(set.isa);
    }
    throw std::invalid_argument("[cpu_isa] MLX_FUSED_ADAM_ISA must be one of " + names +
                                " on this machine but got " + asked);
  }();
  return chosen;
}

}  // namespace fused_adam::cpu
