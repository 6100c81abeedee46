// See grad_norm.h. Graph building, and the same as a composition of MLX's operations.
#include "op/grad_norm.h"

#include <map>
#include <memory>

#include "mlx/ops.h"
#include "op/formats.h"

namespace fused_adam {

namespace mx = mlx::core;

namespace {

// MLX has float64 on the CPU alone.
mx::array fallback_sum(const mx::array& gradient, mx::Stream stream) {
  auto where = gradient.dtype() == mx::float64 ? mx::default_stream(mx::Device::cpu) : stream;
  auto magnitude = gradient.dtype() == mx::complex64 ? mx::abs(gradient, where) : gradient;
  return mx::sum(mx::square(mx::astype(magnitude, mx::float32, where), where), where);
}

mx::array fallback_sum(const std::vector<mx::array>& gradients, mx::Stream stream) {
  mx::array sum(0.0f);
  for (auto& gradient : gradients) sum = mx::add(sum, fallback_sum(gradient, stream), stream);
  return sum;
}

}  // namespace

mx::array sum_of_squares(const std::vector<mx::array>& gradients, const UsesNormKernel& uses_kernel,
                         mx::StreamOrDevice s) {
  auto stream = mx::to_stream(s);
  std::map<mx::Dtype::Val, bool> known;
  std::vector<mx::array> fused, others;
  for (auto& gradient : gradients) {
    auto dtype = gradient.dtype();
    auto [entry, is_new] = known.try_emplace(dtype.val());
    if (is_new) entry->second = is_plain(dtype) && uses_kernel(dtype);
    (entry->second ? fused : others).push_back(gradient);
  }
  if (fused.empty()) return fallback_sum(others, stream);
  mx::array sum({}, mx::float32, std::make_shared<SumOfSquares>(stream), std::move(fused));
  return others.empty() ? sum : mx::add(sum, fallback_sum(others, stream), stream);
}

std::function<std::vector<mx::array>(const std::vector<mx::array>&)> SumOfSquares::fallback() {
  return [stream = stream()](const std::vector<mx::array>& gradients) {
    return std::vector<mx::array>{fallback_sum(gradients, stream)};
  };
}

}  // namespace fused_adam
