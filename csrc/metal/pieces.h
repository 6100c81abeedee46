// Cuts a strided array into pieces that a dispatch can take.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <numeric>
#include <vector>

namespace fused_adam {

// A number for each axis, in elements.
using Axes = std::vector<int64_t>;

inline int64_t size_of(const Axes& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
}

// Where the element at `index` is.
inline int64_t offset_of(const Axes& index, const Axes& strides) {
  return std::inner_product(index.begin(), index.end(), strides.begin(), int64_t{0});
}

struct Piece {
  Axes start;  // the index of its first element
  Axes shape;
};

// Halves the outermost axis of more than one index until `fits(shape)`; cuts the last axis at multiples of `unit`.
template <typename Fits>
void cut(Piece piece, int64_t unit, Fits fits, std::vector<Piece>& pieces) {
  auto& shape = piece.shape;
  if (fits(shape)) {
    pieces.push_back(std::move(piece));
    return;
  }
  size_t axis = std::find_if(shape.begin(), shape.end(), [](auto n) { return n > 1; }) - shape.begin();
  int64_t length = shape[axis], half = length / 2;
  if (axis + 1 == shape.size()) half -= half % unit;
  shape[axis] = half;
  cut(piece, unit, fits, pieces);
  piece.start[axis] += half;
  shape[axis] = length - half;
  cut(std::move(piece), unit, fits, pieces);
}

template <typename Fits>
std::vector<Piece> pieces_of(const Axes& shape, int64_t unit, Fits fits) {
  std::vector<Piece> pieces;
  cut({Axes(shape.size()), shape}, unit, fits, pieces);
  return pieces;
}

}  // namespace fused_adam
