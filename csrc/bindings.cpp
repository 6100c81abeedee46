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

#include <stdexcept>

#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "op/adam_update.h"
#include "op/grad_norm.h"
#include "op/quantize.h"
#include "op/streams.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;

using Arrays = std::vector<mx::array>;
// (remainder, m_scale, v_scale) of each tensor, or none of any.
using Extra = std::optional<mx::array>;
using Extras = std::vector<std::tuple<Extra, Extra, Extra>>;

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

  m.def(
      "adam_update",
      [](Arrays parameters, Arrays gradients, Arrays m, Arrays v, const mx::array& learning_rate,
         const std::optional<mx::array>& step, double beta1, double beta2, double eps,
         double weight_decay, bool bias_correction, const std::tuple<bool, bool, bool>& rounding,
         uint64_t seed, const std::vector<uint32_t>& numbers, const fused_adam::IsFused& is_fused,
         bool wide_indices, mx::StreamOrDevice stream, const fused_adam::TensorName& name,
         const Extras& extras, const Extra& gradient_scale, const Extra& is_applied) {
        auto [of_parameter, of_m, of_v] = rounding;
        fused_adam::AdamTensors tensors{std::move(parameters), std::move(gradients), std::move(m),
                                        std::move(v)};
        for (auto& [remainder, m_scale, v_scale] : extras) {
          tensors.extras.push_back({remainder, m_scale, v_scale});
        }
        auto results = fused_adam::adam_update(
            tensors, learning_rate, step, {gradient_scale, is_applied},
            {beta1, beta2, eps, weight_decay, bias_correction}, {of_parameter, of_m, of_v, seed},
            numbers, is_fused, wide_indices, stream, name);
        Extras new_extras;
        for (auto& x : results.extras) new_extras.emplace_back(x.remainder, x.m_scale, x.v_scale);
        return std::make_tuple(std::move(results.parameters), std::move(results.m),
                               std::move(results.v), std::move(new_extras));
      },
      "parameters"_a, "gradients"_a, "m"_a, "v"_a, "learning_rate"_a, "step"_a.none(),
      nb::kw_only(), "beta1"_a, "beta2"_a, "eps"_a, "weight_decay"_a, "bias_correction"_a,
      "rounding"_a = std::make_tuple(false, false, false), "seed"_a = 0,
      "numbers"_a = std::vector<uint32_t>(), "is_fused"_a, "wide_indices"_a = false,
      "stream"_a = nb::none(), "name"_a, "extras"_a = Extras(), "gradient_scale"_a = nb::none(),
      "is_applied"_a = nb::none(),
      R"(Lazily update every tensor; lists run in parallel. Returns (parameters, m, v, extras).

``extras`` are (remainder, m_scale, v_scale) of each tensor, each of which may be None: the remainder (int16) of a bfloat16 parameter, and the scales (bfloat16) of m (int8) and v (uint8). ``is_fused(p, g, m, remainder)`` is asked once for each combination of dtypes; where it says False, the update is composed of MLX's operations instead, or run by the CPU's kernel if there are extras. ``rounding`` says which of parameter, m and v are rounded stochastically where they have 8 or 16 bits; the bits depend on ``seed``, ``step``, the tensor's of ``numbers`` (its place in the lists if they are empty) and the element. ``wide_indices=True`` makes kernels index in 64 bits, as huge tensors need. ``gradient_scale`` multiplies gradients; where ``is_applied`` is false, results are what was given, bit for bit; both are scalar arrays. ``name(i)`` names tensor ``i`` in an error. Raises ValueError for shapes, dtypes or values that do not fit.)");

  m.def(
      "traffic_probe",
      [](const mx::array& parameter, const mx::array& gradient, const mx::array& m,
         const mx::array& v, mx::StreamOrDevice stream) {
        auto results = fused_adam::traffic_probe({{parameter}, {gradient}, {m}, {v}}, stream,
                                                 [](size_t) { return "the probe"; });
        return std::make_tuple(results.parameters[0], results.m[0], results.v[0]);
      },
      "parameter"_a, "gradient"_a, "m"_a, "v"_a, "stream"_a = nb::none(),
      "The memory traffic of one update with an addition in place of its arithmetic, for "
      "benchmarks.");

  m.def("sum_of_squares", &fused_adam::sum_of_squares, "gradients"_a, nb::kw_only(), "is_fused"_a,
        "stream"_a = nb::none(),
        "The sum of the squares of all gradients, lazily: a float32 scalar, not finite if a "
        "gradient or the sum is not. ``is_fused(dtype)`` is asked once for each dtype.");

  m.def("quantize_moment", &fused_adam::quantize_moment, "moment"_a, "is_v"_a,
        "Codes (int8, or uint8 for v) and their blocks' scales, lazily, on the CPU.");
  m.def("dequantize_moment", &fused_adam::dequantize_moment, "codes"_a, "scales"_a,
        "The float32 values of codes and scales, lazily, on the CPU.");

  m.def("note_idle_stream", &fused_adam::note_idle_stream, "stream"_a,
        "Tell that a stream is for self-checks alone, so that updates elsewhere need not reckon "
        "with it.");
  m.def("updated_tensors", &fused_adam::updated_tensors,
        "How many tensors the kernels have updated since the process began, self-checks left out: "
        "on the CPU, on the GPU. Counts what was run, not what was traced.");
  m.def("num_threads", &fused_adam::num_threads, "Threads that one CPU update may use.");
  m.def("set_num_threads", &fused_adam::set_num_threads, "count"_a,
        "Set the threads that one CPU update may use; 1 runs it on MLX's own stream thread.");
  m.def(
      "cpu_isa", [] { return fused_adam::cpu::kernels().isa; },
      "The instruction set of the CPU kernels in use.");
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
