// Graph building of the operation: validation, the step's scalars, grouping, and transforms through the fallback.
// The scalars' formulas are those of mlx.optimizers.Adam and AdamW (bias correction: Kingma & Ba 2015, section 3).
#include "op/adam_update.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <numeric>
#include <tuple>
#include <typeinfo>
#include <unordered_map>
#include <utility>

#include "mlx/ops.h"
#include "op/errors.h"
#include "op/layout.h"

namespace fused_adam {

namespace mx = mlx::core;

namespace {

// Larger tensors get a node each: they gain nothing from company, and freeing them one by one keeps memory flat.
constexpr size_t kLargestGrouped = 1 << 16;

// Where a step's gradients take fewer bytes than this, a chain's nodes cost more time than they are worth: a step of
// many tiny layers takes twice as long.
constexpr size_t kWorthChain = 1 << 24;

// m of 8 bits is int8.
bool is_packed(const mx::array& m) { return m.dtype() == mx::uint8; }

// ---- Validation ----

void check_auxiliary(const char* what, const std::optional<mx::array>& x, mx::Dtype dtype, const mx::Shape& shape,
                     const std::string& name) {
  if (!x) reject(what, " of ", name, " must be an array of ", dtype, " but got nothing");
  if (x->dtype() != dtype || x->shape() != shape) {
    reject(what, " of ", name, " must be ", dtype, " of shape ", shape, " but got ", x->dtype(), " of shape ",
           x->shape());
  }
}

void check(const AdamTensor& t, size_t i, const TensorName& name) {
  auto& shape = t.parameter.shape();
  bool has_4_bits = is_packed(t.m);
  bool is_quantized = t.v.dtype() == mx::uint8 && (has_4_bits || t.m.dtype() == mx::int8);
  auto check_values = [&](const char* what, const mx::array& x, bool is_quantized = false) {
    if (!is_quantized && !is_plain(x.dtype())) {
      reject(what, " of ", name(i), " must be float32, bfloat16 or float16 but got ", x.dtype());
    }
    if (is_quantized && has_4_bits) {
      auto packed = packed_shape(shape);
      if (x.shape() != packed) reject(what, " of ", name(i), " must have shape ", packed, " but got ", x.shape());
    } else if (x.shape() != shape) {
      reject(what, " of ", name(i), " must have the parameter's shape ", shape, " but got ", x.shape());
    }
  };
  check_values("parameter", t.parameter);
  check_values("gradient", t.gradient);
  check_values("m", t.m, is_quantized);
  check_values("v", t.v, is_quantized);
  if (!is_quantized && t.m.dtype() != t.v.dtype()) {
    reject("m and v of ", name(i), " must share one dtype but got ", t.m.dtype(), " and ", t.v.dtype());
  }
  if (t.correction) {
    if (t.parameter.dtype() != mx::bfloat16) {
      reject("parameter of ", name(i), " must be bfloat16, since it has a remainder, but got ", t.parameter.dtype());
    }
    bool has_24_bits = t.correction->dtype() == mx::int8;
    check_auxiliary("remainder", t.correction, has_24_bits ? mx::int8 : mx::int16, shape, name(i));
  }
  if (is_quantized) {
    if (t.parameter.ndim() == 0) reject("m of ", name(i), " must have an axis to be quantized");
    check_auxiliary("m_scale", t.m_scale, mx::bfloat16, scale_shape(shape), name(i));
    check_auxiliary("v_scale", t.v_scale, mx::bfloat16, scale_shape(shape), name(i));
  } else if (t.m_scale || t.v_scale) {
    reject("m of ", name(i), " must be quantized, since it has scales, but got ", t.m.dtype());
  }
}

void check(const AdamStep& s) {
  if (!(0.0 <= s.beta1 && s.beta1 < 1.0)) reject("beta1 must be in [0, 1) but got ", s.beta1);
  if (!(0.0 <= s.beta2 && s.beta2 < 1.0)) reject("beta2 must be in [0, 1) but got ", s.beta2);
  if (!(0.0 <= s.eps)) reject("eps must be at least 0 but got ", s.eps);
  if (s.rounding != StochasticRounding::nearest && !s.step) {
    reject("step must be given for stochastic rounding but got None");
  }
}

// ---- The step's scalars ----

mx::array as_scalar(const char* what, const mx::array& x, mx::Dtype dtype, mx::Stream stream) {
  if (x.size() != 1) reject(what, " must be a scalar but got shape ", x.shape());
  if (x.dtype() == mx::complex64) reject(what, " must be real but got ", x.dtype());
  return mx::astype(x.ndim() == 0 ? x : mx::reshape(x, {}, stream), dtype, stream);
}

mx::array constant(double value) { return mx::array(static_cast<float>(value)); }

// The arrays that nodes get: learning rate and step are often lazy, so their arithmetic is part of the graph: a few
// scalar operations a step, by MLX itself and therefore equal to those of mlx.optimizers on every device. Where the
// learning rate is all there is, none are needed.
class Scalars {
 public:
  Scalars(const AdamStep& step, mx::Stream stream) : step_(step), stream_(stream) {
    auto lr = as_scalar("learning_rate", step.learning_rate, mx::float32, stream);
    is_step_size_only_ = !step.bias_correction && !step.weight_decay && !step.gradient_scale && !step.is_applied;
    fields_ = {lr, constant(1.0), constant(1.0), constant(1.0), constant(1.0)};
    if (step.bias_correction) {
      if (!step.step) reject("step must be given with bias_correction but got None");
      auto t = as_scalar("step", *step.step, mx::float32, stream);
      auto correction = [&](double beta) {
        return mx::subtract(constant(1.0), mx::power(constant(beta), t, stream), stream);
      };
      fields_[0] = mx::divide(lr, correction(step.beta1), stream);
      fields_[1] = mx::rsqrt(correction(step.beta2), stream);
    }
    if (step.gradient_scale) fields_[3] = given("gradient_scale", *step.gradient_scale);
    if (step.is_applied) fields_[4] = given("is_applied", *step.is_applied);
    if (step.weight_decay) {
      auto decay = mx::multiply(lr, given("weight_decay", *step.weight_decay), stream);
      decay_ = mx::subtract(constant(1.0), decay, stream);
    }
  }

