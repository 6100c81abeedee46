// The Python module _emulator: runs a kernel of any MSL source on NumPy arrays, for calibration and for the tests of
// the emulator itself, and steers what the emulated extension does.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/map.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/set.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>
#include <sys/mman.h>

#include <stdexcept>

#include "counter.h"
#include "dispatch.h"
#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/scheduler.h"

namespace nb = nanobind;
namespace mx = mlx::core;
using namespace nb::literals;

namespace {

// A buffer of a dispatch: index, array, and how the host declares it: "input", "output", "both" or "bytes".
using Buffer = std::tuple<int, nb::ndarray<nb::device::cpu, nb::c_contig>, std::string>;
using Sides = std::tuple<uint64_t, uint64_t, uint64_t>;

emulator::Size to_size(Sides s) { return {std::get<0>(s), std::get<1>(s), std::get<2>(s)}; }

void run(const std::string& source, const std::string& kernel, const std::vector<Buffer>& buffers, Sides grid,
         Sides threads_per_threadgroup, const std::vector<std::pair<int, size_t>>& threadgroup_memory,
         const std::vector<std::string>& include_dirs) {
  static std::map<std::string, std::shared_ptr<emulator::Library>> loaded;
  auto& library = loaded[source + emulator::variant_key()];
  if (!library) library = emulator::load_library(source, include_dirs);
  emulator::Dispatch dispatch;
  dispatch.library = library;
  auto found = library->kernels.find(kernel);
  if (found == library->kernels.end()) throw std::invalid_argument("no kernel " + kernel);
  dispatch.kernel = found->second;
  for (auto& [index, array, use] : buffers) {
    emulator::Binding binding;
    binding.index = index;
    binding.element_size = array.itemsize();
    binding.input = use != "output";
    binding.output = use == "output" || use == "both";
    auto data = static_cast<char*>(array.data());
    if (use == "bytes") {
      binding.bytes.assign(data, data + array.nbytes());
    } else {
      binding.data = data;
      binding.size = array.nbytes();
    }
    dispatch.bindings.push_back(std::move(binding));
  }
  dispatch.threadgroup_memory = threadgroup_memory;
  dispatch.grid = to_size(grid);
  dispatch.threads_per_threadgroup = to_size(threads_per_threadgroup);
  emulator::validate(dispatch);
  emulator::run(dispatch);
}

// An array in memory that is there already. Since mlx 0.32.4 its constructor takes the owner of a buffer.
template <typename Array>
Array over(mx::allocator::Buffer buffer, mx::Shape shape, mx::Dtype dtype, auto release) {
  if constexpr (requires { Array(buffer, shape, dtype, release); }) {
    return Array(buffer, shape, dtype, release);
  } else {
    return Array(typename Array::Data(buffer, release), shape, dtype);
  }
}

// Zeros whose pages exist only once they are touched.
mx::array sparse_zeros(std::vector<int64_t> shape, mx::Dtype dtype) {
  size_t count = 1;
  for (int64_t n : shape) count *= size_t(n);
  size_t page = 4096, bytes = count * mx::size_of(dtype);
  char* range = static_cast<char*>(
      mmap(nullptr, page + bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (range == MAP_FAILED) throw std::bad_alloc();
  // MLX's CPU allocator keeps the size in front of the data; the data itself begins at a page.
  char* header = range + page - sizeof(size_t);
  *reinterpret_cast<size_t*>(header) = bytes;
  auto release = [range, length = page + bytes](mx::allocator::Buffer) { munmap(range, length); };
  mx::Shape mx_shape(shape.begin(), shape.end());
  return over<mx::array>(mx::allocator::Buffer(header), mx_shape, dtype, release);
}

nb::dict stop_counting() {
  nb::dict result;
  for (auto& [kernel, counts] : emulator::stop_counting()) {
    auto traffic = [](const std::map<int, emulator::Traffic>& buffers) {
      nb::dict by_buffer;
      for (auto& [buffer, t] : buffers) {
        by_buffer[nb::int_(buffer)] = nb::make_tuple(t.lines, t.group_lines, t.own_lines);
      }
      return by_buffer;
    };
    nb::dict of_kernel;
    of_kernel["reads"] = traffic(counts.reads);
    of_kernel["writes"] = traffic(counts.writes);
    of_kernel["cycles"] = nb::make_tuple(counts.cycles, counts.fewest_cycles);
    result[kernel.c_str()] = of_kernel;
  }
  return result;
}

void settle() {
  auto stream = mx::default_stream(mx::Device::cpu);
  try {
    mx::synchronize(stream);
  } catch (const std::exception&) {  // the error of the evaluation, which its caller has seen
  }
  while (mx::scheduler::n_active_tasks() > 0) mx::scheduler::notify_task_completion(stream);
}

}  // namespace

NB_MODULE(_emulator, m) {
  m.doc() = "The Metal emulator: runs MSL kernels on the CPU and checks every access.";
  nb::module_::import_("mlx.core");
  m.def("run", &run, "source"_a, "kernel"_a, "buffers"_a, "grid"_a, "threads_per_threadgroup"_a,
        "threadgroup_memory"_a = std::vector<std::pair<int, size_t>>(), "include_dirs"_a = std::vector<std::string>(),
        nb::call_guard<nb::gil_scoped_release>());
  m.def("sparse_zeros", &sparse_zeros, "shape"_a, "dtype"_a,
        "Zeros of any size: only pages that are touched take memory.");
  m.def("run_only_threadgroups", &emulator::run_only_threadgroups, "first"_a, "end"_a,
        "Dispatches run only these of their threadgroups, by row-major index, from now on.");
  m.def("run_all_threadgroups", &emulator::run_all_threadgroups);
  m.def("set_largest_threadgroup", &emulator::set_largest_threadgroup, "threads"_a,
        "The threads of a threadgroup that kernels can run from now on, at most 1024.");
  m.def("replace_in_shaders", &emulator::replace_in_shaders, "old_text"_a, "new_text"_a,
        "Plants a fault in every shader compiled from now on; an empty old_text ends it.");
  m.def("settle", &settle, nb::call_guard<nb::gil_scoped_release>(),
        "After an evaluation that failed: brings MLX's count of active tasks back to 0, where an "
        "error met while "
        "encoding has left it too high. With that count wrong for ever, a later evaluation could "
        "wait for ever.");
  m.def("start_counting", &emulator::start_counting, "Counts the memory accesses of dispatches from now on.");
  m.def("stop_counting", &stop_counting,
        "The counts since start_counting(), by kernel: 'reads' and 'writes', {buffer: (lines by access of a "
        "simdgroup, by threadgroup, by dispatch)}, and 'cycles', (used, needed) by threadgroup memory.");
  m.def("take_libraries", &emulator::take_libraries,
        "Names of the libraries, of one kernel each, that the host has asked for since the last call.");
  m.def("dispatches", [] { return emulator::statistics().by_kernel; }, "How often each kernel has been run.");
}
