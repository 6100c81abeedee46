// The few metal-cpp types that MLX's Metal interface names, for the emulator.
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

namespace emulator {
struct Kernel;
struct Library;
size_t largest_threadgroup();
}  // namespace emulator

namespace NS {
using UInteger = uintptr_t;
using Integer = intptr_t;
}  // namespace NS

namespace MTL {

struct Size {
  NS::UInteger width = 0, height = 0, depth = 0;
  Size() = default;
  Size(NS::UInteger w, NS::UInteger h, NS::UInteger d) : width(w), height(h), depth(d) {}
};

enum DataType : NS::UInteger { DataTypeNone = 0 };
class Buffer;
class Function;

class ComputePipelineState {
 public:
  std::shared_ptr<emulator::Library> library;
  const emulator::Kernel* kernel = nullptr;
  NS::UInteger maxTotalThreadsPerThreadgroup() const { return emulator::largest_threadgroup(); }
  NS::UInteger threadExecutionWidth() const { return 32; }
};

class Library {
 public:
  std::shared_ptr<emulator::Library> library;
  std::map<std::string, ComputePipelineState> pipelines;
};

}  // namespace MTL
