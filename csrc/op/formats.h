// The formats in which tensors are stored (math/encodings.h), and the one place that maps MLX's dtypes to them. Free of
// MLX's and the standard library's headers, since the kernels for newer instruction sets include it.
#pragma once

namespace mlx::core {
struct Dtype;
}

namespace fused_adam {

enum class Format { float32, bfloat16, float16, bfloat16_correction, int8, uint8 };

struct TensorFormats {
  Format parameter;
  Format gradient;
  Format m;
  Format v;

  constexpr bool has_correction() const { return parameter == Format::bfloat16_correction; }
  constexpr bool is_quantized() const { return m == Format::int8; }
  // Whether there are arrays beside the values, which MLX's operations cannot store.
  constexpr bool has_auxiliaries() const { return has_correction() || is_quantized(); }
};

// Whether values of the dtype are complete by themselves.
bool is_plain(const mlx::core::Dtype& dtype);
// Throws for a dtype of no format, which is rejected where the graph is built.
Format format_of(const mlx::core::Dtype& dtype);
mlx::core::Dtype dtype_of(Format format);

}  // namespace fused_adam
