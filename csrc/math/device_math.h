// Names that differ among C++, MSL and CUDA, for the headers that all three include: functions, exact square root,
// bits.
//
// Every floating-point operation is rounded once, on every device, so that results are equal bit for bit. On Metal that
// takes two things: no fused multiply-add, which its compiler forms unless told otherwise, and the correctly rounded
// square root instead of the fast one, which plain sqrt means there. Where products are summed, they are statements of
// their own, so that a compiler which fuses within an expression only finds none to fuse.
#pragma once

#if defined(__METAL_VERSION__)
#include <metal_stdlib>
#pragma METAL fp contract(off)
namespace adam_math = metal::precise;
#define ADAM_FUNCTION inline
#else
#include <cmath>
#include <cstring>
namespace adam_math = std;
#if defined(__CUDACC__)
#define ADAM_FUNCTION __host__ __device__ inline
#else
// A call that stays one keeps the CPU's loops from being vectorised.
#define ADAM_FUNCTION inline __attribute__((always_inline))
#endif
#endif

namespace fused_adam {

// Names for bits, no arithmetic. The CPU has these and the conversions below for vectors too (cpu/vectors.h), so that
// templates serve both.
ADAM_FUNCTION unsigned bits_of(float x) {
#if defined(__METAL_VERSION__)
  return as_type<unsigned>(x);
#else
  unsigned u;
  memcpy(&u, &x, sizeof u);
  return u;
#endif
}

ADAM_FUNCTION float float_of(unsigned u) {
#if defined(__METAL_VERSION__)
  return as_type<float>(u);
#else
  float x;
  memcpy(&x, &u, sizeof x);
  return x;
#endif
}

ADAM_FUNCTION float to_float(int i) { return float(i); }

// Towards zero.
ADAM_FUNCTION int to_int(float x) { return int(x); }

// Of two's complement.
ADAM_FUNCTION unsigned as_unsigned(int i) { return unsigned(i); }
ADAM_FUNCTION int as_signed(unsigned u) { return int(u); }

}  // namespace fused_adam
