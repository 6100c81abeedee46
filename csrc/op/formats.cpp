// See formats.h.
#include "op/formats.h"

#include <stdexcept>

#include "mlx/dtype.h"

namespace fused_adam {

namespace mx = mlx::core;

bool is_plain(const mx::Dtype& dtype) { return dtype == mx::float32 || dtype == mx::bfloat16 || dtype == mx::float16; }

Format format_of(const mx::Dtype& dtype) {
  switch (dtype.val()) {
    case mx::Dtype::Val::float32:
      return Format::float32;
    case mx::Dtype::Val::bfloat16:
      return Format::bfloat16;
    case mx::Dtype::Val::float16:
      return Format::float16;
    case mx::Dtype::Val::int8:
      return Format::int8;
    case mx::Dtype::Val::uint8:
      return Format::uint8;
    default:
      throw std::logic_error("[AdamUpdate] dtype was not validated");
  }
}

mx::Dtype dtype_of(Format format) {
  switch (format) {
    case Format::float32:
      return mx::float32;
    case Format::bfloat16:
    case Format::bfloat16_correction_16:
    case Format::bfloat16_correction_8:
      return mx::bfloat16;
    case Format::float16:
      return mx::float16;
    case Format::int8:
      return mx::int8;
    case Format::uint8:
    case Format::int4:
    case Format::uint4:
      return mx::uint8;
  }
  throw std::logic_error("[AdamUpdate] format has no dtype");
}

}  // namespace fused_adam