  // Packed for tensors that weight decay applies to, or that it does not; formed when first needed.
  const mx::array& packed(bool is_decayed) {
    auto& packed = packed_[is_decayed && decay_];
    if (!packed) {
      auto fields = fields_;
      if (is_decayed && decay_) fields[2] = *decay_;
      packed = is_step_size_only_ ? fields_[0] : mx::stack(fields, stream_);
    }
    return *packed;
  }

  bool distinguish_decay() const { return decay_.has_value(); }

 private:
  mx::array given(const char* what, const mx::array& x) const { return as_scalar(what, x, mx::float32, stream_); }

  const AdamStep& step_;
  mx::Stream stream_;
  bool is_step_size_only_;
  std::vector<mx::array> fields_;
  std::optional<mx::array> decay_;
  std::optional<mx::array> packed_[2];
};

struct UnpackedScalars {
  AdamScalars<mx::array> rule;
  std::optional<mx::array> is_applied;
};

UnpackedScalars unpack(const mx::array& scalars) {
  if (scalars.ndim() == 0) return {{scalars, constant(1.0), constant(1.0), constant(1.0)}, {}};
  auto at = [&](int i) { return mx::reshape(mx::slice(scalars, {i}, {i + 1}), {}); };
  return {{at(0), at(1), at(2), at(3)}, mx::not_equal(at(4), constant(0.0))};
}

// ---- The order of updates ----

// How late MLX can make an array: the nodes on the longest way to it from what is there already, 0 if itself is.
class Depths {
 public:
  size_t of(const mx::array& x) {
    if (is_there(x)) return 0;
    std::vector<Visit> path{{&x}};  // no recursion: graphs can be deeper than a stack
    while (true) {
      auto& [array, next, depth] = path.back();
      if (next < array->inputs().size()) {
        auto& input = array->inputs()[next];
        auto known = is_there(input) ? std::optional<size_t>(0) : find(input);
        if (known) {
          depth = std::max(depth, *known + 1);
          ++next;
        } else {
          path.push_back({&input});
        }
        continue;
      }
      size_t found = known_[array->id()] = depth;
      path.pop_back();
      if (path.empty()) return found;
    }
  }

