// The Metal back end: which kernel, which buffers, which grid; no arithmetic. The kernels are metal/adam.metal, compiled
// from the embedded text at first use, since command line tools lack an offline Metal compiler.
#include <algorithm>
#include <cstdlib>
#include <functional>
#include <iterator>
#include <limits>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "adam_args.h"
#include "math/encodings.h"
#include "metal/library.h"
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

// Elements of one dispatch of adam_linear or adam_general, so that what counts them fits 32 bits and pieces stay aligned.
constexpr int64_t kLargestDispatch = int64_t{1} << 30;

// Half a tile of float32: below, most threads of adam_tiled idle, and the caches serve adam_general's reads as well.
constexpr TileSides kSmallestTile{16, 16};

// What the shader calls a format of an update; codes of m and v go by one name.
const char* metal_type(Format format) {
  switch (format) {
    case Format::float32:
      return "float";
    case Format::bfloat16:
      return "bfloat";
    case Format::float16:
      return "half";
    case Format::bfloat16_remainder:
      return "BfloatRemainder";
    case Format::int8:
    case Format::uint8:
      return "Codes";
  }
  throw std::logic_error("[AdamUpdate] format has no name in the shader");
}

enum Kernel { kLinear, kGroup, kTiled, kGeneral32, kGeneral64, kKernels };
constexpr const char* kKernelNames[] = {"adam_linear", "adam_group", "adam_tiled",
                                        "adam_general_32", "adam_general_64"};

using Axes = std::vector<int64_t>;

// Where a dispatch begins, in elements: in the values of each input, in what is row-major, and in scales.
struct Starts {
  int64_t in[AdamUpdate::kFirstExtraInput];
  int64_t out;
  int64_t scale;
};

struct BoundTensor {
  const mx::array* in;  // parameter, gradient, m, v and extras
  mx::array* out;       // parameter, m, v and extras
  TensorFormats formats;
  Layout layout;
  uint32_t number;

  const mx::array& parameter() const { return in[0]; }
  int64_t size() const { return int64_t(parameter().size()); }
  size_t extras() const { return extra_count(formats); }

  // Elements after which blocks of codes begin anew: a row, unless its blocks are all whole or there are none.
  int64_t row() const {
    if (!formats.has_codes()) return size();
    int64_t length = parameter().shape(-1);
    return length % kBlockElements == 0 ? size() : length;
  }

  // Elements that a thread updates.
  int64_t run() const {
    bool is_short = formats.parameter == Format::float32 && formats.gradient == Format::float32 &&
                    formats.m == Format::float32;
    return is_short ? kShortRun : kLongRun;
  }

  // Threads for so many rows of so many elements.
  int64_t threads(int64_t rows, int64_t columns) const {
    if (!formats.has_codes()) return divide_up(rows * columns, run());
    return rows * int64_t(divide_up(columns, kBlockElements)) * kBlockThreads;
  }

  // Where the scale of the block lies that begins with a row-major element.
  int64_t scale(int64_t element) const {
    if (!formats.has_codes()) return 0;
    return element / row() * int64_t(divide_up(row(), kBlockElements)) +
           element % row() / kBlockElements;
  }

  Starts at(int64_t start) const { return {{start, start, start, start}, start, scale(start)}; }

  // Whether kRunBytes may be loaded and stored at once wherever a run begins.
  bool vectors() const {
    auto aligned = [](const mx::array& x) { return x.offset() % kRunBytes == 0; };
    auto whole_runs = [&](int64_t stride) { return stride % run() == 0; };
    bool strides_fit = row() == size() || whole_runs(row());
    if (layout.kind == LayoutKind::tiled) {
      strides_fit =
          strides_fit && whole_runs(layout.row_stride) && whole_runs(layout.gradient_column_stride);
      for (auto& strides : layout.strides) {
        strides_fit = strides_fit && std::all_of(strides.begin(), strides.end(), whole_runs);
      }
    }
    // Scales are read one by one.
    size_t remainders = formats.has_remainder();
    return strides_fit &&
           std::all_of(in, in + AdamUpdate::kFirstExtraInput + remainders, aligned) &&
           std::all_of(out, out + AdamUpdate::kFirstExtraOutput + remainders, aligned);
  }

