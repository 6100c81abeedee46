// See gather.h.
#include "cpu/gather.h"

#include <algorithm>

namespace fused_adam::cpu {

GatherPieces::GatherPieces(const Layout& layout, const bool (&gathered)[kArrays], size_t aligned) : layout_(layout) {
  auto& shape = layout_.shape;
  axis_ = shape.size() - 1;
  while (axis_ > 0 && inner_ * shape[axis_] <= kMost) inner_ *= shape[axis_--];
  size_t length = shape[axis_];
  size_t most_rows = std::max<size_t>(1, kMost / inner_);
  // Pieces of nearly equal size.
  rows_ = divide_up(length, divide_up(length, most_rows));
  if (inner_ == 1) rows_ = divide_up(rows_, aligned) * aligned;
  pieces_ = divide_up(length, rows_);
  count_ = pieces_;
  for (size_t axis = 0; axis < axis_; ++axis) count_ *= shape[axis];

  for (int array = 0; array < kArrays; ++array) {
    if (!gathered[array]) continue;
    auto& table = tables_[array];
    table.reserve(rows_ * inner_);
    table.push_back(0);
    // From the innermost axis outwards: what the table holds so far, repeated for each value of the axis.
    for (size_t axis = shape.size(); axis-- > axis_;) {
      size_t repeated = table.size();
      int64_t values = axis == axis_ ? rows_ : shape[axis];
      for (int64_t value = 1; value < values; ++value) {
        int64_t distance = value * layout_.strides[array][axis];
        for (size_t i = 0; i < repeated; ++i) table.push_back(table[i] + distance);
      }
    }
  }
}

GatherPieces::Piece GatherPieces::operator[](size_t index) const {
  size_t outer = index / pieces_;
  size_t row = index % pieces_ * rows_;
  size_t length = layout_.shape[axis_];
  Piece piece;
  piece.start = (outer * length + row) * inner_;
  piece.size = std::min(rows_, length - row) * inner_;
  for (int array = 0; array < kArrays; ++array) {
    piece.offsets[array] = tables_[array].empty() ? int64_t(piece.start) : int64_t(row) * layout_.strides[array][axis_];
  }
  for (size_t axis = axis_; axis-- > 0;) {
    int64_t at = outer % layout_.shape[axis];
    outer /= layout_.shape[axis];
    for (int array = 0; array < kArrays; ++array) {
      if (!tables_[array].empty()) piece.offsets[array] += at * layout_.strides[array][axis];
    }
  }
  return piece;
}

}  // namespace fused_adam::cpu
