// Puts a function in the place of eval_cpu for every primitive of a class, MLX's own too, in the whole process.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <vector>

#include "mlx/primitives.h"

namespace emulator {

using Eval = void (*)(mlx::core::Primitive*, const std::vector<mlx::core::array>&, std::vector<mlx::core::array>&);

// Returns the function that stood there. eval_cpu is the first of the virtual functions.
inline Eval replace_eval_cpu(mlx::core::Primitive& example, Eval replacement) {
  Eval* entry = *reinterpret_cast<Eval**>(&example);
  Eval original = *entry;
  uintptr_t size = uintptr_t(sysconf(_SC_PAGESIZE));
  auto page = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(entry) / size * size);
  if (mprotect(page, size, PROT_READ | PROT_WRITE) == 0) *entry = replacement;
  return original;
}

}  // namespace emulator
