// The kernel sets compiled from cpu_kernels.cpp that this machine can run. cpu_kernels.h names the one in use.
#pragma once

#include <vector>

#include "cpu_kernels.h"

namespace fused_adam::cpu {

// Best first; defined per architecture.
std::vector<Kernels> supported_kernels();

}  // namespace fused_adam::cpu