  bool needs_64_bits() const {
    auto span = [&](const Axes& strides) {
      int64_t sum = 0;
      for (size_t axis = 0; axis < strides.size(); ++axis) {
        sum += (layout.shape[axis] - 1) * std::abs(strides[axis]);
      }
      return sum;
    };
    return std::any_of(std::begin(layout.strides), std::end(layout.strides), [&](auto& strides) {
      return span(strides) > std::numeric_limits<int32_t>::max();
    });
  }
};

// The kernels of one node, all of whose tensors share their formats and so one compiled library.
class Kernels {
 public:
  Kernels(mx::Stream stream, const char* rule, const TensorFormats& formats)
      : device_(mx::metal::device(stream.device)), has_extras_(extra_count(formats) > 0) {
    variant_ = rule;
    for (auto format : {formats.parameter, formats.gradient, formats.m}) {
      variant_ += std::string(", ") + metal_type(format);
    }
  }

  // Compiles what is not compiled yet; `use` may follow.
  void fetch(Kernel kernel) {
    pipelines_[kernel] = metal_kernel(
        device_, "fused_adam<" + variant_ + ">", [&] { return source(); }, kKernelNames[kernel],
        "AdamUpdate", kThreads);
  }

  MTL::ComputePipelineState* use(Kernel kernel) const { return pipelines_[kernel]; }

 private:
  std::string source() const {
    std::ostringstream text;
    text << kAdamShader;
    auto instantiate = [&](Kernel kernel, const char* of, const char* index) {
      auto instance = std::string(of) + "<" + variant_ + index + ">";
      text << "template [[host_name(\"" << kKernelNames[kernel] << "\")]] [[kernel]] decltype("
           << instance << ") " << instance << ";\n";
    };
    instantiate(kLinear, "adam_linear", "");
    if (!has_extras_) instantiate(kGroup, "adam_group", "");
    instantiate(kTiled, "adam_tiled", "");
    instantiate(kGeneral32, "adam_general", ", int");
    instantiate(kGeneral64, "adam_general", ", int64_t");
    return text.str();
  }

  mx::metal::Device& device_;
  bool has_extras_;
  std::string variant_;
  MTL::ComputePipelineState* pipelines_[kKernels] = {};
};

// As layout_of has it; but rows of a single code, whose axis it would drop, keep all axes.
Layout layout_of_rows(const BoundTensor& t) {
  auto layout = layout_of(t.in[0], t.in[1], t.in[2], t.in[3], kSmallestTile, t.row() == t.size());
  if (layout.kind == LayoutKind::linear || t.row() > 1) return layout;
  layout = {LayoutKind::general};
  layout.shape.assign(t.parameter().shape().begin(), t.parameter().shape().end());
  for (size_t i = 0; i < std::size(layout.strides); ++i) {
    layout.strides[i].assign(t.in[i].strides().begin(), t.in[i].strides().end());
  }
  return layout;
}

