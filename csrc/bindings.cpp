// The Python module mlx_fused_adam._ext: names and docstrings only. Shares MLX's nanobind domain, so mlx.core.array and
// streams pass through as they are.
#include <nanobind/nanobind.h>
#include <nanobind/stl/function.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/variant.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <iterator>
#include <stdexcept>

#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "op/adam_update.h"
#include "op/grad_norm.h"
#include "op/quantize.h"
#include "op/streams.h"
#include "tree.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;

using fused_adam::AdamStep;
using fused_adam::AdamTensor;
using Array = std::optional<mx::array>;

// The arrays of a state by its dict's keys. Interned once: with hundreds of small tensors, making strings would show.
enum StateKey { kM, kV, kRemainder, kMScale, kVScale, kStateKeys };

static PyObject* key_of(StateKey key) {
  static const char* const names[] = {"m", "v", "remainder", "m_scale", "v_scale"};
  static PyObject* keys[kStateKeys];
  if (!keys[key]) keys[key] = PyUnicode_InternFromString(names[key]);
  return keys[key];
}

// An array of a state, or nothing; TypeError if it is something else.
static Array array_of(const nb::dict& state, StateKey key) {
  nb::handle found = PyDict_GetItemWithError(state.ptr(), key_of(key));
  if (!found || found.is_none()) return std::nullopt;
  mx::array* array = nullptr;
  if (!nb::try_cast(found, array)) {
    throw nb::type_error((nb::cast<std::string>(nb::handle(key_of(key))) + " must be an array").c_str());
  }
  return *array;
}

static AdamTensor tensor_of(mx::array&& parameter, mx::array&& gradient, const nb::dict& state) {
  auto m = array_of(state, kM), v = array_of(state, kV);
  if (!m || !v) throw nb::type_error(m ? "v must be an array" : "m must be an array");
  AdamTensor tensor{std::move(parameter), std::move(gradient), std::move(*m), std::move(*v)};
  if (state.size() > 2) {
    tensor.correction = array_of(state, kRemainder);
    tensor.m_scale = array_of(state, kMScale);
    tensor.v_scale = array_of(state, kVScale);
  }
  return tensor;
}

static nb::dict state_of(const AdamTensor& tensor) {
  nb::dict state;
  auto set = [&](StateKey key, const mx::array& x) {
    if (PyDict_SetItem(state.ptr(), key_of(key), nb::cast(x).ptr())) nb::raise_python_error();
  };
  set(kM, tensor.m);
  set(kV, tensor.v);
  if (tensor.correction) set(kRemainder, *tensor.correction);
  if (tensor.m_scale) set(kMScale, *tensor.m_scale);
  if (tensor.v_scale) set(kVScale, *tensor.v_scale);
  return state;
}

static Array decay_of(const std::variant<double, mx::array>& weight_decay) {
  if (auto array = std::get_if<mx::array>(&weight_decay)) return *array;
  double value = std::get<double>(weight_decay);
  if (!std::isfinite(value)) {
    throw std::invalid_argument("[adam_update] weight_decay must be finite but got " + std::to_string(value));
  }
  if (value == 0.0) return std::nullopt;
  return mx::array(float(value));
}

// By StochasticRounding.
static constexpr const char* kRoundings[] = {"nearest", "parameter_and_v", "all"};

static fused_adam::StochasticRounding rounding_of(const std::string& request) {
  for (int i = 0; i < int(std::size(kRoundings)); ++i) {
    if (request == kRoundings[i]) return fused_adam::StochasticRounding(i);
  }
  throw std::invalid_argument("[AdamStep] rounding must be 'nearest', 'parameter_and_v' or 'all' but got '" + request +
                              "'");
}

// Asks Python about a combination: uses_kernel(parameter, gradient, m, remainder or None, rounding) -> bool.
using UsesDtypes = std::function<bool(mx::Dtype, mx::Dtype, mx::Dtype, std::optional<mx::Dtype>, const char*)>;

static fused_adam::UsesKernel by_formats(const UsesDtypes& uses_kernel) {
  return [&uses_kernel](const fused_adam::TensorFormats& formats, fused_adam::StochasticRounding rounding) {
    std::optional<mx::Dtype> correction;
    if (formats.has_correction()) {
      correction = fused_adam::correction_bytes(formats.parameter) == 1 ? mx::int8 : mx::int16;
    }
    return uses_kernel(fused_adam::dtype_of(formats.parameter), fused_adam::dtype_of(formats.gradient),
                       fused_adam::dtype_of(formats.m), correction, kRoundings[int(rounding)]);
  };
}

