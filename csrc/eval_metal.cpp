// The Metal back end: which kernel, which buffers, which grid; no arithmetic. The kernels are metal/adam.metal, compiled
// from the embedded text at first use, since command line tools lack an offline Metal compiler.
#include <algorithm>
#include <cstdlib>
#include <limits>
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

static_assert(kThreads == kTile * kTileThreadRows, "every kernel uses threadgroups of one size");

namespace {

// Elements of one dispatch of adam_linear: all its indices then fit 32 bits, and pieces stay aligned.
constexpr size_t kLargestLinear = size_t{1} << 30;

// Half a tile of float32: below, most threads of adam_tiled idle, and the caches serve adam_general's reads as well.
constexpr TileSides kSmallestTile{16, 16};

// By Storage.
constexpr const char* kMetalTypes[kStorageCount] = {"float", "bfloat", "half"};

struct BoundTensor {
  const mx::array* in;  // parameter, gradient, m, v
  mx::array* out;       // parameter, m, v
  Layout layout;

  const mx::array& parameter() const { return in[0]; }
  const mx::array& gradient() const { return in[1]; }
  const mx::array& m() const { return in[2]; }
  size_t size() const { return parameter().size(); }

  // Whether kElementsPerThread elements may be loaded and stored at once.
  bool vectors() const {
    auto aligned = [](const mx::array& x) {
      return x.offset() % int64_t(kElementsPerThread * x.itemsize()) == 0;
    };
    return std::all_of(in, in + AdamUpdate::kInputsPerTensor, aligned) &&
           std::all_of(out, out + AdamUpdate::kOutputsPerTensor, aligned);
  }
};

// Encodes the dispatches of one node, all of whose tensors share their dtypes and so one compiled library.
class Encoding {
 public:
  Encoding(mx::Stream stream, const char* rule, AdamConstants constants, const mx::array& scalars,
           const BoundTensor& any, bool wide_indices)
      : device_(mx::metal::device(stream.device)),
        encoder_(mx::metal::get_command_encoder(stream)),
        constants_(constants),
        scalars_(scalars),
        wide_indices_(wide_indices) {
    std::ostringstream variant;
    variant << rule;
    for (auto& x : {any.parameter(), any.gradient(), any.m()})
      variant << ", " << kMetalTypes[int(storage_of(x.dtype()))];
    variant_ = variant.str();
    library_ = device_.get_library("fused_adam<" + variant_ + ">", [&] { return source(); });
  }

  void linear(const BoundTensor& t) {
    for (size_t start = 0; start < t.size(); start += kLargestLinear) {
      size_t size = std::min(kLargestLinear, t.size() - start);
      use("adam_linear");
      encoder_.set_bytes(LinearArgs{constants_, scalar_count(), unsigned(size), t.vectors()},
                         kArgs);
      bind(t, kFirstTensor, start);
      dispatch_threads(divide_up(size, kElementsPerThread), 1);
    }
  }

  void group(const std::vector<BoundTensor>& tensors) {
    GroupArgs args{constants_, scalar_count(), {}, {}, {}};
    use("adam_group");
    unsigned threads = 0;
    for (size_t i = 0; i < kGroupTensors; ++i) {
      // A slot without a tensor has no threads, but every buffer of the kernel must be bound.
      bool is_used = i < tensors.size();
      auto& t = tensors[is_used ? i : 0];
      args.sizes[i] = is_used ? unsigned(t.size()) : 0;
      args.vectors[i] = t.vectors();
      threads += divide_up(args.sizes[i], kElementsPerThread);
      args.thread_ends[i] = threads;
      bind(t, int(kFirstTensor + i * kBuffersPerTensor), 0);
    }
    encoder_.set_bytes(args, kArgs);
    dispatch_threads(threads, 1);
  }

  void tiled(const BoundTensor& t) {
    auto& layout = t.layout;
    // One axis at least, and the matrix's own strides last, as the kernel expects.
    auto shape = layout.shape;
    auto parameter_strides = layout.strides[0];
    auto gradient_strides = layout.strides[1];
    if (shape.empty()) {
      shape = {1};
      parameter_strides = gradient_strides = {0};
    }
    parameter_strides.push_back(layout.row_stride);
    gradient_strides.push_back(layout.gradient_column_stride);
    use("adam_tiled");
    encoder_.set_bytes(TiledArgs{constants_, scalar_count(), unsigned(layout.rows),
                                 unsigned(layout.columns), unsigned(shape.size())},
                       kArgs);
    bind(t, kFirstTensor, 0);
    encoder_.set_vector_bytes(shape, kShape);
    encoder_.set_vector_bytes(parameter_strides, kParameterStrides);
    encoder_.set_vector_bytes(gradient_strides, kGradientStrides);
    encoder_.dispatch_threadgroups(MTL::Size(divide_up(layout.columns, kTile),
                                             divide_up(layout.rows, kTile), layout.batches()),
                                   MTL::Size(kTile, kTileThreadRows, 1));
  }

