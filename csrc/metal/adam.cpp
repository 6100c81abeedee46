// The Metal back end: which kernel, which buffers, which grid; no arithmetic. The kernels are metal/adam.metal.
#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <limits>
#include <string>
#include <vector>

#include "adam_args.h"
#include "math/encodings.h"
#include "metal/library.h"
#include "metal/pieces.h"
#include "metal/shaders.h"
#include "mlx/backend/metal/device.h"
#include "op/adam_update.h"
#include "op/donation.h"
#include "op/formats.h"
#include "op/layout.h"
#include "op/streams.h"

namespace fused_adam {

namespace mx = mlx::core;

namespace {

// Elements of one dispatch of adam_linear or adam_general, so that what counts them fits 32 bits and pieces stay
// aligned.
constexpr int64_t kLargestDispatch = int64_t{1} << 30;

// Threadgroups of adam_tiled before one of them gets more than a tile: three for each core of an M3 Ultra.
#ifndef FUSED_ADAM_STRIPS  // fewer in tests
#define FUSED_ADAM_STRIPS 240
#endif
constexpr int64_t kStrips = FUSED_ADAM_STRIPS;

// Half a tile of float32: below, most threads of adam_tiled idle, and the caches serve adam_general's reads as well.
constexpr TileSides kSmallestTile{16, 16};

enum Kernel { kLinear, kTiled, kGeneral, kGroup, kKernels };
constexpr ShaderKernel kShaderKernels[] = {{"adam_linear"}, {"adam_tiled"}, {"adam_general"}, {"adam_group"}};
static_assert(std::size(kShaderKernels) == kKernels);

// The buffers of each Role.
constexpr int kInputBuffers[] = {kParameter, kGradient, kM, kV, kCorrection, kMScale, kVScale};
constexpr int kOutputBuffers[] = {kNewParameter, -1, kNewM, kNewV, kNewCorrection, kNewMScale, kNewVScale};

// Where a dispatch begins in the arrays of each Role, in elements.
struct Starts {
  int64_t in[Role::kCount];
  int64_t out[Role::kCount];
};

struct BoundTensor {
  NodeTensor arrays;
  TensorFormats formats;
  uint32_t number;
  Layout layout;

  const mx::array& parameter() const { return *arrays.in[Role::parameter]; }
  int64_t size() const { return int64_t(parameter().size()); }

  // Elements after which blocks of quantized state begin anew.
  int64_t row() const { return formats.is_quantized() ? block_row(parameter()) : size(); }

  // Elements that a thread updates.
  int64_t run() const {
    bool is_short =
        formats.parameter == Format::float32 || formats.gradient == Format::float32 || formats.m == Format::float32;
    return is_short ? kShortRun : kLongRun;
  }

  // Threads for so many rows of so many elements.
  int64_t threads(int64_t rows, int64_t columns) const {
    if (!formats.is_quantized()) return divide_up(rows * columns, run());
    return rows * int64_t(divide_up(columns, kBlockElements)) * (kBlockElements / run());
  }

  // The sides of a tile: a line of the gradient, and one of the narrowest array beside it.
  TileSides tile() const {
    size_t narrowest = parameter().itemsize();
    for (size_t role : {Role::m, Role::correction}) {
      if (auto x = arrays.in[role]) narrowest = std::min(narrowest, x->itemsize());
    }
    return {int64_t(kLineBytes / arrays.in[Role::gradient]->itemsize()), int64_t(kLineBytes / narrowest)};
  }

  // A dispatch that begins with a row-major element.
  Starts at(int64_t element) const {
    Starts starts;
    for (size_t role = 0; role < Role::kCount; ++role) starts.in[role] = starts.out[role] = element;
    if (!formats.is_quantized()) return starts;
    size_t per_byte = 8 / value_bits(formats.m);
    for (size_t role : {Role::m, Role::v}) starts.in[role] = starts.out[role] = item_index(element, row(), per_byte);
    for (size_t role : {Role::m_scale, Role::v_scale}) {
      starts.in[role] = starts.out[role] = scale_index(element, row());
    }
    return starts;
  }

