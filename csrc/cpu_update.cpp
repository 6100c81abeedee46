// See cpu_update.h. A gradient that is not row-major is brought into a small buffer piece by piece, so it is read from
// memory once.
#include "cpu_update.h"

#include <algorithm>
#include <vector>

#include "in_place.h"

namespace fused_adam::cpu {

namespace mx = mlx::core;

namespace {

// Elements of a unit of linear work: small enough to balance, large enough that claiming it costs nothing.
constexpr size_t kRun = 1 << 15;
// Blocks of a general layout that make a unit.
constexpr size_t kBlocksPerUnit = 8;
// How many row-major elements cost as much as one of the other layouts, roughly.
constexpr size_t kTiledCost = 2;
constexpr size_t kGeneralCost = 4;
// Bytes of a transposed tile's sides: down the gradient's columns, whole cache lines; along the parameter's rows, long
// enough for hardware prefetchers to take up (prefetching by hand gained nothing beside them).
constexpr size_t kTileRowBytes = 256;
constexpr size_t kTileColumnBytes = 1024;
// Elements of the sides of the block of tiles that is a unit of work ...
constexpr size_t kBlockColumns = 1024;
constexpr size_t kBlockRows = 256;
// ... but one row of tiles in tensors below this many elements, so that there is work for every thread.
constexpr size_t kSmallTensor = 1 << 20;
constexpr size_t kCacheLine = 64;
// Below these sides of a matrix, gathering by a table was measured to be faster than tiles: an update's rows are short there.
constexpr TileSides kSmallestTile{4, 12};

// Where row-major element `index` of an array with these axes lies, in elements.
int64_t offset_of(int64_t index, const std::vector<int64_t>& shape,
                  const std::vector<int64_t>& strides) {
  int64_t offset = 0;
  for (size_t axis = shape.size(); axis-- > 0;) {
    offset += index % shape[axis] * strides[axis];
    index /= shape[axis];
  }
  return offset;
}

}  // namespace

// A part of one of the matrices of a tiled layout.
struct TensorUpdate::Tile {
  int64_t state;     // offset of the matrix in parameter, m and v
  int64_t gradient;  // and in the gradient
  size_t row, column, rows, columns;
};

TensorUpdate::TensorUpdate(const mx::array* in, mx::array* out, UpdateRule rule)
    : layout_(layout_of(in[0], in[1], in[2], in[3], kSmallestTile)), size_(in[0].size()) {
  auto &parameter = in[0], &gradient = in[1], &m = in[2], &v = in[3];
  allocate_outputs(in, out);
  base_ = {parameter.data<char>(), gradient.data<char>(), m.data<char>(),     v.data<char>(),
           out[0].data<char>(),    out[1].data<char>(),   out[2].data<char>()};
  for (int i = 0; i < kArrays; ++i) held_[i] = in[i].data_shared_ptr();
  parameter_bytes_ = parameter.itemsize();
  gradient_bytes_ = gradient.itemsize();
  state_bytes_ = m.itemsize();
  auto& set = kernels();
  formats_ = {format_of(parameter.dtype()), format_of(gradient.dtype()), format_of(m.dtype())};
  update_ = rule == UpdateRule::adam ? set.adam : set.traffic;
  transpose_ = gradient_bytes_ == 4 ? set.transpose_4_bytes : set.transpose_2_bytes;
  switch (layout_.kind) {
    case LayoutKind::linear:
      units_ = divide_up(size_, kRun);
      break;
    case LayoutKind::tiled:
      units_ = size_t(layout_.batches()) * blocks_down() * blocks_across();
      break;
    case LayoutKind::general: {
      bool gathered[kArrays];
      for (int i = 0; i < kArrays; ++i) {
        gathered[i] = !in[i].flags().row_contiguous;
        gather_[i] = in[i].itemsize() == 4 ? set.gather_4_bytes : set.gather_2_bytes;
      }
      blocks_ = Blocks(layout_, gathered);
      units_ = divide_up(blocks_.count(), kBlocksPerUnit);
      break;
    }
  }
}

void TensorUpdate::round(const AdamRounding& rounding, uint32_t step, uint32_t number) {
  auto key = rounding_key(uint32_t(rounding.seed), uint32_t(rounding.seed >> 32), step, number);
  rounding_ = {rounding.parameter, rounding.m, rounding.v, key};
}

size_t TensorUpdate::cost() const {
  switch (layout_.kind) {
    case LayoutKind::linear:
      return size_;
    case LayoutKind::tiled:
      return kTiledCost * size_;
    case LayoutKind::general:
      return kGeneralCost * size_;
  }
  return size_;
}

void TensorUpdate::run(size_t unit, AdamScalars<float> scalars, AdamConstants constants) const {
  switch (layout_.kind) {
    case LayoutKind::linear:
      return run_linear(unit, scalars, constants);
    case LayoutKind::tiled:
      return run_tiled(unit, scalars, constants);
    case LayoutKind::general:
      return run_general(unit, scalars, constants);
  }
}

// The tiles' grid begins before the matrix by what its first element lies past a cache line, so that the edges of tiles
// fall on the edges of lines: MLX's buffers begin in the middle of one.
size_t TensorUpdate::row_shift() const {
  return reinterpret_cast<uintptr_t>(base_.gradient) % kCacheLine / gradient_bytes_;
}
size_t TensorUpdate::column_shift() const {
  return reinterpret_cast<uintptr_t>(base_.parameter) % kCacheLine / parameter_bytes_;
}

size_t TensorUpdate::tile_rows() const { return kTileRowBytes / gradient_bytes_; }
size_t TensorUpdate::tile_columns() const { return kTileColumnBytes / parameter_bytes_; }

size_t TensorUpdate::block_rows() const { return size_ < kSmallTensor ? tile_rows() : kBlockRows; }

size_t TensorUpdate::blocks_across() const {
  return divide_up(layout_.columns + column_shift(), kBlockColumns);
}
size_t TensorUpdate::blocks_down() const {
  return divide_up(layout_.rows + row_shift(), block_rows());
}

RunPointers TensorUpdate::at(int64_t state_offset, int64_t gradient_offset) const {
  return {base_.parameter + state_offset * int64_t(parameter_bytes_),
          base_.gradient + gradient_offset * int64_t(gradient_bytes_),
          base_.m + state_offset * int64_t(state_bytes_),
          base_.v + state_offset * int64_t(state_bytes_),
          base_.new_parameter + state_offset * int64_t(parameter_bytes_),
          base_.new_m + state_offset * int64_t(state_bytes_),
          base_.new_v + state_offset * int64_t(state_bytes_)};
}

void TensorUpdate::run_linear(size_t unit, AdamScalars<float> scalars,
                              AdamConstants constants) const {
  size_t start = unit * kRun;
  update_(at(start, start), start, std::min(kRun, size_ - start), formats_, scalars, constants,
          rounding_);
}

const char* TensorUpdate::gradient_column(const Tile& tile, size_t j) const {
  int64_t column = int64_t(tile.column + j) * layout_.gradient_column_stride;
  return base_.gradient + (tile.gradient + int64_t(tile.row) + column) * int64_t(gradient_bytes_);
}

int64_t TensorUpdate::state_row(const Tile& tile, size_t i) const {
  return tile.state + int64_t(tile.row + i) * layout_.row_stride + int64_t(tile.column);
}

void TensorUpdate::run_tiled(size_t unit, AdamScalars<float> scalars,
                             AdamConstants constants) const {
  alignas(kCacheLine) char transposed[kTileRowBytes * kTileColumnBytes / sizeof(uint16_t)];
  int64_t batch = unit / (blocks_down() * blocks_across());
  // Rows and columns of the grid, which begins row_shift() and column_shift() before the matrix.
  size_t first_row = unit / blocks_across() % blocks_down() * block_rows();
  size_t first_column = unit % blocks_across() * kBlockColumns;
  size_t grid_rows = layout_.rows + row_shift();
  size_t grid_columns = layout_.columns + column_shift();
  size_t end_row = std::min(first_row + block_rows(), grid_rows);
  size_t end_column = std::min(first_column + kBlockColumns, grid_columns);
  size_t tiles_across = divide_up(end_column - first_column, tile_columns());
  size_t tiles = tiles_across * divide_up(end_row - first_row, tile_rows());
  int64_t state = offset_of(batch, layout_.shape, layout_.strides[0]);
  int64_t gradient = offset_of(batch, layout_.shape, layout_.strides[1]);
  auto tile_at = [&](size_t index) {
    size_t row = first_row + index / tiles_across * tile_rows();
    size_t column = first_column + index % tiles_across * tile_columns();
    size_t next_row = std::min(row + tile_rows(), end_row);
    size_t next_column = std::min(column + tile_columns(), end_column);
    row = std::max(row, row_shift());
    column = std::max(column, column_shift());
    return Tile{state,
                gradient,
                row - row_shift(),
                column - column_shift(),
                next_row - row,
                next_column - column};
  };

  for (size_t index = 0; index < tiles; ++index) {
    Tile tile = tile_at(index);
    transpose_(gradient_column(tile, 0), layout_.gradient_column_stride, tile.rows, tile.columns,
               transposed);
    for (size_t i = 0; i < tile.rows; ++i) {
      int64_t first = state_row(tile, i);
      RunPointers row = at(first, 0);
      row.gradient = transposed + i * tile.columns * gradient_bytes_;
      update_(row, first, tile.columns, formats_, scalars, constants, rounding_);
    }
  }
}

void TensorUpdate::run_general(size_t unit, AdamScalars<float> scalars,
                               AdamConstants constants) const {
  alignas(kCacheLine) char buffers[kArrays][Blocks::kMost * sizeof(float)];
  const char* bases[kArrays] = {base_.parameter, base_.gradient, base_.m, base_.v};
  size_t bytes[kArrays] = {parameter_bytes_, gradient_bytes_, state_bytes_, state_bytes_};
  size_t end = std::min((unit + 1) * kBlocksPerUnit, blocks_.count());
  for (size_t index = unit * kBlocksPerUnit; index < end; ++index) {
    auto block = blocks_[index];
    const char* from[kArrays];
    for (int i = 0; i < kArrays; ++i) {
      from[i] = bases[i] + block.offsets[i] * int64_t(bytes[i]);
      if (auto table = blocks_.table(i)) {
        gather_[i](from[i], table, block.size, buffers[i]);
        from[i] = buffers[i];
      }
    }
    RunPointers run = at(block.start, 0);  // the outputs are row-major whatever the inputs are
    run.parameter = from[0];
    run.gradient = from[1];
    run.m = from[2];
    run.v = from[3];
    update_(run, block.start, block.size, formats_, scalars, constants, rounding_);
  }
}

}  // namespace fused_adam::cpu
