// See tensor_update.h. A gradient that is not row-major is brought into a small buffer piece by piece, so it is read
// from memory once.
#include "cpu/tensor_update.h"

#if defined(__APPLE__)
#include <sys/sysctl.h>
#else
#include <unistd.h>
#endif

#include <algorithm>
#include <functional>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "op/donation.h"

namespace fused_adam::cpu {

namespace mx = mlx::core;

namespace {

// Elements of a unit of linear work: small enough to balance, large enough that claiming it costs nothing.
constexpr size_t kRun = 1 << 15;
// Pieces of a general layout that make a unit.
constexpr size_t kPiecesPerUnit = 8;
// Cost of an element of the other layouts, roughly, in row-major elements.
constexpr size_t kTiledCost = 2;
constexpr size_t kGeneralCost = 4;
constexpr size_t kCacheLine = 64;
// A transposed tile is a unit of tiled work. Along the parameter's rows it is whole rows, where several cache lines
// down the gradient's columns fit into the room: hardware prefetchers take time to take up a row of parameter, m and v,
// and each line of a column lies in another page. Else it is so much of a row that four lines fit.
constexpr size_t kMostLines = 8;
constexpr size_t kLinesOfPartRows = 4;
constexpr size_t kLinesOfWholeRows = 2;
// Where the system does not tell the size of the second-level cache; and limits for what it tells, which may be a cache
// that many cores share.
constexpr size_t kUsualRoom = 1 << 20;
constexpr size_t kLeastRoom = 1 << 18;
constexpr size_t kMostRoom = 1 << 21;
// From this length on, rows of a transposed tile are updated one by one, with a cache line between them where they
// would else crowd. Shorter ones are one run.
constexpr size_t kLongRow = 1 << 9;
// A tensor has about so many tiles at least, so that there is work for every thread, unless they become smaller than
// this.
constexpr size_t kFewestTiles = 16;
constexpr size_t kSmallestTileElements = 1 << 14;
// Below these sides of a matrix, gathering by a table was measured to be faster than tiles: an update's rows are short
// there.
constexpr TileSides kSmallestTile{4, 12};

// The offset of row-major element `index` of an array with these axes, in elements.
int64_t offset_of(int64_t index, const std::vector<int64_t>& shape, const std::vector<int64_t>& strides) {
  int64_t offset = 0;
  for (size_t axis = shape.size(); axis-- > 0;) {
    offset += index % shape[axis] * strides[axis];
    index /= shape[axis];
  }
  return offset;
}

// Bytes for a tile: those of the second-level cache.
size_t tile_room() {
  static const size_t room = [] {
    size_t bytes = 0;
#if defined(__APPLE__)
    size_t size = sizeof bytes;
    if (sysctlbyname("hw.l2cachesize", &bytes, &size, nullptr, 0) != 0) bytes = 0;
#elif defined(_SC_LEVEL2_CACHE_SIZE)
    bytes = size_t(std::max(0L, sysconf(_SC_LEVEL2_CACHE_SIZE)));
#endif
    return std::clamp(bytes == 0 ? kUsualRoom : bytes, kLeastRoom, kMostRoom);
  }();
  return room;
}

// A thread's own memory for a transposed tile, kept for its next ones: too much for the stacks that macOS gives to
// threads.
char* tile_buffer(size_t bytes) {
  struct Free {
    void operator()(char* bytes) const { ::operator delete(bytes, std::align_val_t(kCacheLine)); }
  };
  thread_local std::unique_ptr<char, Free> buffer;
  thread_local size_t size = 0;
  if (bytes > size) {
    size = 0;
    buffer.reset(static_cast<char*>(::operator new(bytes, std::align_val_t(kCacheLine))));
    size = bytes;
  }
  return buffer.get();
}

}  // namespace

TensorUpdate::TensorUpdate(const NodeTensor& tensor, const TensorFormats& formats)
    : size_(tensor.in[Role::parameter]->size()),
      row_(formats.is_quantized() ? block_row(*tensor.in[Role::parameter]) : size_),
      formats_(formats) {
  auto &parameter = *tensor.in[Role::parameter], &gradient = *tensor.in[Role::gradient];
  auto &m = *tensor.in[Role::m], &v = *tensor.in[Role::v];
  bool is_plain = !formats.is_quantized();
  layout_ =
      layout_of(parameter, gradient, is_plain ? &m : nullptr, is_plain ? &v : nullptr, kSmallestTile, row_ == size_);
  allocate_outputs(tensor);
  auto source = [&](size_t values, size_t auxiliary = Role::kCount) {
    bool has_auxiliary = auxiliary < Role::kCount && tensor.in[auxiliary];
    return Source{tensor.in[values]->data<char>(), has_auxiliary ? tensor.in[auxiliary]->data<char>() : nullptr};
  };
  auto target = [&](size_t values, size_t auxiliary) {
    return Target{tensor.out[values]->data<char>(),
                  tensor.out[auxiliary] ? tensor.out[auxiliary]->data<char>() : nullptr};
  };
  base_ = {source(Role::parameter, Role::correction),
           source(Role::gradient),
           source(Role::m, Role::m_scale),
           source(Role::v, Role::v_scale),
           target(Role::parameter, Role::correction),
           target(Role::m, Role::m_scale),
           target(Role::v, Role::v_scale)};
  for (size_t role = 0; role < Role::kCount; ++role) {
    if (tensor.in[role]) held_[role] = tensor.in[role]->data_shared_ptr();
  }
  parameter_bytes_ = parameter.itemsize();
  gradient_bytes_ = gradient.itemsize();
  state_bytes_ = m.itemsize();
  auto& set = kernels();
  update_ = set.adam;
  transpose_ = gradient_bytes_ == 4 ? set.transpose_4_bytes : set.transpose_2_bytes;
  switch (layout_.kind) {
    case LayoutKind::linear:
      units_ = divide_up(size_, linear_unit());
      break;
    case LayoutKind::tiled:
      cut_into_tiles();
      break;
    case LayoutKind::general: {
      bool gathered[kArrays];
      for (int i = 0; i < kArrays; ++i) {
        gathered[i] = !tensor.in[i]->flags().row_contiguous;
        gather_[i] = tensor.in[i]->itemsize() == 4 ? set.gather_4_bytes : set.gather_2_bytes;
      }
      pieces_ = std::make_unique<GatherPieces>(layout_, gathered, formats.is_quantized() ? kBlockElements : 1);
      units_ = divide_up(pieces_->count(), kPiecesPerUnit);
      break;
    }
  }
}

void TensorUpdate::round(const RoundingRequest& request, uint32_t step, uint32_t number) {
  rounding_ = tensor_rounding(request, step, number, formats_.is_quantized());
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

void TensorUpdate::update_unit(size_t unit, AdamScalars<float> scalars, AdamConstants constants) const {
  switch (layout_.kind) {
    case LayoutKind::linear:
      return update_linear(unit, scalars, constants);
    case LayoutKind::tiled:
      return update_tile(unit, scalars, constants);
    case LayoutKind::general:
      return update_general(unit, scalars, constants);
  }
}

// The tiles' grid begins before the matrix by the distance of its first element from a cache line, so that the edges of
// tiles fall on the edges of lines: MLX's buffers begin in the middle of one.
void TensorUpdate::cut_into_tiles() {
  auto past_line = [](const char* values, size_t bytes) {
    return reinterpret_cast<uintptr_t>(values) % kCacheLine / bytes;
  };
  size_t rows = layout_.rows, columns = layout_.columns, line = kCacheLine / gradient_bytes_;
  tiles_.row_shift = past_line(base_.gradient.values, gradient_bytes_);
  size_t lines = divide_up(rows + tiles_.row_shift, line), room = tile_room() / gradient_bytes_;
  size_t wanted = std::min(std::max(size_ / kFewestTiles, kSmallestTileElements), room);
  auto columns_beside = [&](size_t most_lines, size_t elements) {
    return elements / (std::min(lines, most_lines) * line);
  };
  tiles_.matrices =
      std::accumulate(layout_.shape.end() - layout_.axes_in_row, layout_.shape.end(), size_t{1}, std::multiplies<>());
  if (tiles_.matrices * columns > columns_beside(kLinesOfWholeRows, room)) tiles_.matrices = 1;
  bool is_whole = columns <= columns_beside(kLinesOfWholeRows, room);
  size_t across = is_whole ? 1 : divide_up(columns, columns_beside(kLinesOfPartRows, wanted));
  // Whole rows have no edges within, and tiles of quantized state begin where blocks do.
  bool is_shifted = across > 1 && !formats_.is_quantized();
  tiles_.column_shift = is_shifted ? past_line(base_.parameter.values, parameter_bytes_) : 0;
  tiles_.columns = divide_up(divide_up(columns + tiles_.column_shift, across), kBlockElements) * kBlockElements;
  tiles_.rows = std::min({divide_up(wanted, tiles_.matrices * tiles_.columns * line), lines, kMostLines}) * line;
  tiles_.across = divide_up(columns + tiles_.column_shift, tiles_.columns);
  tiles_.down = divide_up(layout_.rows + tiles_.row_shift, tiles_.rows);
  units_ = size_t(layout_.batches()) / tiles_.matrices * tiles_.down * tiles_.across;
}

RunPointers TensorUpdate::at(int64_t state_offset, int64_t gradient_offset) const {
  RunPointers run = base_;
  auto move = [](auto& array, int64_t values, int64_t auxiliary) {
    array.values += values;
    if (array.auxiliary) array.auxiliary += auxiliary;
  };
  int64_t parameter = state_offset * int64_t(parameter_bytes_);
  int64_t correction = state_offset * correction_bytes(formats_.parameter), scale = 0;
  int64_t state = state_offset * int64_t(state_bytes_);
  if (formats_.is_quantized()) {
    state = item_index(state_offset, row_, 8 / value_bits(formats_.m));
    scale = scale_index(state_offset, row_) * sizeof(uint16_t);
  }
  move(run.parameter, parameter, correction);
  run.gradient.values += gradient_offset * int64_t(gradient_bytes_);
  move(run.m, state, scale);
  move(run.v, state, scale);
  move(run.new_parameter, parameter, correction);
  move(run.new_m, state, scale);
  move(run.new_v, state, scale);
  return run;
}

void TensorUpdate::update(RunPointers run, size_t first, size_t n, AdamScalars<float> scalars,
                          AdamConstants constants) const {
  auto part = [&](const RunPointers& pointers, size_t start, size_t count) {
    update_(pointers, start, count, formats_, scalars, constants, rounding_);
  };
  size_t left_of_row = row_ - first % row_;
  if (n <= left_of_row) return part(run, first, n);
  // Whole rows, since a run that holds the end of one begins with one.
  for (size_t done = 0; done < n; done += row_) {
    RunPointers row = at(first + done, 0);
    row.parameter.values = run.parameter.values + done * parameter_bytes_;
    row.gradient.values = run.gradient.values + done * gradient_bytes_;
    part(row, first + done, row_);
  }
}

// Elements of a unit of linear work, which ends where a row does if rows matter.
size_t TensorUpdate::linear_unit() const { return row_ == size_ ? kRun : std::max<size_t>(1, kRun / row_) * row_; }

void TensorUpdate::update_linear(size_t unit, AdamScalars<float> scalars, AdamConstants constants) const {
  size_t start = unit * linear_unit();
  update(at(start, start), start, std::min(linear_unit(), size_ - start), scalars, constants);
}

void TensorUpdate::update_tile(size_t unit, AdamScalars<float> scalars, AdamConstants constants) const {
  char* transposed = tile_buffer(tiles_.rows * (tiles_.matrices * tiles_.columns * gradient_bytes_ + kCacheLine));
  int64_t matrix = unit / (tiles_.down * tiles_.across) * tiles_.matrices;
  // A tile's part of the grid, which begins before the matrix.
  auto part = [](size_t index, size_t side, size_t shift, size_t length) {
    size_t first = std::max(index * side, shift) - shift;
    return std::pair(first, std::min((index + 1) * side - shift, length) - first);
  };
  auto [row, rows] = part(unit / tiles_.across % tiles_.down, tiles_.rows, tiles_.row_shift, layout_.rows);
  auto [column, columns] = part(unit % tiles_.across, tiles_.columns, tiles_.column_shift, layout_.columns);
  size_t length = tiles_.matrices * columns;
  bool is_spaced = length >= kLongRow && is_crowding(length * gradient_bytes_);
  size_t stride = length + (is_spaced ? kCacheLine / gradient_bytes_ : 0);
  for (size_t i = 0; i < tiles_.matrices; ++i) {
    int64_t gradient = offset_of(matrix + i, layout_.shape, layout_.strides[1]) + int64_t(row) +
                       int64_t(column) * layout_.gradient_column_stride;
    transpose_(base_.gradient.values + gradient * int64_t(gradient_bytes_), layout_.gradient_column_stride, rows,
               columns, transposed + i * columns * gradient_bytes_, stride);
  }
  int64_t first =
      offset_of(matrix, layout_.shape, layout_.strides[0]) + int64_t(row) * layout_.row_stride + int64_t(column);
  // Whole rows that follow each other are one run.
  size_t rows_at_once = int64_t(length) == layout_.row_stride && !is_spaced ? rows : 1;
  for (size_t done = 0; done < rows; done += rows_at_once, first += layout_.row_stride) {
    RunPointers run = at(first, 0);
    run.gradient.values = transposed + done * stride * gradient_bytes_;
    update(run, first, rows_at_once * length, scalars, constants);
  }
}

void TensorUpdate::update_general(size_t unit, AdamScalars<float> scalars, AdamConstants constants) const {
  alignas(kCacheLine) char buffers[kArrays][GatherPieces::kMost * sizeof(float)];
  const char* bases[kArrays] = {base_.parameter.values, base_.gradient.values, base_.m.values, base_.v.values};
  size_t bytes[kArrays] = {parameter_bytes_, gradient_bytes_, state_bytes_, state_bytes_};
  size_t end = std::min((unit + 1) * kPiecesPerUnit, pieces_->count());
  for (size_t index = unit * kPiecesPerUnit; index < end; ++index) {
    auto piece = (*pieces_)[index];
    RunPointers run = at(piece.start, piece.start);  // where an array is row-major, as the outputs are
    const char** values[kArrays] = {&run.parameter.values, &run.gradient.values, &run.m.values, &run.v.values};
    for (int i = 0; i < kArrays; ++i) {
      if (auto table = pieces_->table(i)) {
        gather_[i](bases[i] + piece.offsets[i] * int64_t(bytes[i]), table, piece.size, buffers[i]);
        *values[i] = buffers[i];
      }
    }
    update(run, piece.start, piece.size, scalars, constants);
  }
}

}  // namespace fused_adam::cpu
