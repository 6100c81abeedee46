// How a float32 value is stored: the only place that defines storage formats. Arguments are passed by value, so the
// code is valid C++14, MSL and CUDA.
//
//   float32               as it is
//   bfloat16, float16     rounded to nearest even, or stochastically
//   bfloat16, correction  a bfloat16 and beside it its rounding error: in an int16, together the float32, exactly;
//                         in an int8, its upper 24 bits, rounded to nearest even, or stochastically
//   int8, uint8           quantized m and v, with a scale for each block of neighbours in a row (docs/state-codes.md)
//   int4, uint4           the same in 4 bits, two neighbours to a byte, the first in its lower half
#pragma once

#include "math/device_math.h"
#include "math/random_bits.h"

namespace fused_adam {

// ---- 16-bit floats ----

ADAM_FUNCTION float load_bfloat16(unsigned short h) { return float_of(unsigned(h) << 16); }

// Every NaN becomes the one that MLX stores.
ADAM_FUNCTION unsigned store_bfloat16(float x, Rounding rounding) {
  unsigned u = bits_of(x);
  unsigned nearest = 0x7FFFu + ((u >> 16) & 1u);
  unsigned rounded = (u + (rounding.is_stochastic ? rounding.random : nearest)) >> 16;
  return x != x ? 0x7FC0u : rounded;
}

// In integers but for the subnormals, whose arithmetic is of normal float32 numbers (the method of F. Giesen's
// conversions).
ADAM_FUNCTION float load_float16(unsigned short h) {
  unsigned normal = ((h & 0x7FFFu) << 13) + ((127u - 15u) << 23);
  unsigned special = normal + ((128u - 16u) << 23);
  unsigned subnormal = bits_of(float_of(normal + (1u << 23)) - float_of(113u << 23));
  unsigned u = (h & 0x7C00u) == 0x7C00u ? special : normal;
  u = (h & 0x7C00u) == 0u ? subnormal : u;
  return float_of(u | ((h & 0x8000u) << 16));
}

ADAM_FUNCTION unsigned store_float16(float x, Rounding rounding) {
  const unsigned magic = ((127u - 15u) + (23u - 10u) + 1u) << 23;
  unsigned sign = bits_of(x) & 0x80000000u;
  unsigned u = bits_of(x) ^ sign;
  unsigned addend = rounding.is_stochastic ? rounding.random >> 3 : 0xFFFu + ((u >> 13) & 1u);
  unsigned normal = (u - ((127u - 15u) << 23) + addend) >> 13;
  unsigned nearest = bits_of(float_of(u) + float_of(magic)) - magic;
  // The least subnormal is 2^-24, so this counts 2^-40; bits below are lost. Larger numbers are not for this branch.
  bool is_subnormal = u < (113u << 23);
  float small = is_subnormal ? float_of(u) : 0.0f;
  unsigned fixed = unsigned(int(small * 1099511627776.0f));
  unsigned subnormal = rounding.is_stochastic ? (fixed + rounding.random) >> 16 : nearest;
  unsigned h = is_subnormal ? subnormal : normal;
  h = h > 0x7C00u || u >= ((127u + 16u) << 23) ? 0x7C00u : h;
  h = u > (255u << 23) ? 0x7E00u : h;
  return h | (sign >> 16);
}

// ---- bfloat16 and correction ----

struct SplitFloat {
  unsigned bfloat16;
  unsigned correction;  // as many of its lower bits count as are stored
};

// To nearest; ties go away from zero, since a correction has 2^16 values and ties to even would need one more. So it is
// what the lower half of the bits is as a signed number.
ADAM_FUNCTION SplitFloat split(float x) {
  unsigned u = bits_of(x);
  bool is_special = (u & 0x7F800000u) == 0x7F800000u;
  unsigned upper = is_special ? u : u + 0x8000u;
  return {x != x ? 0x7FC0u : upper >> 16, is_special ? 0u : u};
}

// If a bfloat16 was changed since, its old correction leaves the result within half a unit in its last place,
// and never beyond zero or infinity.
ADAM_FUNCTION float join(unsigned bfloat16, int correction) {
  unsigned sign = (bfloat16 & 0x8000u) << 16;
  int magnitude = int((bfloat16 & 0x7FFFu) << 16);
  int sum = magnitude + correction;
  sum = sum < 0 ? 0 : sum;
  bool is_whole = magnitude > 0x7F800000 || (magnitude == 0x7F800000 && correction > 0);
  return float_of(sign | unsigned(is_whole ? magnitude : sum));
}

// The same for the upper 24 bits of x, so off by less than 2^-15 of it, or by half of that to nearest. What is finite
// stays so.
ADAM_FUNCTION SplitFloat split_24(float x, Rounding rounding) {
  unsigned u = bits_of(x);
  unsigned addend = rounding.is_stochastic ? rounding.random >> 8 : 0x7Fu + ((u >> 8) & 1u);
  bool is_largest_or_special = (u & 0x7FFFFFFFu) > 0x7F7FFF00u;
  SplitFloat parts = split(float_of(is_largest_or_special ? u : u + addend));
  return {parts.bfloat16, parts.correction >> 8};
}

ADAM_FUNCTION float join_24(unsigned bfloat16, int correction) { return join(bfloat16, correction * 256); }

// ---- Quantized state ----

enum BlockSize { kBlockElements = 32 };

// A power of two, stored as the upper half of its float32 bits: a bfloat16. Never below 2^-126, so that every level but
// 0 is a normal float32: GPUs may flush others to zero.
struct BlockScale {
  unsigned stored;
  float inverse;
};

// F, I and U are float, int and unsigned, or vectors of such.

// The bits of a magnitude, for the search of a block's largest: integers order as floats do. NaN is left out.
template <typename F>
ADAM_FUNCTION auto block_magnitude(F x) -> decltype(bits_of(x)) {
  auto u = bits_of(x) & 0x7FFFFFFFu;
  return u > 0x7F800000u ? u & 0u : u;
}

// The least power of two that is not below x.
ADAM_FUNCTION BlockScale scale_above(float x) {
  unsigned exponent = (bits_of(x) + 0x7FFFFFu) >> 23;
  exponent = exponent < 1u ? 1u : exponent;
  return {exponent << 7, float_of((254u - exponent) << 23)};
}

// The fourth power of x, made piecewise linear: linear between powers of 16. A float's bits, read as an integer, are
// its logarithm made linear between powers of two, so four times the bits are those of the power. From 4 on it is
// linear between integers too.
template <typename F>
ADAM_FUNCTION F piecewise_power(F x) {
  return float_of(4u * bits_of(x) - 0xBE800000u);
}
// Its inverse, as bits. Infinity and NaN have large ones.
template <typename F>
ADAM_FUNCTION auto piecewise_root(F y) -> decltype(bits_of(y)) {
  return (bits_of(y) >> 2u) + 0x2FA00000u;
}

// From the bits of a block's largest magnitude: such that the largest level reaches it. More than 2^127 counts as that
// for v, whose largest level might pass the largest float, and more than its root for m: where v has overflowed, an
// update is small.
ADAM_FUNCTION float capped(unsigned largest, unsigned cap) { return float_of(largest < cap ? largest : cap); }
ADAM_FUNCTION float capped_m(unsigned largest) { return capped(largest, 0x5F000000u); }
ADAM_FUNCTION float capped_v(unsigned largest) { return capped(largest, 0x7F000000u); }

// The integer below or above a root from 4 to 512, given as bits: the upper one with the probability that makes the
// mean of the powers right, since the power is linear between them. The bits of positive floats order as they do, and
// compilers know the minimum of integers.
template <typename U>
ADAM_FUNCTION auto one_of_two(U root, unsigned largest, RoundingOf<U> rounding) -> decltype(as_signed(root)) {
  root = root < largest ? root : U{} + largest;
  U random = rounding.is_stochastic ? rounding.random : U{} + 0x8000u;
  return to_int(float_of(root) + to_float(as_signed(random >> 1u)) * (1.0f / 32768.0f));
}

// m = sign(q) * (P(|q| + shift) - P(shift)) * scale, with P the power above and |q| up to `most`.
template <typename F, typename U>
ADAM_FUNCTION auto store_m(F x, float inverse, int shift, int most, RoundingOf<U> rounding) -> decltype(to_int(x)) {
  F y = float_of(bits_of(x) & 0x7FFFFFFFu) * inverse;
  U root = piecewise_root(y + piecewise_power(float(shift)));
  auto q = one_of_two(root, bits_of(float(most + shift)), rounding) - shift;
  return x < 0.0f ? -q : q;
}
template <typename I>
ADAM_FUNCTION auto load_m(I q, float scale, int shift) -> decltype(to_float(q)) {
  auto level = piecewise_power(to_float((q < 0 ? -q : q) + shift)) - piecewise_power(float(shift));
  return float_of(bits_of(level) ^ (as_unsigned(q) & 0x80000000u)) * scale;
}

// v = P(q + shift) * scale, and 0 for q = 0, which only 0 becomes.
template <typename F, typename U>
ADAM_FUNCTION auto store_v(F x, float inverse, int shift, int most, RoundingOf<U> rounding) -> decltype(to_int(x)) {
  U root = piecewise_root(x * inverse);
  unsigned least = bits_of(float(shift + 1));
  root = root > least ? root : U{} + least;
  auto q = one_of_two(root, bits_of(float(most + shift)), rounding) - shift;
  return x == 0.0f ? q & 0 : q;
}
template <typename I>
ADAM_FUNCTION auto load_v(I q, float scale, int shift) -> decltype(to_float(q)) {
  auto level = bits_of(piecewise_power(to_float(q + shift)));
  return float_of(q == 0 ? level & 0u : level) * scale;
}

// ---- 8 bits ----

ADAM_FUNCTION BlockScale scale_of_m8(unsigned largest) {
  return scale_above(capped_m(largest) * (1.0f / 327151616.0f));
}
ADAM_FUNCTION BlockScale scale_of_v8(unsigned largest) {
  return scale_above(capped_v(largest) * (1.0f / 4697620480.0f));
}

template <typename F, typename U>
ADAM_FUNCTION auto store_int8(F x, float inverse, RoundingOf<U> rounding) -> decltype(to_int(x)) {
  return store_m(x, inverse, 8, 127, rounding);
}
template <typename I>
ADAM_FUNCTION auto load_int8(I q, float scale) -> decltype(to_float(q)) {
  return load_m(q, scale, 8);
}

template <typename F, typename U>
ADAM_FUNCTION auto store_uint8(F x, float inverse, RoundingOf<U> rounding) -> decltype(to_int(x)) {
  return store_v(x, inverse, 7, 255, rounding);
}
template <typename I>
ADAM_FUNCTION auto load_uint8(I q, float scale) -> decltype(to_float(q)) {
  return load_v(q, scale, 7);
}

// ---- 4 bits ----

// m has so few levels that the largest should be the block's largest magnitude: the least bfloat16 that is not below x,
// nor 2^-126.
ADAM_FUNCTION BlockScale exact_scale_above(float x) {
  unsigned stored = (bits_of(x) + 0xFFFFu) >> 16;
  stored = stored < 0x80u ? 0x80u : stored;
  return {stored, 1.0f / float_of(stored << 16)};
}

ADAM_FUNCTION BlockScale scale_of_m4(unsigned largest) {
  return exact_scale_above(capped_m(largest) * (1.0f / 15872.0f));
}
ADAM_FUNCTION BlockScale scale_of_v4(unsigned largest) { return scale_above(capped_v(largest) * (1.0f / 98304.0f)); }

// As the lower 4 bits of q.
template <typename F, typename U>
ADAM_FUNCTION auto store_int4(F x, float inverse, RoundingOf<U> rounding) -> decltype(to_int(x)) {
  return store_m(x, inverse, 5, 7, rounding) & 15;
}
template <typename I>
ADAM_FUNCTION auto load_int4(I lower, float scale) -> decltype(to_float(lower)) {
  return load_m((lower ^ 8) - 8, scale, 5);
}

template <typename F, typename U>
ADAM_FUNCTION auto store_uint4(F x, float inverse, RoundingOf<U> rounding) -> decltype(to_int(x)) {
  return store_v(x, inverse, 3, 15, rounding);
}
template <typename I>
ADAM_FUNCTION auto load_uint4(I q, float scale) -> decltype(to_float(q)) {
  return load_v(q, scale, 3);
}

}  // namespace fused_adam
