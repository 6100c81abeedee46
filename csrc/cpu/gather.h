// Cuts a tensor whose arrays have any strides into pieces: runs of elements that follow each other in row-major order,
// few enough to stay in the first-level cache. Within every piece of an array the elements are at the same distances
// from the first, so one table of distances for each array takes the place of a division for each element.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "op/layout.h"

namespace fused_adam::cpu {

constexpr int kArrays = 4;  // parameter, gradient, m, v

class GatherPieces {
 public:
  // The most elements of a piece.
  static constexpr size_t kMost = 1 << 10;

  // None, for a layout that needs none.
  GatherPieces() = default;
  // `gathered` says which arrays are read through a table; the others are row-major. A piece begins at a multiple of
  // `aligned` elements of the last axis.
  GatherPieces(const Layout& layout, const bool (&gathered)[kArrays], size_t aligned);

  struct Piece {
    size_t start;  // in row-major order
    size_t size;
    int64_t offsets[kArrays];  // of the first element; in a row-major array, `start`
  };

  size_t count() const { return count_; }
  Piece operator[](size_t index) const;
  // The distances of a piece's elements from its first, or null for a row-major array.
  const int64_t* table(int array) const { return tables_[array].empty() ? nullptr : tables_[array].data(); }

 private:
  Layout layout_;
  size_t axis_ = 0;    // the axis that pieces divide; those after it are within a piece
  size_t inner_ = 1;   // elements of the axes after it
  size_t rows_ = 1;    // of the axis, in a piece
  size_t pieces_ = 0;  // pieces along the axis
  size_t count_ = 0;
  std::vector<int64_t> tables_[kArrays];
};

}  // namespace fused_adam::cpu
