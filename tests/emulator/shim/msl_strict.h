// Metal's names for clang, with address spaces that are real: a pointer to device memory that says no more than
// `float*`, a `double`, a qualifier cast away are errors, as they are on Metal. Only for checking; nothing here runs.
#pragma once

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define kernel
#define METAL_FUNC inline

typedef _Float16 half;
typedef __bf16 bfloat;
typedef unsigned char uchar;
typedef unsigned short ushort;
typedef unsigned int uint;
typedef unsigned long ulong;
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long int64_t;
typedef unsigned long uint64_t;
typedef unsigned long size_t;
typedef long ptrdiff_t;

namespace metal {

template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));

enum class mem_flags { mem_none, mem_device, mem_threadgroup, mem_texture };
void threadgroup_barrier(mem_flags);
void simdgroup_barrier(mem_flags);

template <typename T>
T sqrt(T);
template <typename T>
T rsqrt(T);
template <typename T>
T abs(T);
template <typename T>
T min(T, T);
template <typename T>
T max(T, T);
template <typename T>
T clamp(T, T, T);
template <typename T>
T fma(T, T, T);
template <typename T>
T simd_sum(T);
template <typename T>
T simd_max(T);
template <typename T>
T simd_shuffle_xor(T, ushort);
template <typename T>
bool isfinite(T);
template <typename To, typename From>
To as_type(From from) {
  return __builtin_bit_cast(To, from);
}
// What translate.py makes of (To)pointer and *(To)pointer: reinterpret_cast keeps the address space.
template <typename To>
struct pointer_cast {
  struct dereferenced {
    template <typename From>
    auto& operator->*(From pointer) const {
      return *reinterpret_cast<To>(pointer);
    }
  };
  dereferenced operator*() const { return {}; }
  template <typename From>
  To operator->*(From pointer) const {
    return reinterpret_cast<To>(pointer);
  }
};

namespace precise {
using metal::sqrt;
}
namespace fast {
using metal::sqrt;
}

}  // namespace metal

using metal::as_type;  // in MSL an operator of the language, known everywhere

#define MSL_VECTOR_NAMES(type)         \
  typedef metal::vec<type, 2> type##2; \
  typedef metal::vec<type, 3> type##3; \
  typedef metal::vec<type, 4> type##4;
MSL_VECTOR_NAMES(bool)
MSL_VECTOR_NAMES(int)
MSL_VECTOR_NAMES(uint)
MSL_VECTOR_NAMES(ushort)
MSL_VECTOR_NAMES(float)
MSL_VECTOR_NAMES(half)
MSL_VECTOR_NAMES(bfloat)
#undef MSL_VECTOR_NAMES

// Metal has none of these.
#pragma GCC poison double goto try catch throw new delete dynamic_cast typeid virtual
