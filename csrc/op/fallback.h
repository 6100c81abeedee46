// A primitive whose derivatives and vmap use a fallback: the same computed by MLX's own operations.
#pragma once

#include <functional>
#include <utility>
#include <vector>

#include "mlx/primitives.h"

namespace fused_adam {

using Function = std::function<std::vector<mlx::core::array>(const std::vector<mlx::core::array>&)>;

class PrimitiveWithFallback : public mlx::core::Primitive {
 public:
  using Primitive::Primitive;

  virtual Function fallback() = 0;

  std::vector<mlx::core::array> jvp(const std::vector<mlx::core::array>& primals,
                                    const std::vector<mlx::core::array>& tangents,
                                    const std::vector<int>& argnums) override;
  std::vector<mlx::core::array> vjp(const std::vector<mlx::core::array>& primals,
                                    const std::vector<mlx::core::array>& cotangents, const std::vector<int>& argnums,
                                    const std::vector<mlx::core::array>& outputs) override;
  std::pair<std::vector<mlx::core::array>, std::vector<int>> vmap(const std::vector<mlx::core::array>& inputs,
                                                                  const std::vector<int>& axes) override;
};

}  // namespace fused_adam
