// The sum of squares on Metal: which kernels of metal/grad_norm.metal, which buffers, which grid.
#include "op/grad_norm.h"

#include <algorithm>
#include <cstdlib>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "adam_args.h"
#include "grad_norm_args.h"
#include "metal/library.h"
#include "metal/shaders.h"
#include "mlx/backend/metal/device.h"
#include "op/allocate.h"
#include "op/formats.h"
#include "op/layout.h"

namespace fused_adam {

namespace mx = mlx::core;

namespace {

// Elements of a piece of a gradient, so that what counts them fits 32 bits; whole spans and vectors.
constexpr int64_t kLargestPiece = int64_t{1} << 30;

const char* metal_type(mx::Dtype dtype) {
  return dtype == mx::float32 ? "float" : dtype == mx::bfloat16 ? "bfloat" : "half";
}

using Axes = std::vector<int64_t>;

struct Piece {
  const mx::array* gradient;
  int64_t start;  // in elements
  int64_t size;
  Axes shape = {};  // of a piece that is not dense
  Axes strides = {};

  int64_t partials() const { return divide_up(size, kNormSpan); }
};

void add_dense(const mx::array& gradient, std::vector<Piece>& pieces) {
  int64_t size = gradient.size();
  for (int64_t start = 0; start < size; start += kLargestPiece) {
    pieces.push_back({&gradient, start, std::min(kLargestPiece, size - start)});
  }
}

// Halves the outermost axis until the number of elements fits.
void add_general(const mx::array& gradient, int64_t start, Axes shape, const Axes& strides,
                 std::vector<Piece>& pieces) {
  int64_t size = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  if (size <= kLargestPiece) {
    pieces.push_back({&gradient, start, size, std::move(shape), strides});
    return;
  }
  size_t axis =
      std::find_if(shape.begin(), shape.end(), [](auto n) { return n > 1; }) - shape.begin();
  int64_t length = shape[axis], half = length / 2;
  shape[axis] = half;
  add_general(gradient, start, shape, strides, pieces);
  shape[axis] = length - half;
  add_general(gradient, start + half * strides[axis], shape, strides, pieces);
}

// The kernels for gradients of one dtype.
struct Kernels {
  MTL::ComputePipelineState* dense;
  MTL::ComputePipelineState* general;
  MTL::ComputePipelineState* total;

  Kernels(mx::metal::Device& device, mx::Dtype dtype) {
    std::string type = metal_type(dtype);
    auto source = [&] {
      std::string text = kGradNormShader;
      for (std::string name : {"norm_dense", "norm_general"}) {
        auto instance = name + "<" + type + ">";
        text += "template [[host_name(\"" + name + "\")]] [[kernel]] decltype(" + instance + ") " +
                instance + ";\n";
      }
      return text;
    };
    auto get = [&](const char* name) {
      return metal_kernel(device, "fused_adam_norm<" + type + ">", source, name, "SumOfSquares",
                          kNormThreads);
    };
    dense = get("norm_dense");
    general = get("norm_general");
    total = get("norm_total");
  }
};

class Encoding {
 public:
  Encoding(mx::metal::CommandEncoder& encoder, mx::array& partials)
      : encoder_(encoder), partials_(partials) {}

  // At most kNormGradients, of one dtype.
  void dense(const std::vector<Piece>& pieces, const Kernels& kernels) {
    NormDenseArgs args{};
    int64_t groups = 0;
    encoder_.set_compute_pipeline_state(kernels.dense);
    for (size_t i = 0; i < kNormGradients; ++i) {
      // A slot without a gradient has no threadgroups, but every buffer of the kernel must be bound.
      bool is_used = i < pieces.size();
      auto& piece = pieces[is_used ? i : 0];
      int64_t offset = piece.start * int64_t(piece.gradient->itemsize());
      args.sizes[i] = is_used ? unsigned(piece.size) : 0;
      args.vectors[i] = (piece.gradient->offset() + offset) % kRunBytes == 0;
      groups += is_used ? piece.partials() : 0;
      args.group_ends[i] = unsigned(groups);
      encoder_.set_input_array(*piece.gradient, int(kFirstGradient + i), offset);
    }
    encoder_.set_bytes(args, kNormArgs);
    dispatch(groups);
  }

