// Merges axes and classifies layouts; see layout.h.
#include "op/layout.h"

#include <algorithm>
#include <cstdlib>
#include <functional>
#include <numeric>
#include <utility>

namespace fused_adam {

namespace mx = mlx::core;

namespace {

// Kernels count rows and columns of a matrix in 32 bits.
constexpr int64_t kLargestTileSide = int64_t{1} << 31;

void drop_axis(Layout& layout, size_t axis) {
  layout.shape.erase(layout.shape.begin() + axis);
  for (auto& strides : layout.strides) strides.erase(strides.begin() + axis);
}

// An axis joins the one before it when, in every array, stepping the outer one equals walking the inner one through.
void merge_axes(Layout& layout, bool may_merge_rows) {
  for (size_t axis = layout.shape.size(); axis-- > 0;) {
    bool is_row = !may_merge_rows && axis + 1 == layout.shape.size();
    if (layout.shape[axis] == 1 && !is_row) drop_axis(layout, axis);
  }
  for (size_t axis = layout.shape.size(); axis-- > 1;) {
    bool joined = may_merge_rows || axis + 1 < layout.shape.size();
    for (auto& strides : layout.strides) {
      joined = joined && strides[axis - 1] == strides[axis] * layout.shape[axis];
    }
    if (joined) {
      layout.shape[axis] *= layout.shape[axis - 1];
      drop_axis(layout, axis - 1);
    }
  }
}

mx::Shape with_items(mx::Shape shape, size_t neighbours) {
  if (!shape.empty()) shape.back() = divide_up(shape.back(), neighbours);
  return shape;
}

}  // namespace

mx::Shape scale_shape(mx::Shape shape) { return with_items(std::move(shape), kBlockElements); }
mx::Shape packed_shape(mx::Shape shape) { return with_items(std::move(shape), 2); }

size_t block_row(const mx::array& x) {
  size_t length = x.shape(-1);
  return length % kBlockElements == 0 ? x.size() : length;
}

int64_t Layout::batches() const { return std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>()); }

Layout layout_of(const mx::array& parameter, const mx::array& gradient, const mx::array* m, const mx::array* v,
                 TileSides smallest_tile, bool may_merge_rows) {
  auto is_row_major = [](const mx::array* x) { return !x || x->flags().row_contiguous; };
  bool state_is_row_major = is_row_major(&parameter) && is_row_major(m) && is_row_major(v);
  if (parameter.size() <= 1 || (state_is_row_major && gradient.flags().row_contiguous)) {
    return {LayoutKind::linear};
  }

  Layout layout{LayoutKind::general};
  layout.shape.assign(parameter.shape().begin(), parameter.shape().end());
  const mx::array* arrays[] = {&parameter, &gradient, m, v};
  for (int i = 0; i < 4; ++i) {
    auto& strides = layout.strides[i];
    if (arrays[i]) {
      strides.assign(arrays[i]->strides().begin(), arrays[i]->strides().end());
    } else {
      strides.assign(layout.shape.size(), 1);
      for (size_t axis = strides.size(); axis-- > 1;) strides[axis - 1] = strides[axis] * layout.shape[axis];
    }
  }
  merge_axes(layout, may_merge_rows);
  if (!state_is_row_major) return layout;

  auto& [parameter_strides, gradient_strides, m_strides, v_strides] = layout.strides;
  auto suits_tiles = [](int64_t side, int64_t smallest) { return smallest <= side && side <= kLargestTileSide; };
  size_t last = layout.shape.size() - 1;
  if (layout.shape.size() == 1 && gradient_strides[0] == 1) return {LayoutKind::linear};
  for (size_t axis = 0; axis < last; ++axis) {
    if (gradient_strides[axis] == 1 && suits_tiles(layout.shape[axis], smallest_tile.rows) &&
        suits_tiles(layout.shape[last], smallest_tile.columns)) {
      layout.kind = LayoutKind::tiled;
      layout.rows = layout.shape[axis];
      layout.columns = layout.shape[last];
      layout.row_stride = parameter_strides[axis];
      layout.gradient_column_stride = gradient_strides[last];
      layout.axes_in_row = last - 1 - axis;
      drop_axis(layout, last);
      drop_axis(layout, axis);
      return layout;
    }
  }
  return layout;
}

Layout layout_of_one(const mx::array& x) {
  Layout layout{LayoutKind::general};
  std::vector<size_t> axes(x.ndim());
  std::iota(axes.begin(), axes.end(), size_t{0});
  std::stable_sort(axes.begin(), axes.end(),
                   [&](size_t a, size_t b) { return std::abs(x.strides(a)) > std::abs(x.strides(b)); });
  for (size_t axis : axes) {
    layout.shape.push_back(x.shape(axis));
    for (auto& strides : layout.strides) strides.push_back(x.strides(axis));
  }
  merge_axes(layout, true);
  bool has_gaps = layout.shape.size() > 1 || (layout.shape.size() == 1 && layout.strides[0][0] != 1);
  return has_gaps ? layout : Layout{LayoutKind::linear};
}

}  // namespace fused_adam
