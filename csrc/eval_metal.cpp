// The Metal back end: which kernel, which buffers, which grid; no arithmetic. The kernels are metal/adam.metal, compiled
// from the embedded text at first use, since command line tools lack an offline Metal compiler.
#include <algorithm>
#include <cstdlib>
#include <functional>
#include <limits>
#include <numeric>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "adam_args.h"
#include "adam_shader.h"
#include "adam_update.h"
#include "in_place.h"
#include "layout.h"
#include "mlx/backend/metal/device.h"
#include "storage.h"

namespace fused_adam {

namespace mx = mlx::core;

namespace {

// Elements of one dispatch of adam_linear or adam_general, so that what counts them fits 32 bits and pieces stay aligned.
constexpr int64_t kLargestDispatch = int64_t{1} << 30;

// Half a tile of float32: below, most threads of adam_tiled idle, and the caches serve adam_general's reads as well.
constexpr TileSides kSmallestTile{16, 16};

// By Format.
constexpr const char* kMetalTypes[kFormatCount] = {"float", "bfloat", "half"};

enum Kernel { kLinear, kGroup, kTiled, kGeneral32, kGeneral64, kKernels };
constexpr const char* kKernelNames[] = {"adam_linear", "adam_group", "adam_tiled",
                                        "adam_general_32", "adam_general_64"};

using Axes = std::vector<int64_t>;

// Where a dispatch begins in each array, in elements.
struct Starts {
  int64_t in[AdamUpdate::kInputsPerTensor];
  int64_t out;

  static Starts all(int64_t start) { return {{start, start, start, start}, start}; }
};

struct BoundTensor {
  const mx::array* in;  // parameter, gradient, m, v
  mx::array* out;       // parameter, m, v
  Layout layout;
  uint32_t number;

  const mx::array& parameter() const { return in[0]; }
  const mx::array& gradient() const { return in[1]; }
  const mx::array& m() const { return in[2]; }
  int64_t size() const { return int64_t(parameter().size()); }

  // Elements that a thread updates.
  int64_t run() const {
    return kRunBytes /
           int64_t(std::min({parameter().itemsize(), gradient().itemsize(), m().itemsize()}));
  }