// Modules whose nanobind has another ABI share no types: each call would fail, as "incompatible function arguments".
static void reject_another_abi() {
  if (nb::type<mx::array>().is_valid()) return;
  throw std::runtime_error(
      "mlx-fused-adam was built with nanobind " NB_TOSTRING(NB_VERSION_MAJOR) "." NB_TOSTRING(
          NB_VERSION_MINOR) "." NB_TOSTRING(NB_VERSION_PATCH)
      " and cannot see the arrays of this mlx, which was built with another ABI of nanobind. "
      "Install the mlx that this package was built beside, or build the package for this one: "
      "docs/mlx-releases.md");
}

NB_MODULE(_ext, m) {
  m.doc() = "The fused Adam operation on lists of MLX arrays.";
  nb::module_::import_("mlx.core");  // registers the types that the signatures below name
  reject_another_abi();
  fused_adam::cpu::kernels();  // a bad setting is an error at import, not in a stream's thread

  nb::class_<AdamStep>(m, "AdamStep",
                       R"(One step of an optimizer: all that its tensors share.

``learning_rate`` and ``step`` are scalar arrays and may be lazy, and so may ``weight_decay``, a number or an array; ``step`` counts from 1 and is needed with bias correction and stochastic rounding. ``rounding`` says which results are rounded stochastically where they have 8 or 16 bits: ``"nearest"`` (none), ``"parameter_and_v"`` or ``"all"``; the bits depend on ``seed``, ``step``, a tensor's number and the element. ``gradient_scale`` multiplies gradients; where ``is_applied`` is false, results are the old values, bit for bit; both are scalar arrays. ``wide_indices=True`` makes kernels index in 64 bits, as huge tensors need.)")
      .def(
          "__init__",
          [](AdamStep* self, const mx::array& learning_rate, const Array& step, std::pair<double, double> betas,
             double eps, const std::variant<double, mx::array>& weight_decay, bool bias_correction,
             const std::string& rounding, uint64_t seed, const Array& gradient_scale, const Array& is_applied,
             bool wide_indices) {
            new (self) AdamStep{learning_rate,
                                step,
                                betas.first,
                                betas.second,
                                eps,
                                decay_of(weight_decay),
                                bias_correction,
                                rounding_of(rounding),
                                seed,
                                gradient_scale,
                                is_applied,
                                wide_indices};
          },
          "learning_rate"_a, "step"_a = nb::none(), nb::kw_only(), "betas"_a = std::make_pair(0.9, 0.999),
          "eps"_a = 1e-8, "weight_decay"_a = 0.0, "bias_correction"_a = false, "rounding"_a = "nearest", "seed"_a = 0,
          "gradient_scale"_a = nb::none(), "is_applied"_a = nb::none(), "wide_indices"_a = false);

  m.def(
      "adam_update",
      [](std::vector<mx::array> parameters, std::vector<mx::array> gradients, const std::vector<nb::dict>& states,
         const AdamStep& step, const std::vector<uint32_t>& numbers, const std::vector<bool>& is_decayed,
         const UsesDtypes& uses_kernel, mx::StreamOrDevice stream, const fused_adam::TensorName& name) {
        size_t count = parameters.size();
        for (size_t size : {gradients.size(), states.size(), numbers.empty() ? count : numbers.size(),
                            is_decayed.empty() ? count : is_decayed.size()}) {
          if (size != count) throw std::invalid_argument("[adam_update] lists must have one length");
        }
        std::vector<AdamTensor> tensors;
        tensors.reserve(count);
        for (size_t i = 0; i < count; ++i) {
          auto& tensor = tensors.emplace_back(tensor_of(std::move(parameters[i]), std::move(gradients[i]), states[i]));
          tensor.number = numbers.empty() ? i : numbers[i];
          tensor.is_decayed = is_decayed.empty() || is_decayed[i];
        }
        tensors = fused_adam::adam_update(std::move(tensors), step, by_formats(uses_kernel), stream, name);
        nb::list new_parameters, new_states;
        for (auto& tensor : tensors) {
          new_parameters.append(tensor.parameter);
          new_states.append(state_of(tensor));
        }
        return std::make_pair(new_parameters, new_states);
      },
      "parameters"_a, "gradients"_a, "states"_a, "step"_a, nb::kw_only(), "numbers"_a = std::vector<uint32_t>(),
      "is_decayed"_a = std::vector<bool>(), "uses_kernel"_a, "stream"_a = nb::none(), "name"_a,
      R"(Lazily update every tensor; lists run in parallel. Returns (parameters, states).

A state is a dict with ``m``, ``v`` and where there are any ``remainder`` (int16, or int8 for a master weight of 24 bits, of a bfloat16 parameter), ``m_scale`` and ``v_scale`` (bfloat16, of int8 m and uint8 v, or of both in 4 bits, two to a byte, uint8); other keys are ignored. ``numbers`` are the tensors' in the random bits (default: their places in the lists), ``is_decayed`` says to which weight decay applies (default: all). ``uses_kernel(parameter, gradient, m, remainder, rounding)`` is asked once for each combination of dtypes, before the graph is built; ``rounding`` is the request as far as it concerns those; where it says False, the update is the fallback of MLX's operations, or the CPU's kernel for states that MLX cannot store. ``name(i)`` names tensor ``i`` in an error. Raises ValueError for shapes, dtypes or values that do not fit.)");

  nb::class_<fused_adam::Walk>(m, "Walk",
                               R"(The leaves of gradients, and beside them those of parameters and states, by one walk.

Trees are dicts, lists and tuples; ``gradients``, ``parameters`` and ``states`` are parallel lists in the order of ``mlx.utils.tree_flatten``. ``is_fused`` says whether all parameters are arrays of dtypes that kernels store. Raises what Python raises for an item that parameters or states lack.)")
      .def(nb::init<nb::object, nb::handle, nb::handle>(), "gradients"_a.none(), "parameters"_a.none(),
           "states"_a.none())
      .def_ro("gradients", &fused_adam::Walk::gradients)
      .def_ro("parameters", &fused_adam::Walk::parameters)
      .def_ro("states", &fused_adam::Walk::states)
      .def_ro("is_fused", &fused_adam::Walk::is_fused)
      .def("result", &fused_adam::Walk::result, "leaves"_a,
           "The tree of the leaves' results, in containers of the gradients' types as they were found.");

  nb::class_<fused_adam::Changes>(m, "Changes", "New values in states: a list of mappings, and one of dicts beside it.")
      .def(nb::init<nb::list, nb::list>(), "states"_a, "changed"_a)
      .def("apply", &fused_adam::Changes::apply, "Give the states the new values, all or none.")
      .def("undo", &fused_adam::Changes::undo, "Give them the old ones, if they have the new ones; all or none.");

  m.def("sum_of_squares", &fused_adam::sum_of_squares, "gradients"_a, nb::kw_only(), "uses_kernel"_a,
        "stream"_a = nb::none(),
        "The sum of the squares of all gradients, lazily: a float32 scalar, not finite if a "
        "gradient or the sum is not. ``uses_kernel(dtype)`` is asked once for each dtype.");

  m.def("quantize_moment", &fused_adam::quantize_moment, "moment"_a, "is_v"_a, "bits"_a = 8,
        "Quantized values (int8, or uint8 for v and for 4 bits) and their blocks' scales, lazily, on the CPU.");
  m.def(
      "dequantize_moment", &fused_adam::dequantize_moment, "quantized"_a, "scales"_a, "is_v"_a = false,
      "columns"_a = nb::none(),
      "The float32 values of a quantized moment, lazily, on the CPU; with ``columns``, those of its last axis, of one "
      "of 4 bits.");

  m.def("note_idle_stream", &fused_adam::note_idle_stream, "stream"_a,
        "Tell that a stream is for self-checks alone, so that updates elsewhere need not reckon "
        "with it.");
  m.def("updated_tensors", &fused_adam::updated_tensors,
        "How many tensors the kernels have updated since the process began, self-checks left out: "
        "on the CPU, on the GPU. Counts what was run, not what was traced.");
  m.def("num_threads", &fused_adam::num_threads, "Threads that one CPU update may use.");
  m.def("set_num_threads", &fused_adam::set_num_threads, "count"_a,
        "Set the threads that one CPU update may use; 1 runs it on MLX's own stream thread.");
  m.def("cpu_isa", [] { return fused_adam::cpu::kernels().isa; }, "The instruction set of the CPU kernels in use.");
  m.def(
      "supported_cpu_isas",
      [] {
        std::vector<std::string> names;
        for (size_t i = 0; auto set = fused_adam::cpu::supported_kernels(i); ++i) {
          names.emplace_back(set->isa);
        }
        return names;
      },
      "The instruction sets to choose from on this machine, best first.");
  auto backend = [](fused_adam::Backend b) {
    auto text = [](const char* s) { return s ? std::optional<std::string>(s) : std::nullopt; };
    return std::make_tuple(text(b.name), text(b.reason), b.tensors_per_node);
  };
  m.def(
      "cpu_backend", [=] { return backend(fused_adam::cpu_backend()); },
      "(name, None, tensors a node) of what runs updates on the CPU.");
  m.def(
      "gpu_backend", [=] { return backend(fused_adam::gpu_backend()); },
      "(name, None, tensors a node) of what runs updates on the GPU, or (None, reason, 1).");
}
