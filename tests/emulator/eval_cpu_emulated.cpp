// The CPU back end of the emulated build: takes the Metal path, whose dispatches the emulator runs on the CPU stream.
#include <cmath>
#include <cstring>
#include <optional>

#include "adam_update.h"
#include "dispatch.h"
#include "relaxations.h"

namespace fused_adam {

namespace {

// What the scalars of bias correction may be if the device's pow is off by 16 units in the last place, as Metal allows
// (scalar_error in hostile.py says by how much). The sign of each error follows from the value, so that it repeats.
void disturb(char* bytes, AdamConstants constants) {
  AdamScalars<float> scalars;
  std::memcpy(&scalars, bytes, sizeof scalars);
  double correction2 = 1.0 / (double(scalars.denominator_scale) * scalars.denominator_scale);
  if (correction2 >= 1.0) return;  // no bias correction, or its power is 0
  double step = std::log(1.0 - correction2) / std::log(double(constants.beta2));
  double power1 = std::pow(double(constants.beta1), step);
  auto off = [](float value, double relative) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    bool up = bits * 2654435761u >> 31;
    return float(value * (up ? 1.0 + relative : 1.0 - relative));
  };
  constexpr double kPowError = 16.0 / (1 << 23);
  scalars.step_size = off(scalars.step_size, kPowError * power1 / (1.0 - power1));
  scalars.denominator_scale =
      off(scalars.denominator_scale, kPowError * (1.0 - correction2) / correction2 / 2.0);
  std::memcpy(bytes, &scalars, sizeof scalars);
}

}  // namespace

void AdamUpdate::eval_cpu(const std::vector<mlx::core::array>& inputs,
                          std::vector<mlx::core::array>& outputs) {
  std::optional<emulator::ChangedInput> inexact;
  if (inputs[0].size() > 1 && emulator::is_relaxed("scalars")) {
    inexact.emplace(inputs[0].data<char>(),
                    [constants = constants_](char* scalars) { disturb(scalars, constants); });
  }
  eval_gpu(inputs, outputs);
}

Backend cpu_backend() { return {"metal (emulated)", nullptr, gpu_backend().tensors_per_node}; }

}  // namespace fused_adam
