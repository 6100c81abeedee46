// MLX's pow and rsqrt as a hostile GPU computes them: off, everywhere in the process, by what Metal allows. The two
// primitives' entries for eval_cpu are replaced by functions that call the original and then disturb what it gave.
// While the relaxation "scalars" is off (hostile.py), nothing changes.
#include <cstring>

#include "mlx/ops.h"
#include "mlx/primitives.h"
#include "mlx/scheduler.h"
#include "relaxations.h"
#include "vtables.h"

namespace mx = mlx::core;

namespace {

// The direction follows from the value, so that equal calls give equal results, as on a GPU.
float disturbed(float value, int ulps) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude == 0 || magnitude >= 0x7f800000u || value == 1.0f) return value;
  bits += bits * 2654435761u >> 31 ? ulps : -ulps;
  std::memcpy(&value, &bits, sizeof bits);
  return value;
}

template <typename Kind>
struct Inexact {
  static inline emulator::Eval original = nullptr;
  static inline int ulps = 0;

  static void eval(mx::Primitive* self, const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
    original(self, inputs, outputs);
    auto& x = outputs[0];
    bool is_sqrt = std::strcmp(self->name(), "Sqrt") == 0;  // correctly rounded, unlike Rsqrt
    if (is_sqrt || x.dtype() != mx::float32 || !emulator::is_relaxed("scalars")) return;
    mx::scheduler::enqueue(self->stream(), [values = x.data<float>(), count = x.data_size()] {
      for (size_t i = 0; i < count; ++i) values[i] = disturbed(values[i], ulps);
    });
  }

  static void install(mx::Primitive& example, int error) {
    ulps = error;
    original = emulator::replace_eval_cpu(example, &eval);
  }
};

const bool is_installed = [] {
  auto one = mx::array(1.0f);
  Inexact<mx::Power>::install(mx::power(one, one, mx::Device::cpu).primitive(), 16);
  Inexact<mx::Sqrt>::install(mx::rsqrt(one, mx::Device::cpu).primitive(), 1);
  return true;
}();

}  // namespace
