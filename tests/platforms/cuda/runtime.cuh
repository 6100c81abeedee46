// Runs a kernel of the translated shader (which stands before this text) on host arrays, for run.py.
// Every array gets device memory of exactly its size, so that compute-sanitizer sees an access beyond it.
#include <cstdio>
#include <cstring>
#include <map>
#include <string>
#include <vector>

namespace {

std::string failure;

bool succeeded(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return true;
  failure = std::string(what) + ": " + cudaGetErrorString(error);
  return false;
}

const emulator::Entry* entry_of(const char* name) {
  for (auto& candidate : emulator_table) {
    if (std::strcmp(candidate.name, name) == 0) return &candidate;
  }
  return nullptr;
}

void launch(const emulator::Entry& entry, const emulator::Arguments& arguments, const unsigned* grid,
            const unsigned* group) {
  auto blocks = [&](int axis) { return (grid[axis] + group[axis] - 1) / group[axis]; };
  entry.kernel<<<dim3(blocks(0), blocks(1), blocks(2)), dim3(group[0], group[1], group[2])>>>(arguments);
}

// Milliseconds of each repetition, after three that are not timed.
template <typename Work>
bool time_each(int repetitions, float* milliseconds, Work work) {
  cudaEvent_t begin, end;
  if (!succeeded(cudaEventCreate(&begin), "making an event")) return false;
  if (!succeeded(cudaEventCreate(&end), "making an event")) return false;
  bool ok = true;
  for (int i = -3; i < repetitions && ok; ++i) {
    cudaEventRecord(begin);
    work();
    cudaEventRecord(end);
    ok = succeeded(cudaGetLastError(), "launching") && succeeded(cudaEventSynchronize(end), "running");
    if (ok && i >= 0) ok = succeeded(cudaEventElapsedTime(&milliseconds[i], begin, end), "timing");
  }
  cudaEventDestroy(begin);
  cudaEventDestroy(end);
  return ok;
}

}  // namespace

// The GPU's name.
extern "C" const char* card_name() {
  static cudaDeviceProp properties;
  return cudaGetDeviceProperties(&properties, 0) == cudaSuccess ? properties.name : "unknown";
}

// Times a kernel. Buffer i has sizes[i] bytes: those at values[i], or, where that is null, the memory of the earlier
// buffer same_as[i], or any numbers if that is negative.
extern "C" const char* time_kernel(const char* name, int count, const int* indices, void** values, const int* same_as,
                                   const size_t* sizes, const unsigned* grid, const unsigned* group, int repetitions,
                                   float* milliseconds) {
  failure.clear();
  auto entry = entry_of(name);
  if (!entry) return "there is no such kernel";
  constexpr int kSomeByte = 0x3c;  // 0.01 in float32 and bfloat16, 1.06 in float16
  emulator::Arguments arguments = {};
  std::vector<void*> memory;
  bool ok = true;
  for (int i = 0; i < count && ok; ++i) {
    if (same_as[i] >= 0) {
      arguments.buffers[indices[i]] = arguments.buffers[indices[same_as[i]]];
      continue;
    }
    void* place = nullptr;
    ok = succeeded(cudaMalloc(&place, sizes[i]), "cudaMalloc");
    if (!ok) break;
    memory.push_back(place);
    ok = succeeded(values[i] ? cudaMemcpy(place, values[i], sizes[i], cudaMemcpyHostToDevice)
                             : cudaMemset(place, kSomeByte, sizes[i]),
                   "filling a buffer");
    arguments.buffers[indices[i]] = place;
  }
  arguments.threads_per_grid = {grid[0], grid[1], grid[2]};
  ok = ok && time_each(repetitions, milliseconds, [&] { launch(*entry, arguments, grid, group); });
  for (void* place : memory) cudaFree(place);
  return ok ? nullptr : failure.c_str();
}

// Times a copy within the GPU's memory.
extern "C" const char* time_copy(size_t size, int repetitions, float* milliseconds) {
  failure.clear();
  void *from = nullptr, *to = nullptr;
  bool ok = succeeded(cudaMalloc(&from, size), "cudaMalloc") && succeeded(cudaMalloc(&to, size), "cudaMalloc") &&
            succeeded(cudaMemset(from, 1, size), "filling a buffer");
  ok = ok && time_each(repetitions, milliseconds,
                       [&] { cudaMemcpyAsync(to, from, size, cudaMemcpyDeviceToDevice); });
  cudaFree(from);
  cudaFree(to);
  return ok ? nullptr : failure.c_str();
}

// Arrays at one address share their device memory. Outputs start as 0xFF bytes. Returns the failure, or a null pointer.
extern "C" const char* run_kernel(const char* name, int count, const int* indices, void** arrays, const size_t* sizes,
                                  const int* is_input, const int* is_output, const unsigned* grid,
                                  const unsigned* group) {
  failure.clear();
  auto entry = entry_of(name);
  if (!entry) return "there is no such kernel";

  emulator::Arguments arguments = {};
  std::map<void*, void*> device_memory;
  bool ok = true;
  for (int i = 0; i < count && ok; ++i) {
    auto [place, is_new] = device_memory.emplace(arrays[i], nullptr);
    if (is_new) {
      ok = succeeded(cudaMalloc(&place->second, sizes[i]), "cudaMalloc") &&
           succeeded(is_input[i] ? cudaMemcpy(place->second, arrays[i], sizes[i], cudaMemcpyHostToDevice)
                                 : cudaMemset(place->second, 0xff, sizes[i]),
                     "filling a buffer");
    }
    arguments.buffers[indices[i]] = place->second;
  }
  arguments.threads_per_grid = {grid[0], grid[1], grid[2]};
  if (ok) {
    launch(*entry, arguments, grid, group);
    ok = succeeded(cudaGetLastError(), "launching") && succeeded(cudaDeviceSynchronize(), "running");
  }
  for (int i = 0; i < count && ok; ++i) {
    if (!is_output[i]) continue;
    ok = succeeded(cudaMemcpy(arrays[i], device_memory[arrays[i]], sizes[i], cudaMemcpyDeviceToHost),
                   "reading a buffer");
  }
  for (auto& [host, device] : device_memory) cudaFree(device);
  return ok ? nullptr : failure.c_str();
}
