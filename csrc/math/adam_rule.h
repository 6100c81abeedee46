// The Adam update of one element: the only place that holds its arithmetic.
// Method: Kingma & Ba 2015 (Adam) and Loshchilov & Hutter 2019 (decoupled weight decay), in the order of operations of
// mlx.optimizers. Every back end loads, calls adam_rule and stores; by value throughout, so valid C++14, MSL and CUDA.
#pragma once

#include "math/device_math.h"

namespace fused_adam {

// Fixed for the life of an optimizer. The complements are formed in double by the host, as mlx.optimizers does in
// Python.
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
//   gradient_scale     1, or what clipping multiplies gradients by
template <typename T>
struct AdamScalars {
  T step_size;
  T denominator_scale;
  T decay;
  T gradient_scale;
};

// The array that hands them to a kernel holds step_size alone, the others being 1; or all in the order of the fields,
// and last whether the step is applied: 0 leaves everything as it was.
enum ScalarCounts { kStepSizeOnly = 1, kAllScalars = 5 };

template <typename T>
struct AdamState {
  T parameter;
  T m;
  T v;
};

// Turns one element's old state into its new one. T is float in the kernels, and mlx::core::array in the fallback.
template <typename T>
ADAM_FUNCTION AdamState<T> adam_rule(AdamState<T> old, T gradient, AdamScalars<T> scalars, AdamConstants c) {
  using adam_math::sqrt;
  gradient = gradient * scalars.gradient_scale;
  T kept_m = c.beta1 * old.m;
  T new_m = c.one_minus_beta1 * gradient;
  T m = kept_m + new_m;
  T kept_v = c.beta2 * old.v;
  T new_v = c.one_minus_beta2 * (gradient * gradient);
  T v = kept_v + new_v;
  T root = sqrt(v) * scalars.denominator_scale;
  T change = scalars.step_size * m / (root + c.eps);
  T kept_parameter = old.parameter * scalars.decay;
  return {kept_parameter - change, m, v};
}

}  // namespace fused_adam