  // VectorAccess: whether kRunBytes may be loaded and stored at once wherever a run begins.
  unsigned vectors() const {
    auto whole_runs = [&](int64_t stride) { return stride % run() == 0; };
    bool is_tiled = layout.kind == LayoutKind::tiled;
    auto fits = [&](size_t role) {
      bool is_gradient = role == Role::gradient;
      // Alone, the last run of a plain tensor may be shorter.
      bool fit = whole_runs(row()) || (row() == size() && !formats.is_quantized()) || (is_tiled && is_gradient);
      for (const mx::array* x : {arrays.in[role], static_cast<const mx::array*>(arrays.out[role])}) {
        fit = fit && (!x || x->offset() % kRunBytes == 0);
      }
      if (!is_tiled) return fit;
      auto& strides = layout.strides[is_gradient ? Role::gradient : Role::parameter];
      return fit && whole_runs(is_gradient ? layout.gradient_column_stride : layout.row_stride) &&
             std::all_of(strides.begin(), strides.end(), whole_runs);
    };
    bool gradient = fits(Role::gradient) && (!is_tiled || whole_runs(layout.rows));
    bool state = is_tiled ? formats.is_quantized() || whole_runs(layout.columns) : parameter().flags().row_contiguous;
    // Scales are read one by one.
    for (size_t role : {Role::parameter, Role::m, Role::v, Role::correction}) state = state && fits(role);
    return (gradient ? kGradientVectors : 0) | (state ? kStateVectors : 0);
  }

  // A row-major tensor as its rows, for adam_general.
  Layout rows() const {
    Layout rows{LayoutKind::general};
    rows.shape = {size() / row(), row()};
    for (auto& strides : rows.strides) strides = {row(), 1};
    return rows;
  }

  bool needs_64_bits() const {
    auto span = [&](const Axes& strides) {
      int64_t sum = 0;
      for (size_t axis = 0; axis < strides.size(); ++axis) {
        sum += (layout.shape[axis] - 1) * std::abs(strides[axis]);
      }
      return sum;
    };
    return std::any_of(std::begin(layout.strides), std::end(layout.strides),
                       [&](auto& strides) { return span(strides) > std::numeric_limits<int32_t>::max(); });
  }
};

// Encodes the dispatches of one node. All of its tensors share their formats and so one library.
class AdamEncoder {
 public:
  // Without a step, nothing is rounded stochastically, and the kernels do not read it.
  AdamEncoder(mx::Stream stream, ShaderLibrary& library, const AdamNode& node, const mx::array& scalars,
              const mx::array* step)
      : encoder_(mx::metal::get_command_encoder(stream)),
        library_(library),
        step_args_{node.constants, node.rounding, unsigned(scalars.size())},
        scalars_(scalars),
        step_(step ? *step : scalars) {}

  void linear(const BoundTensor& t) {
    int64_t piece = 0;
    for (int64_t start = 0; start < t.size(); start += piece) {
      int64_t row = t.row(), left = t.size() - start;
      // Whole rows, or of one that is too long a part.
      int64_t rows = kLargestDispatch / std::max(row, t.threads(1, row));
      int64_t columns = std::min(row - start % row, kLargestDispatch);
      piece = rows > 0 ? std::min(rows * row, left) : columns;
      use(kLinear);
      encoder_.set_bytes(LinearArgs{step_args_, t.number, unsigned(start), unsigned(std::min(row, piece)), t.vectors()},
                         kArgs);
      bind(t, t.at(start));
      bind_unused(t);
      dispatch_threads(rows > 0 ? t.threads(piece / row, row) : t.threads(1, piece));
    }
  }

  void group(const std::vector<BoundTensor>& tensors) {
    GroupArgs args{step_args_, {}, {}, {}, {}};
    use(kGroup);
    int64_t threads = 0;
    for (size_t i = 0; i < kGroupTensors; ++i) {
      // A slot without a tensor has no threads, but every buffer of the kernel must be bound.
      bool is_used = i < tensors.size();
      auto& t = tensors[is_used ? i : 0];
      args.numbers[i] = t.number;
      args.sizes[i] = is_used ? unsigned(t.size()) : 0;
      args.vectors[i] = t.vectors();
      threads += divide_up(args.sizes[i], t.run());
      args.thread_ends[i] = unsigned(threads);
      bind(t, t.at(0), int(i * kBuffersPerTensor));
    }
    encoder_.set_bytes(args, kArgs);
    dispatch_threads(threads);
  }

