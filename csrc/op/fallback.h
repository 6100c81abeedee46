// A primitive whose derivatives and vmap are those of a composition of MLX's own operations that computes the same.
#pragma once

#include <functional>
#include <vector>

#include "mlx/primitives.h"

namespace fused_adam {

class ComposedPrimitive : public mlx::core::Primitive {
 public:
  using Primitive::Primitive;

  virtual std::function<std::vector<mlx::core::array>(const std::vector<mlx::core::array>&)>
  composed() = 0;

  std::vector<mlx::core::array> jvp(const std::vector<mlx::core::array>& primals,
                                    const std::vector<mlx::core::array>& tangents,
                                    const std::vector<int>& argnums) override;
  std::vector<mlx::core::array> vjp(const std::vector<mlx::core::array>& primals,
                                    const std::vector<mlx::core::array>& cotangents,
                                    const std::vector<int>& argnums,
                                    const std::vector<mlx::core::array>& outputs) override;
  std::pair<std::vector<mlx::core::array>, std::vector<int>> vmap(
      const std::vector<mlx::core::array>& inputs, const std::vector<int>& axes) override;
};

}  // namespace fused_adam
