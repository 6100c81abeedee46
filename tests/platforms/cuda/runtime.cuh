// Runs a kernel of the translated shader (which stands before this text) on host arrays, for run.py.
// Every array gets device memory of exactly its size, so that compute-sanitizer sees an access beyond it.
#include <cstdio>
#include <cstring>
#include <map>
#include <string>

namespace {

std::string failure;

bool succeeded(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return true;
  failure = std::string(what) + ": " + cudaGetErrorString(error);
  return false;
}

}  // namespace

// Arrays at one address share their device memory. Outputs start as 0xFF bytes. Returns the failure, or a null pointer.
extern "C" const char* run_kernel(const char* name, int count, const int* indices, void** arrays, const size_t* sizes,
                                  const int* is_input, const int* is_output, const unsigned* grid,
                                  const unsigned* group) {
  failure.clear();
  const emulator::Entry* entry = nullptr;
  for (auto& candidate : emulator_table) {
    if (std::strcmp(candidate.name, name) == 0) entry = &candidate;
  }
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
  auto blocks = [&](int axis) { return (grid[axis] + group[axis] - 1) / group[axis]; };
  if (ok) {
    entry->kernel<<<dim3(blocks(0), blocks(1), blocks(2)), dim3(group[0], group[1], group[2])>>>(arguments);
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
