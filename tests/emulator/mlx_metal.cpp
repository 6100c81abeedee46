// What include/mlx/backend/metal/device.h declares. Mistakes that Metal's validation layer would report, and every
// fault of a kernel, become exceptions: at the dispatch, or out of mx.eval as a failure of the stream's task.
#include <cstring>
#include <stdexcept>

#include "dispatch.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/backend/metal/device.h"
#include "mlx/scheduler.h"

namespace mlx::core::metal {

namespace {

constexpr size_t kMaxBytes = 4096;

emulator::Size to_size(MTL::Size s) { return {s.width, s.height, s.depth}; }

// The bytes from an array's lowest element to its highest, relative to its first.
std::pair<int64_t, int64_t> extent(const array& a) {
  int64_t low = 0, high = int64_t(a.itemsize());
  for (int i = 0; i < a.ndim(); ++i) {
    int64_t span = (int64_t(a.shape(i)) - 1) * a.strides(i) * int64_t(a.itemsize());
    (span < 0 ? low : high) += span;
  }
  return a.size() == 0 ? std::pair<int64_t, int64_t>(0, 0) : std::pair(low, high);
}

}  // namespace

CommandEncoder::CommandEncoder(Stream stream) : stream_(stream), next_(std::make_unique<emulator::Dispatch>()) {}

CommandEncoder::~CommandEncoder() = default;

CommandEncoder::ConcurrentContext::ConcurrentContext(CommandEncoder& encoder) : encoder_(encoder) {
  encoder_.is_concurrent_ = true;
}

CommandEncoder::ConcurrentContext::~ConcurrentContext() {
  encoder_.is_concurrent_ = false;
  encoder_.touched_.clear();
}

void CommandEncoder::note_concurrent(const emulator::Dispatch& dispatch) {
  size_t earlier = touched_.size();
  for (auto& binding : dispatch.bindings) {
    if (!binding.data) continue;
    Touched now{binding.data, binding.data + binding.size, binding.output};
    for (size_t i = 0; i < earlier; ++i) {
      auto& then = touched_[i];
      if ((now.is_written || then.is_written) && now.begin < then.end && then.begin < now.end) {
        throw std::logic_error("[emulator] " + std::string(dispatch.kernel->name) + ": buffer " +
                               std::to_string(binding.index) + " is " + (now.is_written ? "written" : "read") +
                               ", and " + (then.is_written ? "written" : "read") +
                               " by an earlier dispatch of the concurrent block: no barrier between");
      }
    }
    touched_.push_back(now);
  }
}

void CommandEncoder::set_compute_pipeline_state(MTL::ComputePipelineState* state) {
  next_->library = state->library;
  next_->kernel = state->kernel;
}

void CommandEncoder::set_buffer(const MTL::Buffer*, int, int64_t) {
  throw std::logic_error("[emulator] set_buffer is not emulated: a bare buffer has no declared use");
}

void CommandEncoder::bind(const array& a, int index, int64_t offset, bool is_output) {
  auto [low, high] = extent(a);
  emulator::Binding binding;
  binding.index = index;
  if (high > low && offset < high) {
    if (!a.data_shared_ptr()) {
      throw std::invalid_argument("[emulator] the array for buffer " + std::to_string(index) + " has no memory yet");
    }
    // Metal would let a kernel look before a piece of an array that begins at an offset, but no host means that.
    int64_t start = low < 0 ? low : offset;
    binding.data = const_cast<char*>(a.data<char>()) + start;
    binding.size = size_t(high - start);
    binding.first = size_t(offset - start);
    binding.offset = size_t(a.offset() + start);
    binding.memory = a.data_shared_ptr();
  }
  binding.element_size = a.itemsize();
  binding.input = !is_output;
  binding.output = is_output;
  next_->bindings.push_back(std::move(binding));
}

void CommandEncoder::set_input_array(const array& a, int index, int64_t offset) { bind(a, index, offset, false); }

void CommandEncoder::set_output_array(array& a, int index, int64_t offset) { bind(a, index, offset, true); }

void CommandEncoder::register_output_array(const array& a) { bind(a, -1, 0, true); }

void CommandEncoder::set_threadgroup_memory_length(size_t length, int index) {
  next_->threadgroup_memory.emplace_back(index, length);
}

void CommandEncoder::set_raw_bytes(const void* data, size_t size, int index) {
  if (size > kMaxBytes) {
    throw std::invalid_argument("[emulator] set_bytes of " + std::to_string(size) + " bytes; Metal takes at most 4096");
  }
  if (size == 0) throw std::invalid_argument("[emulator] set_bytes of 0 bytes, which Metal does not take");
  emulator::Binding binding;
  binding.index = index;
  binding.bytes.assign(static_cast<const char*>(data), static_cast<const char*>(data) + size);
  binding.input = true;
  next_->bindings.push_back(std::move(binding));
}

void CommandEncoder::add_temporary(array a) { cpu::get_command_encoder(stream_).add_temporary(std::move(a)); }

void CommandEncoder::add_temporaries(std::vector<array> arrays) {
  cpu::get_command_encoder(stream_).add_temporaries(std::move(arrays));
}

void CommandEncoder::dispatch_threads(MTL::Size grid, MTL::Size group) {
  // Metal would carry bindings over to the next dispatch, unless MLX began a new encoder in between: no host may count
  // on it.
  auto dispatch = std::make_shared<emulator::Dispatch>(std::move(*next_));
  *next_ = {};
  if (!dispatch->kernel) throw std::logic_error("[emulator] a dispatch without a pipeline state");
  dispatch->grid = to_size(grid);
  dispatch->threads_per_threadgroup = to_size(group);
  emulator::validate(*dispatch);
  if (is_concurrent_) note_concurrent(*dispatch);
  // As with the primitives of the CPU, MLX itself keeps the arrays of this node alive until its stream gets past it.
  // Not through the encoder's own dispatch: the count that it keeps of tasks would be off for ever after one that
  // threw.
  scheduler::enqueue(stream_, [dispatch] { emulator::run(*dispatch); });
}

void CommandEncoder::dispatch_threadgroups(MTL::Size grid, MTL::Size group) {
  dispatch_threads(MTL::Size(grid.width * group.width, grid.height * group.height, grid.depth * group.depth), group);
}

MTL::Library* Device::get_library(const std::string& name, const std::string&) {
  throw std::runtime_error("[emulator] there is no compiled library " + name + "; use a builder");
}

MTL::Library* Device::get_library(const std::string& name, const CompileOptions&,
                                  const std::function<std::string(void)>& builder) {
  emulator::note_library(name);
  std::lock_guard lock(mutex_);
  auto& library = libraries_[name + emulator::variant_key()];
  if (!library) {
    auto made = std::make_unique<MTL::Library>();
    made->library = emulator::load_library(builder());
    library = std::move(made);
  }
  return library.get();
}

void Device::clear_library(const std::string& name) {
  std::lock_guard lock(mutex_);
  libraries_.erase(name);
}

MTL::ComputePipelineState* Device::get_kernel(const std::string& base_name, MTL::Library* library,
                                              const std::string& hash_name, const MTLFCList& function_constants,
                                              const std::vector<MTL::Function*>& linked_functions) {
  if (!function_constants.empty() || !linked_functions.empty()) {
    throw std::runtime_error("[emulator] function constants and linked functions are not emulated");
  }
  std::lock_guard lock(mutex_);
  auto& kernels = library->library->kernels;
  auto found = kernels.find(base_name);
  if (found == kernels.end()) {
    throw std::runtime_error("[emulator] the library has no kernel " + base_name);
  }
  auto& pipeline = library->pipelines[hash_name.empty() ? base_name : hash_name];
  pipeline.library = library->library;
  pipeline.kernel = found->second;
  return &pipeline;
}

Device& device(mlx::core::Device) {
  static Device device;
  return device;
}

CommandEncoder& get_command_encoder(Stream s) {
  static std::mutex mutex;
  static std::unordered_map<int, CommandEncoder> encoders;
  std::lock_guard lock(mutex);
  return encoders.try_emplace(s.index, s).first->second;
}

}  // namespace mlx::core::metal
