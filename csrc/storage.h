// The formats in which tensors may lie in memory (storage_formats.h), and the one place that maps MLX's dtypes to them. Free
// of MLX's and the standard library's headers, since the kernels for newer instruction sets include it.
#pragma once

namespace mlx::core {
struct Dtype;
}

namespace fused_adam {

enum class Format { float32, bfloat16, float16 };
constexpr int kFormatCount = 3;

bool is_storage(const mlx::core::Dtype& dtype);
// Of a dtype that is one; throws for others, which are refused where the graph is built.
Format format_of(const mlx::core::Dtype& dtype);

}  // namespace fused_adam
