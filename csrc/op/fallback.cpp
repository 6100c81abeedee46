// See fallback.h.
#include "op/fallback.h"

#include "mlx/ops.h"
#include "mlx/transforms.h"

namespace fused_adam {

namespace mx = mlx::core;

std::vector<mx::array> PrimitiveWithFallback::jvp(const std::vector<mx::array>& primals,
                                                  const std::vector<mx::array>& tangents,
                                                  const std::vector<int>& argnums) {
  std::vector<mx::array> all_tangents;
  for (auto& primal : primals) all_tangents.push_back(mx::zeros_like(primal, stream()));
  for (size_t i = 0; i < argnums.size(); ++i) all_tangents[argnums[i]] = tangents[i];
  return mx::jvp(fallback(), primals, all_tangents).second;
}

std::vector<mx::array> PrimitiveWithFallback::vjp(const std::vector<mx::array>& primals,
                                                  const std::vector<mx::array>& cotangents,
                                                  const std::vector<int>& argnums, const std::vector<mx::array>&) {
  auto all = mx::vjp(fallback(), primals, cotangents).second;
  std::vector<mx::array> asked;
  for (int argnum : argnums) asked.push_back(all[argnum]);
  return asked;
}

std::pair<std::vector<mx::array>, std::vector<int>> PrimitiveWithFallback::vmap(const std::vector<mx::array>& inputs,
                                                                                const std::vector<int>& axes) {
  auto outputs = mx::vmap(fallback(), axes)(inputs);
  return {outputs, std::vector<int>(outputs.size(), 0)};
}

}  // namespace fused_adam