  void tiled(const BoundTensor& t) {
    auto& layout = t.layout;
    // The matrix's own strides come last, as the kernel expects.
    auto parameter_strides = layout.strides[Role::parameter];
    auto gradient_strides = layout.strides[Role::gradient];
    parameter_strides.push_back(layout.row_stride);
    gradient_strides.push_back(layout.gradient_column_stride);
    if (t.formats.is_quantized()) {
      // Then those in rows, which follow each other in memory.
      for (size_t i = 0; i <= layout.shape.size(); ++i) {
        parameter_strides.push_back(parameter_strides[i] / layout.columns);
      }
    }
    auto tile = t.tile();
    int64_t tile_columns = divide_up(layout.columns, tile.columns), tile_rows = divide_up(layout.rows, tile.rows);
    unsigned band = tile_rows >= 1 << kTileBand ? kTileBand : 0;
    // Wide strips where tiles share lines, and enough threadgroups are left.
    bool shares_lines = t.formats.is_quantized() || !(t.vectors() & kStateVectors);
    int64_t strips = tile_columns * tile_rows * layout.batches() / kStrips;
    unsigned strip = shares_lines ? std::clamp<int64_t>(strips, 1, kStripTiles) : 1;
    use(kTiled);
    encoder_.set_bytes(TiledArgs{step_args_, t.number, unsigned(layout.rows), unsigned(layout.columns),
                                 unsigned(layout.shape.size()), t.vectors(), band, strip},
                       kArgs);
    bind(t, t.at(0));
    bind_unused(t);
    // Metal takes no empty vector.
    encoder_.set_vector_bytes(layout.shape.empty() ? Axes{1} : layout.shape, kShape);
    encoder_.set_vector_bytes(parameter_strides, kParameterStrides);
    encoder_.set_vector_bytes(gradient_strides, kGradientStrides);
    encoder_.dispatch_threadgroups(
        MTL::Size(divide_up(tile_columns, strip) << band, divide_up(tile_rows, 1 << band), layout.batches()),
        MTL::Size(kThreads, 1, 1));
  }

  void general(const BoundTensor& t, bool wide_indices) {
    auto layout = t.layout;
    auto& shape = layout.shape;
    auto& strides = layout.strides;
    while (shape.size() < 2) {
      shape.insert(shape.begin(), 1);
      for (auto& axes : strides) axes.insert(axes.begin(), 0);
    }
    Axes row_major(shape.size(), 1);
    for (size_t axis = shape.size() - 1; axis-- > 0;) {
      row_major[axis] = row_major[axis + 1] * shape[axis + 1];
    }
    // The grid along the last axis.
    auto threads = [&](int64_t columns) { return t.formats.is_quantized() ? t.threads(1, columns) : columns; };
    auto fits = [&](const Axes& shape) {
      int64_t columns = shape.back();
      return size_of(shape) / columns * std::max(threads(columns), columns) <= kLargestDispatch;
    };
    int64_t unit = t.formats.is_quantized() ? kBlockElements : 1;
    for (auto& piece : pieces_of(shape, unit, fits)) {
      int64_t first = offset_of(piece.start, row_major);
      auto starts = t.at(first);
      use(kGeneral);
      encoder_.set_bytes(
          GeneralArgs{step_args_, t.number, unsigned(first), unsigned(shape.size()), wide_indices, t.vectors()}, kArgs);
      encoder_.set_vector_bytes(piece.shape, kShape);
      for (size_t role = 0; role < std::size(strides); ++role) {
        bool is_packed = t.formats.is_quantized() && role >= Role::m;
        if (!is_packed) starts.in[role] = offset_of(piece.start, strides[role]);
        encoder_.set_vector_bytes(strides[role], int(kParameterStrides + role));
      }
      bind(t, starts);
      bind_unused(t);
      int64_t x = threads(piece.shape.back()), y = *(piece.shape.end() - 2);
      int64_t z = size_of(piece.shape) / piece.shape.back() / y;
      if (t.formats.is_quantized()) {
        dispatch_threads(x * y * z);
        continue;
      }
      int64_t group_x = std::min<int64_t>(x, kThreads);
      int64_t group_y = std::min(y, kThreads / group_x);
      int64_t group_z = std::min(z, kThreads / (group_x * group_y));
      encoder_.dispatch_threads(MTL::Size(x, y, z), MTL::Size(group_x, group_y, group_z));
    }
  }

