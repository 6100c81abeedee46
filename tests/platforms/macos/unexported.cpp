// A planted fault for test_macos_build.py: fast::Custom is declared in MLX's headers but not
// exported by its library, so that this compiles, links and would fail to load on a Mac.
#include "mlx/fast_primitives.h"

struct Planted : mlx::core::fast::Custom {
  using Custom::Custom;
  void eval_cpu(const std::vector<mlx::core::array>&, std::vector<mlx::core::array>&) override {}
  void eval_gpu(const std::vector<mlx::core::array>&, std::vector<mlx::core::array>&) override {}
  const char* name() const override { return "Planted"; }
};

extern "C" void* planted(mlx::core::Stream stream) { return new Planted(stream, nullptr); }
