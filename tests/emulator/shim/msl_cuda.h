// Metal's standard library for nvcc: what a shader translated for CUDA includes first. A threadgroup is a block, a
// simdgroup a warp; a kernel is a device function that a generated __global__ function calls with its parameters.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <utility>

#include "abi.h"
#include "msl_math.h"

namespace metal {

struct mem_flags {
  int value;
  __device__ constexpr mem_flags(int v) : value(v) {}
  static constexpr int mem_none = 0, mem_device = 1, mem_threadgroup = 2, mem_texture = 4;
};
__device__ inline void threadgroup_barrier(mem_flags) { __syncthreads(); }
__device__ inline void simdgroup_barrier(mem_flags) { __syncwarp(); }

template <typename T>
__device__ T simd_shuffle_xor(T x, int mask) {
  return __shfl_xor_sync(__activemask(), x, mask);
}
#define MSL_SIMD_REDUCTION(name, expression)   \
  template <typename T>                        \
  __device__ T name(T a) {                     \
    for (int mask = 16; mask > 0; mask /= 2) { \
      T b = simd_shuffle_xor(a, mask);         \
      a = expression;                          \
    }                                          \
    return a;                                  \
  }
MSL_SIMD_REDUCTION(simd_sum, a + b)
MSL_SIMD_REDUCTION(simd_max, a < b ? b : a)
MSL_SIMD_REDUCTION(simd_min, b < a ? b : a)
#undef MSL_SIMD_REDUCTION

}  // namespace metal

namespace emulator {

constexpr int kMaxBuffers = 31;

struct Arguments {
  void* buffers[kMaxBuffers];
  Position threads_per_grid;
};

constexpr int encode(Role role, int index) { return static_cast<int>(role) << 16 | index; }
constexpr int buffer(int index) { return encode(Role::buffer, index); }
constexpr int builtin(Role role) { return encode(role, 0); }

__device__ inline Position position_in_grid() {
  return {blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y,
          blockIdx.z * blockDim.z + threadIdx.z};
}

template <typename T>
struct AsArgument {
  __device__ static T from(Position p) { return static_cast<T>(p.x); }
};
template <typename T>
struct AsArgument<metal::vec<T, 2>> {
  __device__ static metal::vec<T, 2> from(Position p) { return {T(p.x), T(p.y)}; }
};
template <typename T>
struct AsArgument<metal::vec<T, 3>> {
  __device__ static metal::vec<T, 3> from(Position p) { return {T(p.x), T(p.y), T(p.z)}; }
};

template <typename T>
struct Argument {
  template <int Code>
  __device__ static T get(const Arguments& arguments) {
    constexpr Role role = static_cast<Role>(Code >> 16);
    static_assert(role == Role::thread_position_in_grid || role == Role::thread_position_in_threadgroup ||
                      role == Role::threadgroup_position_in_grid || role == Role::threads_per_grid ||
                      role == Role::thread_index_in_simdgroup,
                  "msl_cuda.h does not have this kernel attribute yet");
    Position p = arguments.threads_per_grid;
    if constexpr (role == Role::thread_position_in_grid) p = position_in_grid();
    if constexpr (role == Role::thread_position_in_threadgroup) p = {threadIdx.x, threadIdx.y, threadIdx.z};
    if constexpr (role == Role::threadgroup_position_in_grid) p = {blockIdx.x, blockIdx.y, blockIdx.z};
    if constexpr (role == Role::thread_index_in_simdgroup)
      p = {((threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x) % kSimdWidth, 0, 0};
    return AsArgument<T>::from(p);
  }
};
template <typename T>
struct Argument<T*> {
  template <int Code>
  __device__ static T* get(const Arguments& arguments) {
    return static_cast<T*>(arguments.buffers[Code & 0xffff]);
  }
};
template <typename T>
struct Argument<T&> {
  template <int Code>
  __device__ static T& get(const Arguments& arguments) {
    return *static_cast<std::remove_cv_t<T>*>(arguments.buffers[Code & 0xffff]);
  }
};

// Calls a kernel for this thread. Metal starts no thread outside the grid; CUDA's last blocks hold some.
template <int... Roles, typename... P>
__device__ void call(void (*kernel)(P...), const Arguments& arguments) {
  Position p = position_in_grid(), end = arguments.threads_per_grid;
  if (p.x >= end.x || p.y >= end.y || p.z >= end.z) return;
  kernel(Argument<P>::template get<Roles>(arguments)...);
}

struct Entry {
  const char* name;
  void (*kernel)(Arguments);
};

}  // namespace emulator

#include "msl_names.h"

MSL_FUNCTION half operator""h(long double value) { return half(float(value)); }
MSL_FUNCTION half operator""h(unsigned long long value) { return half(float(value)); }
// Over CUDA's own vector types, which are global.
#define int2 metal::vec<int, 2>
#define int3 metal::vec<int, 3>
#define int4 metal::vec<int, 4>
#define uint2 metal::vec<unsigned int, 2>
#define uint3 metal::vec<unsigned int, 3>
#define uint4 metal::vec<unsigned int, 4>
#define float2 metal::vec<float, 2>
#define float3 metal::vec<float, 3>
#define float4 metal::vec<float, 4>
