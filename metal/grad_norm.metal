// The Metal kernels that sum the squares of gradients (G), for their global norm: one read of each gradient, float32
// sums. A threadgroup sums kNormSpan elements to a partial sum, and norm_total sums those: in an order that depends on
// sizes alone. Compiled on the user's machine from the string that the build embeds; csrc/metal/grad_norm.cpp adds the
// instantiations.
#include <metal_stdlib>

#include "adam_args.h"
#include "math/device_math.h"
#include "grad_norm_args.h"
#include "vector_io.h"

using namespace metal;
using namespace fused_adam;

// The sum of what all threads of a threadgroup have, for thread 0.
inline float sum_of_threads(float x, threadgroup float* sums, uint thread_index) {
  sums[thread_index] = x;
  for (uint half_of = kNormThreads / 2; half_of > 0; half_of /= 2) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (thread_index < half_of) {
      sums[thread_index] += sums[thread_index + half_of];
    }
  }
  return thread_index == 0 ? sums[0] : 0.0f;
}

inline float add_square(float sum, float x) {
  float square = x * x;
  return sum + square;
}

// Several gradients, or pieces of them, whose elements follow each other in memory, in whatever order.
template <typename G>
[[kernel, max_total_threads_per_threadgroup(kNormThreads)]] void norm_dense(
    constant NormDenseArgs& args [[buffer(kNormArgs)]],
    device float* partials [[buffer(kNormPartials)]],
    const device G* gradient_0 [[buffer(2)]],
    const device G* gradient_1 [[buffer(3)]],
    const device G* gradient_2 [[buffer(4)]],
    const device G* gradient_3 [[buffer(5)]],
    const device G* gradient_4 [[buffer(6)]],
    const device G* gradient_5 [[buffer(7)]],
    const device G* gradient_6 [[buffer(8)]],
    const device G* gradient_7 [[buffer(9)]],
    uint3 group_in_grid [[threadgroup_position_in_grid]],
    uint3 thread_in_group [[thread_position_in_threadgroup]]) {
  threadgroup float sums[kNormThreads];
  uint group = group_in_grid.x;
  uint which = 0;
  while (group >= args.group_ends[which]) {
    ++which;
  }
  const device G* gradient = gradient_0;
  switch (which) {
    case 1: gradient = gradient_1; break;
    case 2: gradient = gradient_2; break;
    case 3: gradient = gradient_3; break;
    case 4: gradient = gradient_4; break;
    case 5: gradient = gradient_5; break;
    case 6: gradient = gradient_6; break;
    case 7: gradient = gradient_7; break;
  }
  uint first_group = which == 0 ? 0 : args.group_ends[which - 1];
  uint start = (group - first_group) * kNormSpan;
  uint count = min(uint(kNormSpan), args.sizes[which] - start);
  const device G* from = gradient + start;

  constexpr uint length = kRunBytes / sizeof(G);
  float sum = 0.0f;
  uint at = thread_in_group.x * length;
  for (; at < count; at += kNormThreads * length) {
    if (args.vectors[which] != 0 && at + length <= count) {
      float values[length];
      load_vectors<length>(from + at, values);
      UNROLLED
      for (uint k = 0; k < length; ++k) {
        sum = add_square(sum, values[k]);
      }
    } else {
      for (uint k = at; k < min(at + length, count); ++k) {
        sum = add_square(sum, float(from[k]));
      }
    }
  }
  float total = sum_of_threads(sum, sums, thread_in_group.x);
  if (thread_in_group.x == 0) {
    partials[group] = total;
  }
}

// One gradient with any strides, or a piece of one.
template <typename G>
[[kernel, max_total_threads_per_threadgroup(kNormThreads)]] void norm_general(
    constant NormGeneralArgs& args [[buffer(kNormArgs)]],
    device float* partials [[buffer(kNormPartials)]],
    const device G* gradient [[buffer(kNormGradient)]],
    constant const int64_t* shape [[buffer(kNormShape)]],
    constant const int64_t* strides [[buffer(kNormStrides)]],
    uint3 group_in_grid [[threadgroup_position_in_grid]],
    uint3 thread_in_group [[thread_position_in_threadgroup]]) {
  threadgroup float sums[kNormThreads];
  uint start = group_in_grid.x * kNormSpan;
  uint end = start + min(uint(kNormSpan), args.size - start);
  float sum = 0.0f;
  for (uint i = start + thread_in_group.x; i < end; i += kNormThreads) {
    uint rest = i;
    int64_t at = 0;
    for (uint axis = args.axes; axis-- > 0;) {
      uint size = uint(shape[axis]);
      at += int64_t(rest % size) * strides[axis];
      rest /= size;
    }
    sum = add_square(sum, float(gradient[at]));
  }
  float total = sum_of_threads(sum, sums, thread_in_group.x);
  if (thread_in_group.x == 0) {
    partials[group_in_grid.x] = total;
  }
}

// The sum of all partial sums, by one threadgroup.
[[kernel, max_total_threads_per_threadgroup(kNormThreads)]] void norm_total(
    constant NormTotalArgs& args [[buffer(kNormArgs)]],
    const device float* partials [[buffer(kNormPartials)]],
    device float* total [[buffer(kNormTotal)]],
    uint3 thread_in_group [[thread_position_in_threadgroup]]) {
  threadgroup float sums[kNormThreads];
  float sum = 0.0f;
  for (uint i = thread_in_group.x; i < args.partials; i += kNormThreads) {
    sum += partials[i];
  }
  float all = sum_of_threads(sum, sums, thread_in_group.x);
  if (thread_in_group.x == 0) {
    total[0] = all;
  }
}