  // Whether kRunBytes may be loaded and stored at once wherever a run begins.
  bool vectors() const {
    auto aligned = [](const mx::array& x) { return x.offset() % kRunBytes == 0; };
    auto whole_runs = [&](int64_t stride) { return stride % run() == 0; };
    bool strides_fit = true;
    if (layout.kind == LayoutKind::tiled) {
      strides_fit = whole_runs(layout.row_stride) && whole_runs(layout.gradient_column_stride);
      for (auto& strides : layout.strides) {
        strides_fit = strides_fit && std::all_of(strides.begin(), strides.end(), whole_runs);
      }
    }
    return strides_fit && std::all_of(in, in + AdamUpdate::kInputsPerTensor, aligned) &&
           std::all_of(out, out + AdamUpdate::kOutputsPerTensor, aligned);
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

// The kernels of one node, all of whose tensors share their dtypes and so one compiled library.
class Kernels {
 public:
  Kernels(mx::Stream stream, const char* rule, const BoundTensor& any)
      : device_(mx::metal::device(stream.device)) {
    std::ostringstream variant;
    variant << rule;
    for (auto& x : {any.parameter(), any.gradient(), any.m()})
      variant << ", " << kMetalTypes[int(format_of(x.dtype()))];
    variant_ = variant.str();
  }

  // Compiles what is not compiled yet; `use` may follow.
  void fetch(Kernel kernel) {
    try {
      auto library = device_.get_library("fused_adam<" + variant_ + ">", [&] { return source(); });
      pipelines_[kernel] = device_.get_kernel(kKernelNames[kernel], library);
      if (pipelines_[kernel]->maxTotalThreadsPerThreadgroup() < kThreads) {
        throw std::runtime_error("this GPU runs too few of its threads together");
      }
    } catch (const std::exception& error) {
      throw std::runtime_error("[AdamUpdate] Metal kernel " + std::string(kKernelNames[kernel]) +
                               "<" + variant_ + "> must compile and load but got: " + error.what() +
                               "\nNothing was updated. MLX_FUSED_ADAM_BACKEND=stock does without");
    }
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
    instantiate(kGroup, "adam_group", "");
    instantiate(kTiled, "adam_tiled", "");
    instantiate(kGeneral32, "adam_general", ", int");
    instantiate(kGeneral64, "adam_general", ", int64_t");
    return text.str();
  }

  mx::metal::Device& device_;
  std::string variant_;
  MTL::ComputePipelineState* pipelines_[kKernels] = {};
};

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
    for (int64_t start = 0; start < t.size(); start += kLargestDispatch) {
      int64_t size = std::min(kLargestDispatch, t.size() - start);
      use(kLinear);
      encoder_.set_bytes(LinearArgs{constants_, scalar_count(), rounding_, t.number,
                                    unsigned(start), unsigned(size), t.vectors()},
                         kArgs);
      bind(t, kFirstTensor, Starts::all(start));
      dispatch_threads(divide_up(size, t.run()));
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
      bind(t, int(kFirstTensor + i * kBuffersPerTensor), Starts::all(0));
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
    use(kTiled);
    encoder_.set_bytes(
        TiledArgs{constants_, scalar_count(), rounding_, t.number, unsigned(layout.rows),
                  unsigned(layout.columns), unsigned(layout.shape.size()), t.vectors()},
        kArgs);
    bind(t, kFirstTensor, Starts::all(0));
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
    general(padded, kernel, padded.layout.shape, Starts::all(0));
  }

 private:
  // Halves the outermost axis until the number of elements fits a dispatch.
  void general(const BoundTensor& t, Kernel kernel, Axes shape, Starts starts) {
    int64_t size = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
    auto& strides = t.layout.strides;
    if (size > kLargestDispatch) {
      size_t axis =
          std::find_if(shape.begin(), shape.end(), [](auto n) { return n > 1; }) - shape.begin();
      int64_t length = shape[axis], half = length / 2;
      shape[axis] = half;
      general(t, kernel, shape, starts);
      for (size_t i = 0; i < AdamUpdate::kInputsPerTensor; ++i) {
        starts.in[i] += half * strides[i][axis];
      }
      starts.out += size / length * half;
      shape[axis] = length - half;
      return general(t, kernel, shape, starts);
    }
    use(kernel);
    encoder_.set_bytes(GeneralArgs{constants_, scalar_count(), rounding_, t.number,
                                   unsigned(starts.out), unsigned(shape.size())},
                       kArgs);
    bind(t, kFirstTensor, starts);
    encoder_.set_vector_bytes(shape, kShape);
    int strides_index = kParameterStrides;
    for (auto& axes : strides) encoder_.set_vector_bytes(axes, strides_index++);
    int64_t x = shape.back(), y = *(shape.end() - 2), z = size / (x * y);
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

  void bind(const BoundTensor& t, int index, Starts starts) {
    for (size_t i = 0; i < AdamUpdate::kInputsPerTensor; ++i) {
      encoder_.set_input_array(t.in[i], index++, starts.in[i] * int64_t(t.in[i].itemsize()));
    }
    for (size_t i = 0; i < AdamUpdate::kOutputsPerTensor; ++i) {
      encoder_.set_output_array(t.out[i], index++, starts.out * int64_t(t.out[i].itemsize()));
    }
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
  std::vector<BoundTensor> row_major, tiled, general;
  for (size_t i = 0; i < outputs.size() / kOutputsPerTensor; ++i) {
    auto in = &inputs[common_inputs() + i * kInputsPerTensor];
    BoundTensor t{in, &outputs[i * kOutputsPerTensor],
                  layout_of(in[0], in[1], in[2], in[3], kSmallestTile),
                  rounding_.any() ? numbers_[i] : 0};
    if (t.size() == 0) continue;
    auto kind = t.layout.kind;
    auto& list = kind == LayoutKind::linear  ? row_major
                 : kind == LayoutKind::tiled ? tiled
                                             : general;
    list.push_back(std::move(t));
  }
  auto general_kernel = [&](const BoundTensor& t) {
    return wide_indices_ || t.needs_64_bits() ? kGeneral64 : kGeneral32;
  };

  // Every kernel before any buffer changes hands: a GPU that lacks one leaves parameters and state as they were.
  Kernels kernels(stream(), rule_ == UpdateRule::adam ? "AdamRule" : "TrafficRule",
                  BoundTensor{&inputs[common_inputs()], &outputs[0], {}, 0});
  if (!row_major.empty()) kernels.fetch(row_major.size() == 1 ? kLinear : kGroup);
  if (!tiled.empty()) kernels.fetch(kTiled);
  for (auto& t : general) kernels.fetch(general_kernel(t));

  SoleInputs sole_inputs(inputs, outputs);
  for (size_t i = 0; i < outputs.size() / kOutputsPerTensor; ++i) {
    allocate_outputs(&inputs[common_inputs() + i * kInputsPerTensor],
                     &outputs[i * kOutputsPerTensor]);
  }
  Encoding encoding(stream(), kernels, constants_, rounding_, inputs[0],
                    rounding_.any() ? &inputs[1] : nullptr);
  if (row_major.size() == 1) encoding.linear(row_major[0]);
  if (row_major.size() > 1) encoding.group(row_major);
  for (auto& t : tiled) encoding.tiled(t);
  for (auto& t : general) encoding.general(t, general_kernel(t));
  sole_inputs.commit();
}

Backend gpu_backend() { return {"metal", nullptr, kGroupTensors}; }

}  // namespace fused_adam
