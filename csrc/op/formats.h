// The formats in which tensors may lie in memory (encodings.h), and the one place that maps MLX's dtypes to them. Free
// of MLX's and the standard library's headers, since the kernels for newer instruction sets include it.
#pragma once

namespace mlx::core {
struct Dtype;
}

namespace fused_adam {

enum class Format { float32, bfloat16, float16, bfloat16_remainder, int8, uint8 };

struct TensorFormats {
  Format parameter;
  Format gradient;
  Format m;
  Format v;

  constexpr bool has_remainder() const { return parameter == Format::bfloat16_remainder; }
  constexpr bool has_codes() const { return m == Format::int8; }
};

constexpr int kMostExtras = 3;

// How many arrays the formats of parameter, m and v need beside the values.
constexpr int extra_count(const TensorFormats& formats) {
  return formats.has_remainder() + 2 * formats.has_codes();
}

// Whether values of the dtype stand for themselves, needing nothing beside them.
bool is_plain(const mlx::core::Dtype& dtype);
// Throws for a dtype of no format, which is rejected where the graph is built.
Format format_of(const mlx::core::Dtype& dtype);

}  // namespace fused_adam
