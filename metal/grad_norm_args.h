// What host (csrc/metal/grad_norm.cpp) and shader (metal/grad_norm.metal) must agree on. Valid C++ and MSL; 32-bit
// fields only.
#pragma once

namespace fused_adam {

// Buffers of the kernels; a kernel has those that it names.
enum NormBuffer {
  kNormArgs = 0,
  kNormPartials = 1,
  kNormTotal = 2,
  kFirstGradient = 2,  // of norm_dense, which has several
  kNormGradient = 2,
  kNormShape = 3,
  kNormStrides = 4,
};

enum NormLimits {
  kNormThreads = 256,   // of a threadgroup, in every kernel
  kNormGradients = 8,   // of one dispatch of norm_dense
  kNormSpan = 1 << 14,  // elements whose squares one threadgroup sums
};

// Gradient t has the threadgroups before group_ends[t] and not before those of t - 1; each writes one partial sum.
struct NormDenseArgs {
  unsigned int sizes[kNormGradients];
  unsigned int vectors[kNormGradients];  // whether it begins at a multiple of kRunBytes
  unsigned int group_ends[kNormGradients];
};

struct NormGeneralArgs {
  unsigned int size;
  unsigned int axes;
};

struct NormTotalArgs {
  unsigned int partials;
};

}  // namespace fused_adam
