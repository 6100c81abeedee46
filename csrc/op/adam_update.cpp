// Graph building of the operation: validation, the step's scalars, grouping, and transforms through a composed update.
// The scalars' formulas are those of mlx.optimizers.Adam and AdamW (bias correction: Kingma & Ba 2015, section 3).
#include "op/adam_update.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <tuple>
#include <typeinfo>

#include "mlx/ops.h"
#include "op/errors.h"
#include "op/formats.h"
#include "op/layout.h"

namespace fused_adam {

namespace mx = mlx::core;

namespace {

// Larger tensors get a node each: they gain nothing from company, and freeing them one by one keeps memory flat.
constexpr size_t kLargestGrouped = 1 << 16;

const AdamExtras& extras_of(const AdamTensors& tensors, size_t i) {
  static const AdamExtras none;
  return tensors.extras.empty() ? none : tensors.extras[i];
}

// What codes and remainders have beside them.
void check_extras(const AdamTensors& tensors, size_t i, const TensorName& name) {
  auto& parameter = tensors.parameters[i];
  auto& extras = extras_of(tensors, i);
  auto check_one = [&](const char* what, const std::optional<mx::array>& x, mx::Dtype dtype,
                       const mx::Shape& shape) {
    if (!x) reject(what, " of ", name(i), " must be an array of ", dtype, " but got nothing");
    if (x->dtype() != dtype || x->shape() != shape) {
      reject(what, " of ", name(i), " must be ", dtype, " of shape ", shape, " but got ",
             x->dtype(), " of shape ", x->shape());
    }
  };
  if (extras.remainder) {
    if (parameter.dtype() != mx::bfloat16) {
      reject("parameter of ", name(i), " must be bfloat16, since it has a remainder, but got ",
             parameter.dtype());
    }
    check_one("remainder", extras.remainder, mx::int16, parameter.shape());
  }
  if (tensors.m[i].dtype() == mx::int8) {
    if (parameter.ndim() == 0) reject("m of ", name(i), " must have an axis to be int8");
    check_one("m_scale", extras.m_scale, mx::bfloat16, scale_shape(parameter.shape()));
    check_one("v_scale", extras.v_scale, mx::bfloat16, scale_shape(parameter.shape()));
  } else if (extras.m_scale || extras.v_scale) {
    reject("m of ", name(i), " must be int8, since it has scales, but got ", tensors.m[i].dtype());
  }
}

void check(const AdamTensors& tensors, const TensorName& name) {
  size_t count = tensors.parameters.size();
  if (tensors.gradients.size() != count || tensors.m.size() != count || tensors.v.size() != count) {
    reject("parameters, gradients, m and v must be lists of one length but got ", count, ", ",
           tensors.gradients.size(), ", ", tensors.m.size(), " and ", tensors.v.size());
  }
  if (!tensors.extras.empty() && tensors.extras.size() != count) {
    reject("extras must be one for each parameter but got ", tensors.extras.size());
  }
  for (size_t i = 0; i < count; ++i) {
    auto& parameter = tensors.parameters[i];
    bool has_codes = !tensors.extras.empty() && tensors.m[i].dtype() == mx::int8 &&
                     tensors.v[i].dtype() == mx::uint8;
    auto check_one = [&](const char* what, const mx::array& x, bool is_code = false) {
      if (!is_code && !is_plain(x.dtype())) {
        reject(what, " of ", name(i), " must be float32, bfloat16 or float16 but got ", x.dtype());
      }
      if (x.shape() != parameter.shape()) {
        reject(what, " of ", name(i), " must have the parameter's shape ", parameter.shape(),
               " but got ", x.shape());
      }
    };
    check_one("parameter", parameter);
    check_one("gradient", tensors.gradients[i]);
    check_one("m", tensors.m[i], has_codes);
    check_one("v", tensors.v[i], has_codes);
    if (!has_codes && tensors.m[i].dtype() != tensors.v[i].dtype()) {
      reject("m and v of ", name(i), " must share one dtype but got ", tensors.m[i].dtype(),
             " and ", tensors.v[i].dtype());
    }
    if (!tensors.extras.empty()) check_extras(tensors, i, name);
  }
}

void check(const AdamHyperparameters& h) {
  if (!(0.0 <= h.beta1 && h.beta1 < 1.0)) reject("beta1 must be in [0, 1) but got ", h.beta1);
  if (!(0.0 <= h.beta2 && h.beta2 < 1.0)) reject("beta2 must be in [0, 1) but got ", h.beta2);
  if (!(0.0 <= h.eps)) reject("eps must be at least 0 but got ", h.eps);
  if (!std::isfinite(h.weight_decay)) {
    reject("weight_decay must be finite but got ", h.weight_decay);
  }
}

mx::array as_scalar(const char* what, const mx::array& x, mx::Dtype dtype, mx::Stream stream) {
  if (x.size() != 1) reject(what, " must be a scalar but got shape ", x.shape());
  if (x.dtype() == mx::complex64) reject(what, " must be real but got ", x.dtype());
  return mx::astype(x.ndim() == 0 ? x : mx::reshape(x, {}, stream), dtype, stream);
}

mx::array constant(double value) { return mx::array(static_cast<float>(value)); }

AdamConstants constants_of(const AdamHyperparameters& h) {
  return {static_cast<float>(h.beta1), static_cast<float>(1.0 - h.beta1),
          static_cast<float>(h.beta2), static_cast<float>(1.0 - h.beta2),
          static_cast<float>(h.eps)};
}

// Learning rate and step are often lazy, so their arithmetic is part of the graph: a few scalar operations a step, by
// MLX itself and therefore equal to stock's on every device. Where the learning rate is all there is, none are needed.
mx::array scalars_of(const mx::array& learning_rate, const std::optional<mx::array>& step,
                     const AdamGuard& guard, const AdamHyperparameters& h, mx::Stream s) {
  auto lr = as_scalar("learning_rate", learning_rate, mx::float32, s);
  if (!h.bias_correction && h.weight_decay == 0.0 && !guard.any()) return lr;
  AdamScalars<mx::array> scalars{lr, constant(1.0), constant(1.0), constant(1.0)};
  if (h.bias_correction) {
    if (!step) reject("step must be given with bias_correction but got None");
    auto t = as_scalar("step", *step, mx::float32, s);
    auto correction = [&](double beta) {
      return mx::subtract(constant(1.0), mx::power(constant(beta), t, s), s);
    };
    scalars.step_size = mx::divide(lr, correction(h.beta1), s);
    scalars.denominator_scale = mx::rsqrt(correction(h.beta2), s);
  }
  if (h.weight_decay != 0.0) {
    scalars.decay = mx::subtract(constant(1.0), mx::multiply(lr, constant(h.weight_decay), s), s);
  }
  std::vector<mx::array> packed{scalars.step_size, scalars.denominator_scale, scalars.decay};
  if (guard.any()) {
    auto given = [&](const char* what, const std::optional<mx::array>& x) {
      return x ? as_scalar(what, *x, mx::float32, s) : constant(1.0);
    };
    packed.push_back(given("gradient_scale", guard.gradient_scale));
    packed.push_back(given("is_applied", guard.is_applied));
  }
  return mx::stack(packed, s);
}

struct UnpackedScalars {
  AdamScalars<mx::array> rule;
  std::optional<mx::array> is_applied;
};

UnpackedScalars unpack(const mx::array& scalars) {
  auto at = [&](int i) {
    return size_t(i) < scalars.size()
               ? mx::reshape(scalars.ndim() == 0 ? scalars : mx::slice(scalars, {i}, {i + 1}), {})
               : constant(1.0);
  };
  UnpackedScalars unpacked{{at(0), at(1), at(2), at(3)}, std::nullopt};
  if (scalars.size() == kGuarded) unpacked.is_applied = mx::not_equal(at(4), constant(0.0));
  return unpacked;
}

struct ByFormats {
  bool operator()(const TensorFormats& a, const TensorFormats& b) const {
    return std::tie(a.parameter, a.gradient, a.m, a.v) <
           std::tie(b.parameter, b.gradient, b.m, b.v);
  }
};

TensorFormats formats_of(const AdamTensors& tensors, size_t i) {
  auto parameter = extras_of(tensors, i).remainder ? Format::bfloat16_remainder
                                                   : format_of(tensors.parameters[i].dtype());
  return {parameter, format_of(tensors.gradients[i].dtype()), format_of(tensors.m[i].dtype()),
          format_of(tensors.v[i].dtype())};
}

// Lists of tensor indices, each to become one node.
std::vector<std::vector<size_t>> group(const AdamTensors& tensors, size_t tensors_per_node) {
  std::vector<std::vector<size_t>> groups;
  std::map<TensorFormats, size_t, ByFormats> open;
  for (size_t i = 0; i < tensors.parameters.size(); ++i) {
    if (tensors.parameters[i].size() > kLargestGrouped) {
      groups.push_back({i});
      continue;
    }
    auto [entry, is_new] = open.try_emplace(formats_of(tensors, i), groups.size());
    if (is_new || groups[entry->second].size() == tensors_per_node) {
      entry->second = groups.size();
      groups.emplace_back().reserve(tensors_per_node);
    }
    groups[entry->second].push_back(i);
  }
  return groups;
}

// Those of the flags that concern results of these formats. Codes of m go with those of v: rounded to nearest they would stick
// at a low level.
AdamRounding within(AdamRounding rounding, const TensorFormats& formats) {
  rounding.parameter =
      rounding.parameter && formats.parameter != Format::float32 && !formats.has_remainder();
  rounding.m = formats.has_codes() ? rounding.v : rounding.m && formats.m != Format::float32;
  rounding.v = rounding.v && formats.v != Format::float32;
  return rounding;
}

// Kernels read codes and extras row-major, as they write them. What an update has made needs no look, and what a compiled graph
// will be given cannot have one: AdamUpdate::check_layouts does it then.
mx::array row_major(const mx::array& x, mx::Stream stream) {
  bool is_known = x.is_available()    ? x.flags().row_contiguous
                  : x.has_primitive() ? typeid(x.primitive()) == typeid(AdamUpdate)
                                      : true;
  return is_known ? x : mx::contiguous(x, false, stream);
}

using MakePrimitive = std::function<std::shared_ptr<AdamUpdate>(
    mx::Stream, const TensorFormats&, AdamRounding, std::vector<uint32_t> numbers)>;

// `step` is for stochastic rounding, and absent where nothing is rounded so.
AdamResults build(const AdamTensors& tensors, const mx::array& scalars,
                  const std::optional<mx::array>& step, const AdamRounding& rounding,
                  const std::vector<uint32_t>& numbers, const IsFused& is_fused, mx::Stream stream,
                  const MakePrimitive& make_primitive) {
  AdamResults results{tensors.parameters, tensors.m, tensors.v, tensors.extras};
  auto backend = stream.device == mx::Device::gpu ? gpu_backend() : cpu_backend();
  std::map<TensorFormats, bool, ByFormats> fused;
  for (auto& members : group(tensors, backend.tensors_per_node)) {
    size_t any = members[0];
    auto formats = formats_of(tensors, any);
    auto [entry, is_new] = fused.try_emplace(formats);
    if (is_new) {
      std::optional<mx::Dtype> remainder;
      if (formats.has_remainder()) remainder = mx::int16;
      entry->second = is_fused(tensors.parameters[any].dtype(), tensors.gradients[any].dtype(),
                               tensors.m[any].dtype(), remainder);
    }
    bool has_extras = extra_count(formats) > 0, has_kernel = entry->second || has_extras;
    auto where = entry->second || !has_extras ? stream : mx::default_stream(mx::Device::cpu);
    auto of_node = has_kernel ? within(rounding, formats) : AdamRounding{};
    std::vector<uint32_t> node_numbers;
    std::vector<mx::array> inputs{scalars};
    if (of_node.any()) inputs.push_back(*step);
    std::vector<mx::Shape> shapes;
    std::vector<mx::Dtype> dtypes;
    inputs.reserve(inputs.size() +
                   (AdamUpdate::kFirstExtraInput + extra_count(formats)) * members.size());
    for (size_t i : members) {
      inputs.push_back(tensors.parameters[i]);
      inputs.push_back(tensors.gradients[i]);
      shapes.insert(shapes.end(), AdamUpdate::kFirstExtraOutput, tensors.parameters[i].shape());
      dtypes.insert(dtypes.end(),
                    {tensors.parameters[i].dtype(), tensors.m[i].dtype(), tensors.v[i].dtype()});
      for (auto* moments : {&tensors.m, &tensors.v}) {
        auto& moment = (*moments)[i];
        inputs.push_back(formats.has_codes() ? row_major(moment, where) : moment);
      }
      if (has_extras) {
        auto& extras = tensors.extras[i];
        for (auto* extra : {&extras.remainder, &extras.m_scale, &extras.v_scale}) {
          if (!*extra) continue;
          inputs.push_back(row_major(**extra, where));
          shapes.push_back((*extra)->shape());
          dtypes.push_back((*extra)->dtype());
        }
      }
      if (of_node.any()) node_numbers.push_back(numbers.empty() ? i : numbers[i]);
    }
    auto primitive = make_primitive(where, formats, of_node, std::move(node_numbers));
    auto outputs = has_kernel ? mx::array::make_arrays(std::move(shapes), dtypes, primitive, inputs)
                              : primitive->composed()(inputs);
    auto output = outputs.begin();
    for (size_t i : members) {
      results.parameters[i] = *output++;
      results.m[i] = *output++;
      results.v[i] = *output++;
      if (has_extras) {
        auto& extras = results.extras[i];
        for (auto* extra : {&extras.remainder, &extras.m_scale, &extras.v_scale}) {
          if (*extra) *extra = *output++;
        }
      }
    }
  }
  return results;
}

}  // namespace

AdamResults adam_update(const AdamTensors& tensors, const mx::array& learning_rate,
                        const std::optional<mx::array>& step, const AdamGuard& guard,
                        const AdamHyperparameters& hyperparameters, const AdamRounding& rounding,
                        const std::vector<uint32_t>& numbers, const IsFused& is_fused,
                        bool wide_indices, mx::StreamOrDevice s, const TensorName& name) {
  check(tensors, name);
  check(hyperparameters);
  if (rounding.any()) {
    if (!step) reject("step must be given for stochastic rounding but got None");
    if (!numbers.empty() && numbers.size() != tensors.parameters.size()) {
      reject("numbers must be one for each parameter but got ", numbers.size());
    }
  }
  auto stream = mx::to_stream(s);
  auto scalars = scalars_of(learning_rate, step, guard, hyperparameters, stream);
  std::optional<mx::array> counter;
  if (rounding.any()) counter = as_scalar("step", *step, mx::uint32, stream);
  return build(tensors, scalars, counter, rounding, numbers, is_fused, stream,
               [&](mx::Stream where, const TensorFormats& formats, AdamRounding of_node,
                   std::vector<uint32_t> of_tensors) {
                 return std::make_shared<AdamUpdate>(where, UpdateRule::adam,
                                                     constants_of(hyperparameters), formats,
                                                     of_node, std::move(of_tensors), wide_indices);
               });
}

AdamResults traffic_probe(const AdamTensors& tensors, mx::StreamOrDevice s,
                          const TensorName& name) {
  check(tensors, name);
  for (size_t i = 0; i < tensors.parameters.size(); ++i) {
    auto dtype = tensors.parameters[i].dtype();
    if (tensors.gradients[i].dtype() != dtype || tensors.m[i].dtype() != dtype) {
      reject("all arrays of ", name(i), " must share one dtype but got ", dtype, ", ",
             tensors.gradients[i].dtype(), " and ", tensors.m[i].dtype());
    }
  }
  auto stream = mx::to_stream(s);
  auto always = [](mx::Dtype, mx::Dtype, mx::Dtype, std::optional<mx::Dtype>) { return true; };
  return build(tensors, mx::array(0.0f), std::nullopt, {}, {}, always, stream,
               [&](mx::Stream, const TensorFormats& formats, AdamRounding, std::vector<uint32_t>) {
                 return std::make_shared<AdamUpdate>(stream, UpdateRule::traffic, AdamConstants{},
                                                     formats);
               });
}

std::function<std::vector<mx::array>(const std::vector<mx::array>&)> AdamUpdate::composed() {
  if (extra_count(formats_) > 0) {
    reject(
        "grad and vmap of an update must have state_dtype 'float32' or 'bfloat16' and no "
        "master_weights but got ",
        formats_.has_codes() ? "state_dtype='int8'" : "master_weights=True");
  }
  return [rule = rule_, constants = constants_, first = common_inputs(),
          stream = stream()](const std::vector<mx::array>& inputs) {
    mx::StreamContext context(stream);
    auto [scalars, is_applied] = unpack(inputs[0]);
    auto as = [](const mx::array& x, mx::Dtype dtype) { return mx::astype(x, dtype); };
    std::vector<mx::array> outputs;
    for (size_t i = first; i < inputs.size(); i += kFirstExtraInput) {
      auto& parameter = inputs[i];
      auto& gradient = inputs[i + 1];
      auto& m = inputs[i + 2];
      auto& v = inputs[i + 3];
      AdamState<mx::array> old{as(parameter, mx::float32), as(m, mx::float32), as(v, mx::float32)};
      auto g = as(gradient, mx::float32);
      auto next = rule == UpdateRule::adam ? AdamRule::step(old, g, scalars, constants)
                                           : TrafficRule::step(old, g, scalars, constants);
      auto result = [&](const mx::array& next, const mx::array& old) {
        auto stored = as(next, old.dtype());
        return is_applied ? mx::where(*is_applied, stored, old) : stored;
      };
      outputs.insert(outputs.end(),
                     {result(next.parameter, parameter), result(next.m, m), result(next.v, v)});
    }
    return outputs;
  };
}

// Asked for by shapeless compilation, whose later calls no other check sees.
std::vector<mx::Shape> AdamUpdate::output_shapes(const std::vector<mx::array>& inputs) {
  std::vector<mx::Shape> shapes;
  for (size_t i = common_inputs(); i < inputs.size(); i += inputs_per_tensor()) {
    auto& shape = inputs[i].shape();
    for (size_t k = 1; k < kFirstExtraInput; ++k) {
      if (inputs[i + k].shape() != shape) {
        const char* names[] = {"parameter", "gradient", "m", "v"};
        reject(names[k], " must have the parameter's shape ", shape, " but got ",
               inputs[i + k].shape());
      }
    }
    shapes.insert(shapes.end(), kFirstExtraOutput, shape);
    for (size_t k = kFirstExtraInput; k < inputs_per_tensor(); ++k) {
      bool is_remainder = formats_.has_remainder() && k == kFirstExtraInput;
      shapes.push_back(is_remainder ? shape : scale_shape(shape));
      if (inputs[i + k].shape() != shapes.back()) {
        reject(is_remainder ? "remainder" : "scales", " must have the shape ", shapes.back(),
               " but got ", inputs[i + k].shape());
      }
    }
  }
  return shapes;
}

void AdamUpdate::check_layouts(const std::vector<mx::array>& inputs) const {
  if (extra_count(formats_) == 0) return;
  for (size_t i = common_inputs(); i < inputs.size(); ++i) {
    size_t k = (i - common_inputs()) % inputs_per_tensor();
    if (k < (formats_.has_codes() ? 2 : kFirstExtraInput)) continue;
    // Of empty arrays MLX does not always say that they are row-major.
    if (inputs[i].size() > 0 && !inputs[i].flags().row_contiguous) {
      reject(
          "m, v, scales and remainder of a compiled update must be row-major but got one of shape ",
          inputs[i].shape(), " that is not");
    }
  }
}

}  // namespace fused_adam
