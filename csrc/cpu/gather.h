// Cuts a tensor whose arrays lie anyhow into blocks: runs of elements that follow each other in row-major order, few enough
// to stay in the first-level cache. Within every block of an array the elements lie at the same distances from the first, so
// one table of distances for each array takes the place of a division for each element.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "op/layout.h"

namespace fused_adam::cpu {

constexpr int kArrays = 4;  // parameter, gradient, m, v

class Blocks {
 public:
  // Elements of a block at most.
  static constexpr size_t kMost = 1 << 10;

  // None, for a layout that needs none.
  Blocks() = default;
  // `gathered` says which arrays are read through a table; the others are row-major. A block begins at a multiple of `aligned`
  // elements of the last axis.
  Blocks(const Layout& layout, const bool (&gathered)[kArrays], size_t aligned);

  struct Block {
    size_t start;  // in row-major order
    size_t size;
    int64_t offsets[kArrays];  // of the first element; in a row-major array, `start`
  };

  size_t count() const { return count_; }
  Block operator[](size_t index) const;
  // The distances of a block's elements from its first, or null for a row-major array.
  const int64_t* table(int array) const {
    return tables_[array].empty() ? nullptr : tables_[array].data();
  }

 private:
  Layout layout_;
  size_t axis_ = 0;    // the axis that blocks divide; those after it lie within a block
  size_t inner_ = 1;   // elements of the axes after it
  size_t rows_ = 1;    // of the axis, in a block
  size_t pieces_ = 0;  // blocks along the axis
  size_t count_ = 0;
  std::vector<int64_t> tables_[kArrays];
};

}  // namespace fused_adam::cpu
