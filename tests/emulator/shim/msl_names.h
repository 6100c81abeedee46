// The names that Metal puts into every shader: scalar and vector types and the address spaces.
// Comes last, after every header of the host, since it defines words such as `device` and `thread` away.
#pragma once

#include "msl_math.h"

namespace metal {

using uchar = unsigned char;
using ushort = unsigned short;
using uint = unsigned int;
using ulong = uint64_t;

#ifndef __CUDACC__  // whose own vector types have these names; msl_cuda.h defines over them
#define MSL_VECTOR_NAMES(type)  \
  using type##2 = vec<type, 2>; \
  using type##3 = vec<type, 3>; \
  using type##4 = vec<type, 4>;
MSL_VECTOR_NAMES(bool)
MSL_VECTOR_NAMES(char)
MSL_VECTOR_NAMES(uchar)
MSL_VECTOR_NAMES(short)
MSL_VECTOR_NAMES(ushort)
MSL_VECTOR_NAMES(int)
MSL_VECTOR_NAMES(uint)
MSL_VECTOR_NAMES(long)
MSL_VECTOR_NAMES(ulong)
MSL_VECTOR_NAMES(float)
MSL_VECTOR_NAMES(half)
MSL_VECTOR_NAMES(bfloat)
#undef MSL_VECTOR_NAMES
#endif

}  // namespace metal

MSL_FUNCTION metal::bfloat operator"" bf(long double value) { return metal::bfloat(float(value)); }

// In MSL these need no using directive.
using metal::bfloat;
using metal::ulong;

#ifndef __CUDACC__  // __device__ expands to the word device; translate.py takes these words out for nvcc
#define kernel
#define device
#define constant
#define thread
#define threadgroup
#endif
#define METAL_FUNC inline
#define M_PI_F 3.14159265358979323846f
#define M_E_F 2.71828182845904523536f
#define M_LN2_F 0.69314718055994530942f
#define M_LN10_F 2.30258509299404568402f
