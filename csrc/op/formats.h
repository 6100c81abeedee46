// The formats in which tensors are stored (math/encodings.h), and the one place that maps MLX's dtypes to them. Free of
// MLX's and the standard library's headers, since the kernels for newer instruction sets include it.
#pragma once

namespace mlx::core {
struct Dtype;
}

namespace fused_adam {

// The number behind a correction's name is that of its bits.
enum class Format {
  float32,
  bfloat16,
  float16,
  bfloat16_correction_16,
  bfloat16_correction_8,
  int8,   // quantized m
  uint8,  // quantized v
  int4,   // the same in 4 bits, two values to a byte
  uint4
};

// Of one element: bits of the value, and bytes of the correction beside it.
constexpr unsigned value_bits(Format format) {
  return format == Format::float32                           ? 32
         : format == Format::int8 || format == Format::uint8 ? 8
         : format == Format::int4 || format == Format::uint4 ? 4
                                                             : 16;
}
constexpr unsigned correction_bytes(Format format) {
  return format == Format::bfloat16_correction_16 ? 2 : format == Format::bfloat16_correction_8 ? 1 : 0;
}
// Bytes of n values that begin with a byte.
constexpr unsigned long long bytes_of(Format format, unsigned long long n) { return (n * value_bits(format) + 7) / 8; }

struct TensorFormats {
  Format parameter;
  Format gradient;
  Format m;
  Format v;

  constexpr bool has_correction() const { return correction_bytes(parameter) > 0; }
  constexpr bool is_quantized() const { return m == Format::int8 || m == Format::int4; }
  // Whether there are arrays beside the values, which MLX's operations cannot store.
  constexpr bool has_auxiliaries() const { return has_correction() || is_quantized(); }
};

// Whether values of the dtype are complete by themselves.
bool is_plain(const mlx::core::Dtype& dtype);
// Throws for a dtype of no format, which is rejected where the graph is built. Of 8 bits; 4 have the dtype uint8 too.
Format format_of(const mlx::core::Dtype& dtype);
mlx::core::Dtype dtype_of(Format format);

}  // namespace fused_adam