  void general(const Piece& piece, const Kernels& kernels) {
    encoder_.set_compute_pipeline_state(kernels.general);
    encoder_.set_bytes(NormGeneralArgs{unsigned(piece.size), unsigned(piece.shape.size())},
                       kNormArgs);
    encoder_.set_input_array(*piece.gradient, kNormGradient,
                             piece.start * int64_t(piece.gradient->itemsize()));
    encoder_.set_vector_bytes(piece.shape, kNormShape);
    encoder_.set_vector_bytes(piece.strides, kNormStrides);
    dispatch(piece.partials());
  }

  void total(mx::array& sum, const Kernels& kernels) {
    encoder_.set_compute_pipeline_state(kernels.total);
    encoder_.set_bytes(NormTotalArgs{unsigned(next_)}, kNormArgs);
    encoder_.set_input_array(partials_, kNormPartials);
    encoder_.set_output_array(sum, kNormTotal);
    encoder_.dispatch_threadgroups(MTL::Size(1, 1, 1), MTL::Size(kNormThreads, 1, 1));
  }

 private:
  // Each threadgroup writes the next of the partial sums.
  void dispatch(int64_t groups) {
    mx::array written({int(groups)}, mx::float32, nullptr, {});
    written.copy_shared_buffer(partials_, {1}, partials_.flags(), groups, next_);
    encoder_.set_output_array(written, kNormPartials);
    encoder_.dispatch_threadgroups(MTL::Size(groups, 1, 1), MTL::Size(kNormThreads, 1, 1));
    next_ += groups;
  }

  mx::metal::CommandEncoder& encoder_;
  mx::array& partials_;
  int64_t next_ = 0;
};

}  // namespace

void SumOfSquares::eval_gpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  struct Group {
    Kernels kernels;
    std::vector<Piece> dense;
    std::vector<Piece> general;
  };
  auto& device = mx::metal::device(stream().device);
  std::map<mx::Dtype::Val, Group> groups;
  for (auto& gradient : inputs) {
    auto dtype = gradient.dtype();
    auto entry = groups.find(dtype.val());
    if (entry == groups.end()) {
      entry = groups.try_emplace(dtype.val(), Group{Kernels(device, dtype), {}, {}}).first;
    }
    if (gradient.size() == 0) continue;
    auto layout = layout_of_one(gradient);
    if (layout.kind == LayoutKind::linear) {
      add_dense(gradient, entry->second.dense);
    } else {
      add_general(gradient, 0, layout.shape, layout.strides[0], entry->second.general);
    }
  }
  int64_t count = 0;
  for (auto& [_, group] : groups) {
    for (auto* pieces : {&group.dense, &group.general}) {
      for (auto& piece : *pieces) count += piece.partials();
    }
  }
  auto& sum = outputs[0];
  allocate(sum);
  // Of one element at least, since every buffer of a kernel must be bound.
  mx::array partials({int(std::max<int64_t>(count, 1))}, mx::float32, nullptr, {});
  allocate(partials);
  auto& encoder = mx::metal::get_command_encoder(stream());
  encoder.add_temporary(partials);
  Encoding encoding(encoder, partials);
  {
    // Each dispatch writes sums of its own, so none waits for another.
    auto concurrent = encoder.start_concurrent();
    for (auto& [_, group] : groups) {
      for (size_t i = 0; i < group.dense.size(); i += kNormGradients) {
        auto end = group.dense.begin() + std::min(i + kNormGradients, group.dense.size());
        encoding.dense({group.dense.begin() + i, end}, group.kernels);
      }
      for (auto& piece : group.general) encoding.general(piece, group.kernels);
    }
  }
  encoding.total(sum, groups.begin()->second.kernels);
}

}  // namespace fused_adam