 private:
  void use(Kernel kernel) {
    encoder_.set_compute_pipeline_state(library_.kernel(kernel));
    encoder_.set_input_array(scalars_, kScalars);
    encoder_.set_input_array(step_, kStep);
  }

  // `shift` is for the tensors of a group.
  void bind(const BoundTensor& t, const Starts& starts, int shift = 0) {
    for (size_t role = 0; role < Role::kCount; ++role) {
      if (auto in = t.arrays.in[role]) {
        encoder_.set_input_array(*in, kInputBuffers[role] + shift, starts.in[role] * int64_t(in->itemsize()));
      }
      if (auto out = t.arrays.out[role]) {
        encoder_.set_output_array(*out, kOutputBuffers[role] + shift, starts.out[role] * int64_t(out->itemsize()));
      }
    }
  }

  // Every buffer of a kernel must be bound: those of arrays that the formats do not have, to the scalars.
  void bind_unused(const BoundTensor& t) {
    for (size_t role = Role::correction; role < Role::kCount; ++role) {
      if (t.arrays.in[role]) continue;
      encoder_.set_input_array(scalars_, kInputBuffers[role]);
      encoder_.set_input_array(scalars_, kOutputBuffers[role]);
    }
  }

  void dispatch_threads(int64_t count) {
    encoder_.dispatch_threads(MTL::Size(count, 1, 1), MTL::Size(std::min<int64_t>(count, kThreads), 1, 1));
  }

  mx::metal::CommandEncoder& encoder_;
  ShaderLibrary& library_;
  StepArgs step_args_;
  const mx::array& scalars_;
  const mx::array& step_;
};

}  // namespace

void AdamUpdate::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  auto tensors = node_.tensors(inputs, &outputs);
  check_layouts(tensors);
  auto& formats = node_.formats;
  std::vector<BoundTensor> row_major, tiled, general;
  for (size_t i = 0; i < tensors.size(); ++i) {
    BoundTensor t{tensors[i], formats, node_.numbers.empty() ? 0 : node_.numbers[i], {}};
    if (t.size() == 0) continue;
    auto state = [&](size_t role) { return formats.is_quantized() ? nullptr : t.arrays.in[role]; };
    t.layout = layout_of(t.parameter(), *t.arrays.in[Role::gradient], state(Role::m), state(Role::v), kSmallestTile,
                         t.row() == t.size());
    // adam_linear takes quantized state in vectors alone.
    if (t.layout.kind == LayoutKind::linear && formats.is_quantized() && t.vectors() != kAllVectors) {
      t.layout = t.rows();
    }
    auto kind = t.layout.kind;
    auto& list = kind == LayoutKind::linear ? row_major : kind == LayoutKind::tiled ? tiled : general;
    list.push_back(std::move(t));
  }
  bool is_group = row_major.size() > 1 && !formats.has_auxiliaries();

  // Every kernel before any buffer changes hands: a GPU that lacks one leaves parameters and state as they were.
  std::string types = metal_type(formats.parameter);
  for (auto format : {formats.gradient, formats.m}) types += std::string(", ") + metal_type(format);
  ShaderLibrary library(stream(), "AdamUpdate", "fused_adam", kAdamShader, kShaderKernels, types, kThreads,
                        "#define FUSED_ADAM_ROUNDED_RESULTS " + std::to_string(node_.rounding.results) + "u\n");
  if (!row_major.empty()) library.kernel(is_group ? kGroup : kLinear);
  if (!tiled.empty()) library.kernel(kTiled);
  if (!general.empty()) library.kernel(kGeneral);

  Donation donation(inputs, outputs);
  for (auto& tensor : tensors) allocate_outputs(tensor);
  AdamEncoder encoder(stream(), library, node_, node_.scalars(inputs), node_.step(inputs));
  if (is_group) {
    encoder.group(row_major);
  } else {
    for (auto& t : row_major) encoder.linear(t);
  }
  for (auto& t : tiled) encoder.tiled(t);
  for (auto& t : general) encoder.general(t, node_.wide_indices || t.needs_64_bits());
  count_updates(stream(), tensors.size());
  donation.commit();
}

Backend gpu_backend() { return {"metal", nullptr, kGroupTensors}; }

}  // namespace fused_adam
