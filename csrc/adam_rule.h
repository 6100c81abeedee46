// The Adam update of one element: the only place where its arithmetic stands.
// Method: Kingma & Ba 2015 (Adam) and Loshchilov & Hutter 2019 (decoupled weight decay), in the order of operations of
// mlx.optimizers. Every back end loads, calls a rule's step and stores; by value throughout, so valid C++14, MSL and CUDA.
#pragma once

#if defined(__METAL_VERSION__)
#include <metal_stdlib>
namespace adam_math = metal;
#define ADAM_FUNCTION inline
#else
#include <cmath>
namespace adam_math = std;
#if defined(__CUDACC__)
#define ADAM_FUNCTION __host__ __device__ inline
#else
#define ADAM_FUNCTION inline
#endif
#endif

namespace fused_adam {

// Fixed for the life of an optimizer. The complements are formed in double by the host, as mlx.optimizers does in Python.
struct AdamConstants {
  float beta1;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float eps;
};

// Formed once a step from learning rate, step and weight decay:
//   step_size          learning_rate, over (1 - beta1^step) under bias correction
//   denominator_scale  1, or 1 / sqrt(1 - beta2^step) under bias correction
//   decay              1 - learning_rate * weight_decay
template <typename T>
struct AdamScalars {
  T step_size;
  T denominator_scale;
  T decay;
};

template <typename T>
struct AdamState {
  T parameter;
  T m;
  T v;
};

// A rule turns one element's old state into its new one. T is float in the kernels, and mlx::core::array where the
// operation needs its derivatives.
struct AdamRule {
  template <typename T>
  static ADAM_FUNCTION AdamState<T> step(AdamState<T> old, T gradient, AdamScalars<T> scalars,
                                         AdamConstants c) {
    using adam_math::sqrt;
    T m = c.beta1 * old.m + c.one_minus_beta1 * gradient;
    T v = c.beta2 * old.v + c.one_minus_beta2 * (gradient * gradient);
    T parameter = old.parameter * scalars.decay -
                  (scalars.step_size * m) / (sqrt(v) * scalars.denominator_scale + c.eps);
    return {parameter, m, v};
  }
};

// The same traffic with next to no arithmetic: the benchmark's speed of light.
struct TrafficRule {
  template <typename T>
  static ADAM_FUNCTION AdamState<T> step(AdamState<T> old, T gradient, AdamScalars<T>,
                                         AdamConstants) {
    return {old.parameter + gradient, old.m + gradient, old.v + gradient};
  }
};

}  // namespace fused_adam