 private:
  struct Visit {
    const mx::array* array;
    size_t next = 0;  // of its inputs
    size_t depth = 1;
  };

  static bool is_there(const mx::array& x) {
    return x.status() != mx::array::Status::unscheduled || !x.has_primitive();
  }
  std::optional<size_t> find(const mx::array& x) const {
    auto found = known_.find(x.id());
    return found == known_.end() ? std::nullopt : std::optional(found->second);
  }

  std::unordered_map<uintptr_t, size_t> known_;
};

// Tensors in the order of their updates, and in a chain how late MLX can make their gradients.
struct UpdateOrder {
  std::vector<size_t> tensors;
  std::vector<size_t> depths = {};  // by tensor; empty if there is no chain

  bool is_chain() const { return !depths.empty(); }
};

// In a chain each update waits for the one before it, in the order in which the backward pass makes gradients, so that
// a gradient is used before later ones are made. Else MLX evaluates up to 20 branches of the graph at a time
// (MLX_BFS_MAX_WIDTH), and as many gradients live at once; in a wide graph, all.
UpdateOrder update_order(const std::vector<AdamTensor>& tensors, const AdamStep& step) {
  UpdateOrder order{std::vector<size_t>(tensors.size())};
  std::iota(order.tensors.begin(), order.tensors.end(), 0);
  // Clipping and skipping need all gradients before the first update.
  if (step.gradient_scale || step.is_applied) return order;
  size_t bytes = 0;
  for (auto& tensor : tensors) bytes += tensor.gradient.nbytes();
  if (bytes < kWorthChain) return order;
  Depths depths;
  std::vector<size_t> found;
  for (auto& tensor : tensors) found.push_back(depths.of(tensor.gradient));
  if (std::all_of(found.begin(), found.end(), [](size_t depth) { return depth == 0; })) return order;
  // Layers are defined in the forward pass's order, mostly: the last of equals comes first.
  std::reverse(order.tensors.begin(), order.tensors.end());
  std::stable_sort(order.tensors.begin(), order.tensors.end(), [&](size_t a, size_t b) { return found[a] < found[b]; });
  order.depths = std::move(found);
  return order;
}

// ---- Nodes ----

TensorFormats formats_of(const AdamTensor& t) {
  auto parameter = format_of(t.parameter.dtype());
  if (t.correction) {
    parameter = t.correction->dtype() == mx::int8 ? Format::bfloat16_correction_8 : Format::bfloat16_correction_16;
  }
  auto gradient = format_of(t.gradient.dtype());
  if (is_packed(t.m)) return {parameter, gradient, Format::int4, Format::uint4};
  return {parameter, gradient, format_of(t.m.dtype()), format_of(t.v.dtype())};
}

struct ByFormats {
  bool operator()(const TensorFormats& a, const TensorFormats& b) const {
    return std::tie(a.parameter, a.gradient, a.m, a.v) < std::tie(b.parameter, b.gradient, b.m, b.v);
  }
};
template <typename Value>
using MapByFormats = std::map<TensorFormats, Value, ByFormats>;

// Tensors that become one node.
struct Group {
  TensorFormats formats;
  bool is_decayed;
  std::vector<size_t> members;
};

// Groups of a chain are neighbours in its order: a small gradient that waits for distant ones would keep the
// activations of its layer.
std::vector<Group> group(const std::vector<AdamTensor>& tensors, const UpdateOrder& order, size_t tensors_per_node,
                         bool distinguish_decay) {
  std::vector<Group> groups;
  MapByFormats<size_t> open[2];
  for (size_t i : order.tensors) {
    auto formats = formats_of(tensors[i]);
    bool is_decayed = distinguish_decay && tensors[i].is_decayed;
    bool is_large = tensors[i].parameter.size() > kLargestGrouped;
    if (order.is_chain() && (is_large || !open[is_decayed].count(formats))) {
      for (auto& groups : open) groups.clear();
    }
    if (is_large) {
      groups.push_back({formats, is_decayed, {i}});
      continue;
    }
    auto [entry, is_new] = open[is_decayed].try_emplace(formats, groups.size());
    if (is_new || groups[entry->second].members.size() == tensors_per_node) {
      entry->second = groups.size();
      groups.push_back({formats, is_decayed, {}});
      groups.back().members.reserve(tensors_per_node);
    }
    groups[entry->second].members.push_back(i);
  }
  return groups;
}

// Makes nodes wait for one another, in their order. MLX places a node the later, the nearer it is to the results in
// number of nodes: as many empty ones between two updates as lie between their gradients keep each update beside its
// layer, so that activations are released as early as without a chain.
class Chain {
 public:
  explicit Chain(const UpdateOrder& order) : order_(order) {}

