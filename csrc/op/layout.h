// The memory layout of the four arrays of one update, reduced to the three cases that the back ends have kernels for.
// MLX's layers give every nn.Linear weight a column-major gradient, so that case has a kernel of its own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "math/encodings.h"
#include "mlx/array.h"

namespace fused_adam {

constexpr size_t divide_up(size_t n, size_t by) { return (n + by - 1) / by; }

// The shape of a quantized moment's scales, one for each block of a row: [..., ceil(last / kBlockElements)].
mlx::core::Shape scale_shape(mlx::core::Shape shape);

// The shape of an array of 4 bits a value: [..., ceil(last / 2)] bytes.
mlx::core::Shape packed_shape(mlx::core::Shape shape);

// Elements of a quantized tensor after which blocks begin anew: a row, unless the blocks of every row are full.
size_t block_row(const mlx::core::array& x);

// Where a row-major element is in an array that has an item for so many neighbours of a row.
constexpr size_t item_index(size_t element, size_t row, size_t neighbours) {
  return element / row * divide_up(row, neighbours) + element % row / neighbours;
}
constexpr size_t scale_index(size_t element, size_t block_row) {
  return item_index(element, block_row, kBlockElements);
}

enum class LayoutKind {
  linear,   // all four arrays are row-major
  tiled,    // parameter, m and v are row-major; the gradient's unit stride is along another axis than the last
  general,  // anything else
};

// Sizes and strides are in elements. Axes that can be walked as one are merged.
struct Layout {
  LayoutKind kind;

  // tiled: the matrix spanned by the gradient's unit-stride axis (rows) and the last axis (columns) ...
  int64_t rows = 0;
  int64_t columns = 0;
  int64_t row_stride = 0;              // of parameter, m and v; their column stride is 1
  int64_t gradient_column_stride = 0;  // its row stride is 1

  // ... and the axes around it; general: all axes. Strides are those of parameter, gradient, m, v in this order.
  std::vector<int64_t> shape;
  std::vector<int64_t> strides[4];
  // tiled: the last so many of these axes lie between the rows and the last axis. All in all they are a longer row of
  // parameter, m and v.
  size_t axes_in_row = 0;

  // tiled: how many such matrices there are.
  int64_t batches() const;
};

// The sides of a matrix: along the gradient's unit stride, and along the last axis.
struct TileSides {
  int64_t rows;
  int64_t columns;
};

// A matrix with a side below that of `smallest_tile` is `general`: a tile of it would be mostly edge. Without
// `may_merge_rows`, the last axis stays the tensor's own. Null for m and v that are quantized: they are row-major.
Layout layout_of(const mlx::core::array& parameter, const mlx::core::array& gradient, const mlx::core::array* m,
                 const mlx::core::array* v, TileSides smallest_tile, bool may_merge_rows = true);

// The layout of one array, for sums that may take its elements in any order: its axes from the longest stride to the
// shortest, merged; linear if its elements follow each other without gaps in any order of axes. Never tiled.
Layout layout_of_one(const mlx::core::array& x);

}  // namespace fused_adam
