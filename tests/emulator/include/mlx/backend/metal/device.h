// Stands in for MLX's header of this name in the emulated build: the same names and signatures, as far as a primitive
// needs them. A dispatch is checked here and run by the emulator as a task of the CPU stream (mlx_metal.cpp).
#pragma once

#include <Metal/Metal.hpp>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <tuple>
#include <type_traits>
#include <unordered_map>
#include <vector>

#include "mlx/array.h"
#include "mlx/backend/common/metal_kernel.h"
#include "mlx/device.h"

namespace emulator {
struct Dispatch;
}

namespace mlx::core::metal {

using MTLFCList = std::vector<std::tuple<const void*, MTL::DataType, NS::UInteger>>;

class CommandEncoder {
 public:
  explicit CommandEncoder(Stream stream);
  ~CommandEncoder();
  CommandEncoder(const CommandEncoder&) = delete;
  CommandEncoder& operator=(const CommandEncoder&) = delete;

  // MLX puts no barriers between the dispatches of such a block. Here they run one after the other all the same, but
  // one that touches what an earlier one of the block has written, or writes what it has touched, is an error.
  struct ConcurrentContext {
    explicit ConcurrentContext(CommandEncoder& encoder);
    ~ConcurrentContext();

   private:
    CommandEncoder& encoder_;
  };
  ConcurrentContext start_concurrent() { return ConcurrentContext(*this); }
  void maybeInsertBarrier() {}
  void barrier() {}

  void set_compute_pipeline_state(MTL::ComputePipelineState* kernel);
  void set_buffer(const MTL::Buffer* buffer, int index, int64_t offset = 0);
  void set_input_array(const array& a, int index, int64_t offset = 0);
  void set_output_array(array& a, int index, int64_t offset = 0);
  void register_output_array(const array& a);
  void set_threadgroup_memory_length(size_t length, int index);

  template <typename Vec>
  void set_vector_bytes(const Vec& vec, size_t count, int index) {
    set_raw_bytes(vec.data(), count * sizeof(typename Vec::value_type), index);
  }
  template <typename Vec>
  void set_vector_bytes(const Vec& vec, int index) {
    set_vector_bytes(vec, vec.size(), index);
  }
  template <typename T>
  void set_bytes(const T* values, int count, int index) {
    set_raw_bytes(values, count * sizeof(T), index);
  }
  template <typename T>
  void set_bytes(const T& value, int index) {
    set_raw_bytes(&value, sizeof(T), index);
  }

  void add_temporary(array a);
  void add_temporaries(std::vector<array> arrays);

  void dispatch_threadgroups(MTL::Size grid, MTL::Size group);
  void dispatch_threads(MTL::Size grid, MTL::Size group);

 private:
  void set_raw_bytes(const void* data, size_t size, int index);
  void bind(const array& a, int index, int64_t offset, bool is_output);

  void note_concurrent(const emulator::Dispatch& dispatch);

  struct Touched {
    const char* begin;
    const char* end;
    bool is_written;
  };

  Stream stream_;
  std::unique_ptr<emulator::Dispatch> next_;  // what has been set for the dispatch to come
  bool is_concurrent_ = false;
  std::vector<Touched> touched_;  // by the dispatches of a concurrent block
};

class Device {
 public:
  MTL::Library* get_library(const std::string& name, const std::string& path = "");
  MTL::Library* get_library(const std::string& name, const CompileOptions& options,
                            const std::function<std::string(void)>& builder);
  MTL::Library* get_library(const std::string& name, const std::function<std::string(void)>& builder) {
    return get_library(name, {}, builder);
  }
  void clear_library(const std::string& name);
  MTL::ComputePipelineState* get_kernel(const std::string& base_name, MTL::Library* library,
                                        const std::string& hash_name = "", const MTLFCList& function_constants = {},
                                        const std::vector<MTL::Function*>& linked_functions = {});

  const std::string& get_architecture() const { return architecture_; }
  int get_architecture_gen() const { return 0; }

 private:
  std::string architecture_ = "emulated";
  std::mutex mutex_;
  std::unordered_map<std::string, std::unique_ptr<MTL::Library>> libraries_;
};

Device& device(mlx::core::Device);
CommandEncoder& get_command_encoder(Stream s);

}  // namespace mlx::core::metal