  // What a node of this group must wait for.
  std::optional<mx::array> before(const Group& group, mx::Stream stream) {
    if (!order_.is_chain()) return std::nullopt;
    size_t depth = depth_ + 1;
    for (size_t i : group.members) depth = std::max(depth, order_.depths[i]);
    auto last = std::exchange(last_, std::nullopt);
    size_t empty = depth - std::exchange(depth_, depth) - 1;
    if (!last || last->primitive().stream() != stream) return std::nullopt;
    for (size_t i = 0; i < empty; ++i) last = mx::depends({*last}, {})[0];
    return last;
  }

  void append(const mx::array& result) { last_ = result; }

 private:
  const UpdateOrder& order_;
  size_t depth_ = 0;
  std::optional<mx::array> last_;
};

bool is_exact(Format format) { return format == Format::float32 || format == Format::bfloat16_correction_16; }

// The part of the request that concerns results of these formats. Quantized m goes with v: rounded to nearest it would
// stick at a low level.
StochasticRounding rounding_of(StochasticRounding asked, const TensorFormats& formats) {
  if (is_exact(formats.parameter) && is_exact(formats.v)) return StochasticRounding::nearest;
  bool is_m_apart = !is_exact(formats.m) && !formats.is_quantized();
  return asked == StochasticRounding::all && !is_m_apart ? StochasticRounding::parameter_and_v : asked;
}

RoundingRequest request_of(const AdamStep& step, const TensorFormats& formats) {
  auto rounding = rounding_of(step.rounding, formats);
  bool any = rounding != StochasticRounding::nearest;
  bool parameter = any && !is_exact(formats.parameter), v = any && !is_exact(formats.v);
  bool m = formats.is_quantized() ? v : rounding == StochasticRounding::all;
  return {unsigned(parameter * kRoundParameter + m * kRoundM + v * kRoundV), unsigned(step.seed),
          unsigned(step.seed >> 32)};
}

// The role's array of a tensor; null where it has none.
mx::array* array_of(AdamTensor& t, size_t role) {
  auto optional = [](std::optional<mx::array>& x) { return x ? &*x : nullptr; };
  switch (role) {
    case Role::parameter:
      return &t.parameter;
    case Role::gradient:
      return &t.gradient;
    case Role::m:
      return &t.m;
    case Role::v:
      return &t.v;
    case Role::correction:
      return optional(t.correction);
    case Role::m_scale:
      return optional(t.m_scale);
    default:
      return optional(t.v_scale);
  }
}

bool has(const TensorFormats& formats, size_t role) {
  if (role < Role::correction) return true;
  return role == Role::correction ? formats.has_correction() : formats.is_quantized();
}

// Kernels read these row-major, as they write them.
bool must_be_row_major(const TensorFormats& formats, size_t role) {
  return role >= Role::correction || (role >= Role::m && formats.is_quantized());
}

// An update's own results need no look, and what a compiled graph will be given cannot have one:
// AdamUpdate::check_layouts does it then.
mx::array row_major(const mx::array& x, mx::Stream stream) {
  bool is_known = x.is_available()    ? x.flags().row_contiguous
                  : x.has_primitive() ? typeid(x.primitive()) == typeid(AdamUpdate)
                                      : true;
  return is_known ? x : mx::contiguous(x, false, stream);
}

}  // namespace

std::vector<AdamTensor> adam_update(std::vector<AdamTensor> tensors, const AdamStep& step,
                                    const UsesKernel& uses_kernel, mx::StreamOrDevice s, const TensorName& name) {
  for (size_t i = 0; i < tensors.size(); ++i) check(tensors[i], i, name);
  check(step);
  auto stream = mx::to_stream(s);
  auto backend = stream.device == mx::Device::gpu ? gpu_backend() : cpu_backend();
  Scalars scalars(step, stream);
  auto order = update_order(tensors, step);
  auto groups = group(tensors, order, backend.tensors_per_node, scalars.distinguish_decay());
  MapByFormats<bool> fused;
  for (auto& group : groups) {
    auto [entry, is_new] = fused.try_emplace(group.formats);
    if (is_new) entry->second = uses_kernel(group.formats, rounding_of(step.rounding, group.formats));
  }
  std::optional<mx::array> counter;
  if (step.rounding != StochasticRounding::nearest) {
    counter = as_scalar("step", *step.step, mx::uint32, stream);
  }

  auto constants = AdamConstants{float(step.beta1), float(1.0 - step.beta1), float(step.beta2), float(1.0 - step.beta2),
                                 float(step.eps)};
  Chain chain(order);
  for (auto& group : groups) {
    bool is_fused = fused.at(group.formats), has_auxiliaries = group.formats.has_auxiliaries();
    bool has_kernel = is_fused || has_auxiliaries;
    auto where = is_fused || !has_auxiliaries ? stream : mx::default_stream(mx::Device::cpu);
    AdamNode node{constants, group.formats};
    node.wide_indices = step.wide_indices;
    if (has_kernel) node.rounding = request_of(step, group.formats);
    std::vector<mx::array> inputs{scalars.packed(group.is_decayed)};
    inputs.reserve(2 + Role::kCount * group.members.size());
    if (node.rounding.results) inputs.push_back(*counter);
    std::vector<mx::Shape> shapes;
    std::vector<mx::Dtype> dtypes;
    std::vector<mx::array*> results;
    for (size_t i : group.members) {
      if (node.rounding.results) node.numbers.push_back(tensors[i].number);
      for (size_t role = 0; role < Role::kCount; ++role) {
        if (!has(group.formats, role)) continue;
        auto x = array_of(tensors[i], role);
        inputs.push_back(must_be_row_major(group.formats, role) ? row_major(*x, where) : *x);
        if (role == Role::gradient) continue;
        shapes.push_back(x->shape());
        dtypes.push_back(x->dtype());
        results.push_back(x);
      }
    }
    auto before = has_kernel ? chain.before(group, where) : std::nullopt;
    node.is_chained = has_kernel && order.is_chain();
    node.has_predecessor = before.has_value();
    if (before) inputs.push_back(*before);
    auto primitive = std::make_shared<AdamUpdate>(where, std::move(node));
    auto outputs = has_kernel ? mx::array::make_arrays(std::move(shapes), dtypes, primitive, inputs)
                              : primitive->fallback()(inputs);
    for (size_t i = 0; i < results.size(); ++i) *results[i] = outputs[i];
    if (has_kernel) chain.append(outputs[0]);
  }
  return tensors;
}

std::vector<NodeTensor> AdamNode::tensors(const std::vector<mx::array>& inputs, std::vector<mx::array>* outputs) const {
  std::vector<NodeTensor> tensors;
  size_t out = 0;
  for (size_t in = step(inputs) ? 2 : 1; in < inputs.size() - has_predecessor;) {
    auto& tensor = tensors.emplace_back();
    for (size_t role = 0; role < Role::kCount; ++role) {
      if (!has(formats, role)) continue;
      tensor.in[role] = &inputs[in++];
      if (outputs && role != Role::gradient) tensor.out[role] = &(*outputs)[out++];
    }
  }
  return tensors;
}

Function AdamUpdate::fallback() {
  if (node_.formats.has_auxiliaries()) {
    reject(
        "grad and vmap of an update must have state_dtype 'float32' or 'bfloat16' and no "
        "master_weights but got ",
        node_.formats.m == Format::int8   ? "state_dtype='int8'"
        : node_.formats.m == Format::int4 ? "state_dtype='int4'"
                                          : "master_weights=True");
  }
  return [node = node_, stream = stream()](const std::vector<mx::array>& inputs) {
    mx::StreamContext context(stream);
    auto [scalars, is_applied] = unpack(inputs[0]);
    auto as = [](const mx::array& x, mx::Dtype dtype) { return mx::astype(x, dtype); };
    std::vector<mx::array> outputs;
    for (auto& tensor : node.tensors(inputs)) {
      auto& parameter = *tensor.in[Role::parameter];
      auto &m = *tensor.in[Role::m], &v = *tensor.in[Role::v];
      AdamState<mx::array> old{as(parameter, mx::float32), as(m, mx::float32), as(v, mx::float32)};
      auto next = adam_rule(old, as(*tensor.in[Role::gradient], mx::float32), scalars, node.constants);
      auto result = [&](const mx::array& next, const mx::array& old) {
        auto stored = as(next, old.dtype());
        return is_applied ? mx::where(*is_applied, stored, old) : stored;
      };
      outputs.insert(outputs.end(), {result(next.parameter, parameter), result(next.m, m), result(next.v, v)});
    }
    return outputs;
  };
}

// Asked for by shapeless compilation, whose later calls no other check sees.
std::vector<mx::Shape> AdamUpdate::output_shapes(const std::vector<mx::array>& inputs) {
  static constexpr const char* kNames[Role::kCount] = {"parameter", "gradient", "m",     "v",
                                                       "remainder", "scales",   "scales"};
  std::vector<mx::Shape> shapes;
  for (auto& tensor : node_.tensors(inputs)) {
    auto& shape = tensor.in[Role::parameter]->shape();
    for (size_t role = 0; role < Role::kCount; ++role) {
      if (!tensor.in[role]) continue;
      bool is_moment = role == Role::m || role == Role::v;
      auto wanted = role >= Role::m_scale                          ? scale_shape(shape)
                    : is_moment && node_.formats.m == Format::int4 ? packed_shape(shape)
                                                                   : shape;
      if (tensor.in[role]->shape() != wanted) {
        reject(kNames[role], " must have the ", role < Role::correction ? "parameter's " : "", "shape ", wanted,
               " but got ", tensor.in[role]->shape());
      }
      if (role != Role::gradient) shapes.push_back(wanted);
    }
  }
  return shapes;
}

void AdamUpdate::check_layouts(const std::vector<NodeTensor>& tensors) const {
  for (auto& tensor : tensors) {
    for (size_t role = Role::m; role < Role::kCount; ++role) {
      auto x = tensor.in[role];
      if (!x || !must_be_row_major(node_.formats, role)) continue;
      // MLX does not always flag empty arrays as row-major.
      if (x->size() > 0 && !x->flags().row_contiguous) {
        reject(
            "m, v, scales and remainder of a compiled update must be row-major but got one of "
            "shape ",
            x->shape(), " that is not");
      }
    }
  }
}

}  // namespace fused_adam
