// The sum of squares on Metal: which kernels of metal/grad_norm.metal, which buffers, which grid.
#include "op/grad_norm.h"

#include <algorithm>
#include <map>
#include <span>
#include <vector>

#include "adam_args.h"
#include "grad_norm_args.h"
#include "metal/library.h"
#include "metal/pieces.h"
#include "metal/shaders.h"
#include "mlx/backend/metal/device.h"
#include "op/allocate.h"
#include "op/formats.h"
#include "op/layout.h"

namespace fused_adam {

namespace mx = mlx::core;

namespace {

#ifndef FUSED_ADAM_LARGEST_NORM_PIECE  // smaller in tests
#define FUSED_ADAM_LARGEST_NORM_PIECE (int64_t{1} << 30)
#endif

// Elements of a piece of a gradient, so that what counts them fits 32 bits; whole spans and vectors.
constexpr int64_t kLargestPiece = FUSED_ADAM_LARGEST_NORM_PIECE;

enum Kernel { kDense, kGeneral, kTotal };
constexpr ShaderKernel kShaderKernels[] = {{"norm_dense"}, {"norm_general"}, {"norm_total", false}};

struct GradientPiece {
  const mx::array* gradient;
  int64_t start;  // in elements
  int64_t size;
  Axes shape = {};  // unless it is dense
  Axes strides = {};

  int64_t start_bytes() const { return start * int64_t(gradient->itemsize()); }
  int64_t partials() const { return divide_up(size, kNormSpan); }
};

// All of one dtype.
struct Gradients {
  ShaderLibrary library;
  std::vector<GradientPiece> dense = {};
  std::vector<GradientPiece> general = {};

  void add(const mx::array& gradient) {
    auto layout = layout_of_one(gradient);
    if (layout.kind == LayoutKind::linear) {
      int64_t size = gradient.size();
      for (int64_t start = 0; start < size; start += kLargestPiece) {
        dense.push_back({&gradient, start, std::min(kLargestPiece, size - start)});
      }
    } else {
      auto& strides = layout.strides[0];
      auto fits = [](const Axes& shape) { return size_of(shape) <= kLargestPiece; };
      for (auto& piece : pieces_of(layout.shape, 1, fits)) {
        general.push_back({&gradient, offset_of(piece.start, strides), size_of(piece.shape), piece.shape, strides});
      }
    }
    library.kernel(layout.kind == LayoutKind::linear ? kDense : kGeneral);
  }

  int64_t partials() const {
    int64_t count = 0;
    for (auto* pieces : {&dense, &general}) {
      for (auto& piece : *pieces) count += piece.partials();
    }
    return count;
  }
};

using GradientsByDtype = std::map<mx::Dtype::Val, Gradients>;

class NormEncoder {
 public:
  NormEncoder(mx::metal::CommandEncoder& encoder, mx::array& partials) : encoder_(encoder), partials_(partials) {}

  // Each dispatch writes partial sums of its own, so none waits for another.
  void partials(GradientsByDtype& by_dtype) {
    auto concurrent = encoder_.start_concurrent();
    for (auto& [_, gradients] : by_dtype) {
      for (size_t i = 0; i < gradients.dense.size(); i += kNormGradients) {
        dense(std::span(gradients.dense).subspan(i), gradients.library);
      }
      for (auto& piece : gradients.general) general(piece, gradients.library);
    }
  }

  void total(mx::array& sum, ShaderLibrary& library) {
    encoder_.set_compute_pipeline_state(library.kernel(kTotal));
    encoder_.set_bytes(NormTotalArgs{unsigned(next_)}, kNormArgs);
    encoder_.set_input_array(partials_, kNormPartials);
    encoder_.set_output_array(sum, kNormTotal);
    encoder_.dispatch_threadgroups(MTL::Size(1, 1, 1), MTL::Size(kNormThreads, 1, 1));
  }

 private:
  // The first kNormGradients of the pieces.
  void dense(std::span<const GradientPiece> pieces, ShaderLibrary& library) {
    NormDenseArgs args{};
    int64_t groups = 0;
    encoder_.set_compute_pipeline_state(library.kernel(kDense));
    for (size_t i = 0; i < kNormGradients; ++i) {
      // A slot without a gradient has no threadgroups, but every buffer of the kernel must be bound.
      bool is_used = i < pieces.size();
      auto& piece = pieces[is_used ? i : 0];
      args.sizes[i] = is_used ? unsigned(piece.size) : 0;
      args.vectors[i] = (piece.gradient->offset() + piece.start_bytes()) % kRunBytes == 0;
      groups += is_used ? piece.partials() : 0;
      args.group_ends[i] = unsigned(groups);
      encoder_.set_input_array(*piece.gradient, int(kFirstGradient + i), piece.start_bytes());
    }
    encoder_.set_bytes(args, kNormArgs);
    dispatch(groups);
  }

  void general(const GradientPiece& piece, ShaderLibrary& library) {
    encoder_.set_compute_pipeline_state(library.kernel(kGeneral));
    encoder_.set_bytes(NormGeneralArgs{unsigned(piece.size), unsigned(piece.shape.size())}, kNormArgs);
    encoder_.set_input_array(*piece.gradient, kNormGradient, piece.start_bytes());
    encoder_.set_vector_bytes(piece.shape, kNormShape);
    encoder_.set_vector_bytes(piece.strides, kNormStrides);
    dispatch(piece.partials());
  }

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
  GradientsByDtype by_dtype;
  auto gradients_of = [&](mx::Dtype dtype) -> Gradients& {
    auto entry = by_dtype.find(dtype.val());
    if (entry == by_dtype.end()) {
      ShaderLibrary library(stream(), "SumOfSquares", "fused_adam_norm", kGradNormShader, kShaderKernels,
                            metal_type(format_of(dtype)), kNormThreads);
      entry = by_dtype.try_emplace(dtype.val(), Gradients{std::move(library)}).first;
    }
    return entry->second;
  };
  for (auto& gradient : inputs) {
    auto& gradients = gradients_of(gradient.dtype());
    if (gradient.size() > 0) gradients.add(gradient);
  }
  int64_t count = 0;
  for (auto& [_, gradients] : by_dtype) count += gradients.partials();
  auto& sum = outputs[0];
  allocate(sum);
  // Of one element at least, since every buffer of a kernel must be bound.
  mx::array partials({int(std::max<int64_t>(count, 1))}, mx::float32, nullptr, {});
  allocate(partials);
  auto& encoder = mx::metal::get_command_encoder(stream());
  encoder.add_temporary(partials);
  NormEncoder norm(encoder, partials);
  norm.partials(by_dtype);
  norm.total(sum, by_dtype.begin()->second.library);
}

}  // namespace fused_adam