// Encodes the dispatches of one node.
class Encoding {
 public:
  // Without a step, nothing is rounded stochastically, and the kernels do not read it.
  Encoding(mx::Stream stream, const Kernels& kernels, AdamConstants constants,
           const AdamRounding& rounding, const mx::array& scalars, const mx::array* step)
      : encoder_(mx::metal::get_command_encoder(stream)),
        kernels_(kernels),
        constants_(constants),
        rounding_{unsigned(rounding.parameter * kRoundParameter + rounding.m * kRoundM +
                           rounding.v * kRoundV),
                  unsigned(rounding.seed), unsigned(rounding.seed >> 32)},
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
      encoder_.set_bytes(
          LinearArgs{constants_, scalar_count(), rounding_, t.number, unsigned(start),
                     unsigned(piece), unsigned(std::min(row, piece)), t.vectors()},
          kArgs);
      bind(t, kFirstTensor, t.at(start));
      bind_extras(t, t.at(start));
      dispatch_threads(rows > 0 ? t.threads(piece / row, row) : t.threads(1, piece));
    }
  }

  void group(const std::vector<BoundTensor>& tensors) {
    GroupArgs args{constants_, scalar_count(), rounding_, {}, {}, {}, {}};
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
      bind(t, int(kFirstTensor + i * kBuffersPerTensor), t.at(0));
    }
    encoder_.set_bytes(args, kArgs);
    dispatch_threads(threads);
  }

  void tiled(const BoundTensor& t) {
    auto& layout = t.layout;
    // The matrix's own strides come last, as the kernel expects.
    auto parameter_strides = layout.strides[0];
    auto gradient_strides = layout.strides[1];
    parameter_strides.push_back(layout.row_stride);
    gradient_strides.push_back(layout.gradient_column_stride);
    if (t.formats.has_codes()) {
      // Then those in blocks: rows of so many columns follow each other in memory.
      int64_t blocks = divide_up(layout.columns, kBlockElements);
      for (size_t i = 0; i <= layout.shape.size(); ++i) {
        parameter_strides.push_back(parameter_strides[i] / layout.columns * blocks);
      }
    }
    use(kTiled);
    encoder_.set_bytes(
        TiledArgs{constants_, scalar_count(), rounding_, t.number, unsigned(layout.rows),
                  unsigned(layout.columns), unsigned(layout.shape.size()), t.vectors()},
        kArgs);
    bind(t, kFirstTensor, t.at(0));
    bind_extras(t, t.at(0));
    encoder_.set_vector_bytes(layout.shape, kShape);
    encoder_.set_vector_bytes(parameter_strides, kParameterStrides);
    encoder_.set_vector_bytes(gradient_strides, kGradientStrides);
    int64_t side = kTileRuns * t.run();
    encoder_.dispatch_threadgroups(
        MTL::Size(divide_up(layout.columns, side), divide_up(layout.rows, side), layout.batches()),
        MTL::Size(kThreads, 1, 1));
  }

  void general(const BoundTensor& t, Kernel kernel) {
    BoundTensor padded = t;
    while (padded.layout.shape.size() < 2) {
      padded.layout.shape.insert(padded.layout.shape.begin(), 1);
      for (auto& strides : padded.layout.strides) strides.insert(strides.begin(), 0);
    }
    general(padded, kernel, padded.layout.shape, t.at(0));
  }

 private:
  // Halves the outermost axis until the number of elements fits a dispatch.
  void general(const BoundTensor& t, Kernel kernel, Axes shape, Starts starts) {
    int64_t size = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
    int64_t columns = shape.back(), rows = size / columns;
    bool has_codes = t.formats.has_codes();
    int64_t x = has_codes ? t.threads(1, columns) : columns;
    auto& strides = t.layout.strides;
    if (rows * std::max(x, columns) > kLargestDispatch) {
      size_t axis =
          std::find_if(shape.begin(), shape.end(), [](auto n) { return n > 1; }) - shape.begin();
      int64_t length = shape[axis], half = length / 2;
      if (has_codes && axis + 1 == shape.size()) half -= half % kBlockElements;
      shape[axis] = half;
      general(t, kernel, shape, starts);
      for (size_t i = 0; i < AdamUpdate::kFirstExtraInput; ++i) {
        starts.in[i] += half * strides[i][axis];
      }
      starts.out += size / length * half;
      starts.scale = t.scale(starts.out);
      shape[axis] = length - half;
      return general(t, kernel, shape, starts);
    }
    use(kernel);
    encoder_.set_bytes(GeneralArgs{constants_, scalar_count(), rounding_, t.number,
                                   unsigned(starts.out), unsigned(shape.size())},
                       kArgs);
    bind(t, kFirstTensor, starts);
    bind_extras(t, starts);
    encoder_.set_vector_bytes(shape, kShape);
    int strides_index = kParameterStrides;
    for (auto& axes : strides) encoder_.set_vector_bytes(axes, strides_index++);
    int64_t y = *(shape.end() - 2), z = rows / y;
    int64_t group_x = std::min<int64_t>(x, kThreads);
    int64_t group_y = std::min(y, kThreads / group_x);
    int64_t group_z = std::min(z, kThreads / (group_x * group_y));
    encoder_.dispatch_threads(MTL::Size(x, y, z), MTL::Size(group_x, group_y, group_z));
  }

  unsigned scalar_count() const { return unsigned(scalars_.size()); }

  void use(Kernel kernel) {
    encoder_.set_compute_pipeline_state(kernels_.use(kernel));
    encoder_.set_input_array(scalars_, kScalars);
    encoder_.set_input_array(step_, kStep);
  }

  void bind(const BoundTensor& t, int index, const Starts& starts) {
    for (size_t i = 0; i < AdamUpdate::kFirstExtraInput; ++i) {
      read(t.in[i], index++, starts.in[i]);
    }
    for (size_t i = 0; i < AdamUpdate::kFirstExtraOutput; ++i) {
      write(t.out[i], index++, starts.out);
    }
  }

  // Every buffer of a kernel must be bound: those that the formats have no use for, to the scalars.
  void bind_extras(const BoundTensor& t, const Starts& starts) {
    auto in = t.in + AdamUpdate::kFirstExtraInput;
    auto out = t.out + AdamUpdate::kFirstExtraOutput;
    if (t.formats.has_remainder()) {
      read(*in++, kRemainder, starts.out);
      write(*out++, kNewRemainder, starts.out);
    } else {
      for (int unused : {kRemainder, kNewRemainder}) read(scalars_, unused, 0);
    }
    if (t.formats.has_codes()) {
      read(in[0], kMScale, starts.scale);
      read(in[1], kVScale, starts.scale);
      write(out[0], kNewMScale, starts.scale);
      write(out[1], kNewVScale, starts.scale);
    } else {
      for (int unused : {kMScale, kVScale, kNewMScale, kNewVScale}) read(scalars_, unused, 0);
    }
  }

  void read(const mx::array& x, int index, int64_t start) {
    encoder_.set_input_array(x, index, start * int64_t(x.itemsize()));
  }
  void write(mx::array& x, int index, int64_t start) {
    encoder_.set_output_array(x, index, start * int64_t(x.itemsize()));
  }

  void dispatch_threads(int64_t count) {
    encoder_.dispatch_threads(MTL::Size(count, 1, 1),
                              MTL::Size(std::min<int64_t>(count, kThreads), 1, 1));
  }

  mx::metal::CommandEncoder& encoder_;
  const Kernels& kernels_;
  AdamConstants constants_;
  RoundingArgs rounding_;
  const mx::array& scalars_;
  const mx::array& step_;
};

}  // namespace