  void general(const BoundTensor& t) {
    auto& layout = t.layout;
    use(wide_indices_ || needs_64_bits(t) ? "adam_general_64" : "adam_general_32");
    encoder_.set_bytes(GeneralArgs{constants_, scalar_count(), unsigned(layout.shape.size())},
                       kArgs);
    bind(t, kFirstTensor, 0);
    encoder_.set_vector_bytes(layout.shape, kShape);
    int strides_index = kParameterStrides;
    for (auto& strides : layout.strides) encoder_.set_vector_bytes(strides, strides_index++);
    dispatch_threads(std::min<size_t>(t.size(), kGeneralWidth), divide_up(t.size(), kGeneralWidth));
  }

 private:
  std::string source() const {
    std::ostringstream text;
    text << kAdamShader;
    auto instantiate = [&](const std::string& name, const std::string& kernel) {
      text << "template [[host_name(\"" << name << "\")]] [[kernel]] decltype(" << kernel << ") "
           << kernel << ";\n";
    };
    for (std::string name : {"adam_linear", "adam_group", "adam_tiled"}) {
      instantiate(name, name + "<" + variant_ + ">");
    }
    instantiate("adam_general_32", "adam_general<" + variant_ + ", int>");
    instantiate("adam_general_64", "adam_general<" + variant_ + ", int64_t>");
    return text.str();
  }

  static bool needs_64_bits(const BoundTensor& t) {
    int64_t furthest = int64_t(divide_up(t.size(), kGeneralWidth)) * kGeneralWidth;
    for (auto& strides : t.layout.strides) {
      int64_t span = 0;
      for (size_t axis = 0; axis < strides.size(); ++axis) {
        span += (t.layout.shape[axis] - 1) * std::abs(strides[axis]);
      }
      furthest = std::max(furthest, span);
    }
    return furthest > std::numeric_limits<int32_t>::max();
  }

  unsigned scalar_count() const { return unsigned(scalars_.size()); }

  void use(const char* kernel_name) {
    auto kernel = device_.get_kernel(kernel_name, library_);
    if (kernel->maxTotalThreadsPerThreadgroup() < kThreads) {
      throw std::runtime_error("[AdamUpdate] this GPU runs too few threads of " +
                               std::string(kernel_name) + " together");
    }
    encoder_.set_compute_pipeline_state(kernel);
    encoder_.set_input_array(scalars_, kScalars);
  }

  // Binds a tensor's arrays from element `start` on.
  void bind(const BoundTensor& t, int index, size_t start) {
    for (size_t i = 0; i < AdamUpdate::kInputsPerTensor; ++i) {
      encoder_.set_input_array(t.in[i], index++, int64_t(start * t.in[i].itemsize()));
    }
    for (size_t i = 0; i < AdamUpdate::kOutputsPerTensor; ++i) {
      encoder_.set_output_array(t.out[i], index++, int64_t(start * t.out[i].itemsize()));
    }
  }

  void dispatch_threads(size_t width, size_t height) {
    encoder_.dispatch_threads(MTL::Size(width, height, 1),
                              MTL::Size(std::min<size_t>(width, kThreads), 1, 1));
  }

  mx::metal::Device& device_;
  mx::metal::CommandEncoder& encoder_;
  AdamConstants constants_;
  const mx::array& scalars_;
  bool wide_indices_;
  std::string variant_;
  MTL::Library* library_;
};

}  // namespace

void AdamUpdate::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  SoleInputs sole_inputs(inputs, outputs);
  std::vector<BoundTensor> row_major, others;
  for (size_t i = 0; i < outputs.size() / kOutputsPerTensor; ++i) {
    auto in = &inputs[1 + i * kInputsPerTensor];
    auto out = &outputs[i * kOutputsPerTensor];
    BoundTensor t{in, out, layout_of(in[0], in[1], in[2], in[3], kSmallestTile)};
    allocate_outputs(in, out);
    if (t.size() == 0) continue;
    (t.layout.kind == LayoutKind::linear ? row_major : others).push_back(std::move(t));
  }
  if (row_major.empty() && others.empty()) return sole_inputs.commit();

  Encoding encoding(stream(), rule_ == UpdateRule::adam ? "AdamRule" : "TrafficRule", constants_,
                    inputs[0], row_major.empty() ? others[0] : row_major[0], wide_indices_);
  if (row_major.size() == 1) encoding.linear(row_major[0]);
  if (row_major.size() > 1) encoding.group(row_major);
  for (auto& t : others) {
    t.layout.kind == LayoutKind::tiled ? encoding.tiled(t) : encoding.general(t);
  }
  sole_inputs.commit();
}

Backend gpu_backend() { return {"metal", nullptr, kGroupTensors}; }

}  // namespace fused_adam