void AdamUpdate::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  check_layouts(inputs);
  std::vector<BoundTensor> row_major, tiled, general;
  for (size_t i = 0; i < outputs.size() / outputs_per_tensor(); ++i) {
    auto in = &inputs[common_inputs() + i * inputs_per_tensor()];
    BoundTensor t{
        in, &outputs[i * outputs_per_tensor()], formats_, {}, rounding_.any() ? numbers_[i] : 0};
    if (t.size() == 0) continue;
    t.layout = layout_of_rows(t);
    auto kind = t.layout.kind;
    auto& list = kind == LayoutKind::linear  ? row_major
                 : kind == LayoutKind::tiled ? tiled
                                             : general;
    list.push_back(std::move(t));
  }
  auto general_kernel = [&](const BoundTensor& t) {
    return wide_indices_ || t.needs_64_bits() ? kGeneral64 : kGeneral32;
  };
  bool is_group = row_major.size() > 1 && extra_count(formats_) == 0;

  // Every kernel before any buffer changes hands: a GPU that lacks one leaves parameters and state as they were.
  Kernels kernels(stream(), rule_ == UpdateRule::adam ? "AdamRule" : "TrafficRule", formats_);
  if (!row_major.empty()) kernels.fetch(is_group ? kGroup : kLinear);
  if (!tiled.empty()) kernels.fetch(kTiled);
  for (auto& t : general) kernels.fetch(general_kernel(t));

  SoleInputs sole_inputs(inputs, outputs);
  for (size_t i = 0; i < outputs.size() / outputs_per_tensor(); ++i) {
    allocate_outputs(&inputs[common_inputs() + i * inputs_per_tensor()],
                     &outputs[i * outputs_per_tensor()], extra_count(formats_));
  }
  Encoding encoding(stream(), kernels, constants_, rounding_, inputs[0],
                    rounding_.any() ? &inputs[1] : nullptr);
  if (is_group) {
    encoding.group(row_major);
  } else {
    for (auto& t : row_major) encoding.linear(t);
  }
  for (auto& t : tiled) encoding.tiled(t);
  for (auto& t : general) encoding.general(t, general_kernel(t));
  count_updates(stream(), outputs.size() / outputs_per_tensor());
  sole_inputs.commit();
}

Backend gpu_backend() { return {"metal", nullptr, kGroupTensors}; }

}  // namespace fused_adam
