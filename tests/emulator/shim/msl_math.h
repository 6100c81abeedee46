// The part of Metal's standard library that is arithmetic: mathematics, limits, type traits.
// Used for the emulator and for nvcc; computed in float for every type, rounded once to the type.
#pragma once

#include <array>

#include "msl_types.h"

namespace metal {

using std::array;
using std::conditional;
using std::conditional_t;
using std::enable_if;
using std::enable_if_t;
using std::false_type;
using std::integral_constant;
using std::is_convertible;
using std::is_convertible_v;
using std::is_integral;
using std::is_integral_v;
using std::is_same;
using std::is_same_v;
using std::is_signed;
using std::is_signed_v;
using std::is_unsigned_v;
using std::make_unsigned_t;
using std::remove_cv_t;
using std::remove_reference_t;
using std::true_type;

template <typename T>
constexpr bool is_floating_point_v = is_same_v<T, float> || is_same_v<T, half> || is_same_v<T, bfloat>;
template <typename T>
struct is_floating_point : integral_constant<bool, is_floating_point_v<T>> {};
template <typename T>
constexpr bool is_arithmetic_v = std::is_integral_v<T> || is_floating_point_v<T>;

template <typename T>
struct numeric_limits : std::numeric_limits<T> {};

// From the largest finite number, the smallest normal one, the gap after 1 and the infinity as bits.
template <typename T, uint16_t Max, uint16_t Min, uint16_t Epsilon, uint16_t Infinity>
struct limits_of_16_bits {
  static constexpr bool is_integer = false;
  static constexpr T from(uint16_t bits) { return __builtin_bit_cast(T, bits); }
  static constexpr T max() { return from(Max); }
  static constexpr T lowest() { return from(Max | 0x8000); }
  static constexpr T min() { return from(Min); }
  static constexpr T epsilon() { return from(Epsilon); }
  static constexpr T infinity() { return from(Infinity); }
  static constexpr T quiet_NaN() { return from(0x7fff); }
};
template <>
struct numeric_limits<half> : limits_of_16_bits<half, 0x7bff, 0x0400, 0x1400, 0x7c00> {};
template <>
struct numeric_limits<bfloat> : limits_of_16_bits<bfloat, 0x7f7f, 0x0080, 0x3c00, 0x7f80> {};

template <typename T>
using if_float = enable_if_t<is_floating_point_v<T>, T>;
template <typename T>
using if_integral = enable_if_t<is_integral_v<T>, T>;
template <typename T>
using if_scalar = enable_if_t<is_arithmetic_v<T>, T>;

// What a function that is not of metal::precise gives in place of `exact`: on a hostile GPU, up to `ulps` units in the
// last place beside it. How far follows from the value, so that every thread and order of execution agrees.
MSL_FUNCTION float fast_result(float exact, uint32_t ulps) {
#ifdef MSL_HOSTILE_FUNCTIONS
  uint32_t bits = as_type<uint32_t>(exact), magnitude = bits & 0x7fffffffu;
  if (magnitude == 0 || magnitude >= 0x7f800000u) return exact;
  return as_type<float>(bits + (bits * 2654435761u >> 16) % (2 * ulps + 1) - ulps);
#endif
  return exact;
}
template <typename T>
MSL_FUNCTION T fast_result(T exact, uint32_t) {
  return exact;
}

// `ulps`: what Metal's fast variant for float may be off by, about as its specification has it, there in part as
// formulas.
#define MSL_UNARY(name, function, ulps)                     \
  namespace precise {                                       \
  template <typename T>                                     \
  MSL_FUNCTION if_float<T> name(T x) {                      \
    return static_cast<T>(function(static_cast<float>(x))); \
  }                                                         \
  }                                                         \
  template <typename T>                                     \
  MSL_FUNCTION if_float<T> name(T x) {                      \
    return fast_result(precise::name(x), ulps);             \
  }                                                         \
  MSL_VECTORS_OF(name)                                      \
  namespace precise {                                       \
  MSL_VECTORS_OF(name)                                      \
  }
#define MSL_VECTORS_OF(name)                       \
  template <typename T, int N>                     \
  MSL_FUNCTION vec<T, N> name(vec<T, N> x) {       \
    for (int i = 0; i < N; ++i) x[i] = name(x[i]); \
    return x;                                      \
  }
#define MSL_BINARY(name, function, ulps)                                           \
  namespace precise {                                                              \
  template <typename T>                                                            \
  MSL_FUNCTION if_float<T> name(T x, T y) {                                        \
    return static_cast<T>(function(static_cast<float>(x), static_cast<float>(y))); \
  }                                                                                \
  }                                                                                \
  template <typename T>                                                            \
  MSL_FUNCTION if_float<T> name(T x, T y) {                                        \
    return fast_result(precise::name(x, y), ulps);                                 \
  }                                                                                \
  MSL_VECTORS_OF_TWO(name)                                                         \
  namespace precise {                                                              \
  MSL_VECTORS_OF_TWO(name)                                                         \
  }
#define MSL_VECTORS_OF_TWO(name)                          \
  template <typename T, int N>                            \
  MSL_FUNCTION vec<T, N> name(vec<T, N> x, vec<T, N> y) { \
    for (int i = 0; i < N; ++i) x[i] = name(x[i], y[i]);  \
    return x;                                             \
  }
MSL_UNARY(acos, std::acos, 5)
MSL_UNARY(acosh, std::acosh, 4)
MSL_UNARY(asin, std::asin, 5)
MSL_UNARY(asinh, std::asinh, 4)
MSL_UNARY(atan, std::atan, 5)
MSL_UNARY(atanh, std::atanh, 5)
MSL_UNARY(ceil, std::ceil, 0)
MSL_UNARY(cos, std::cos, 4)
MSL_UNARY(cosh, std::cosh, 4)
MSL_UNARY(exp, std::exp, 4)
MSL_UNARY(exp2, std::exp2, 4)
MSL_UNARY(fabs, std::fabs, 0)
MSL_UNARY(floor, std::floor, 0)
MSL_UNARY(log, std::log, 3)
MSL_UNARY(log10, std::log10, 3)
MSL_UNARY(log2, std::log2, 3)
MSL_UNARY(rint, std::rint, 0)
MSL_UNARY(round, std::round, 0)
MSL_UNARY(rsqrt, 1.0f / std::sqrt, 2)
MSL_UNARY(sin, std::sin, 4)
MSL_UNARY(sinh, std::sinh, 4)
MSL_UNARY(sqrt, std::sqrt, 3)
MSL_UNARY(tan, std::tan, 6)
MSL_UNARY(tanh, std::tanh, 5)
MSL_UNARY(trunc, std::trunc, 0)
MSL_BINARY(atan2, std::atan2, 6)
MSL_BINARY(copysign, std::copysign, 0)
MSL_BINARY(fmax, std::fmax, 0)
MSL_BINARY(fmin, std::fmin, 0)
MSL_BINARY(fmod, std::fmod, 0)
MSL_BINARY(pow, std::pow, 16)
MSL_BINARY(powr, std::pow, 16)
#undef MSL_UNARY
#undef MSL_BINARY
#undef MSL_VECTORS_OF
#undef MSL_VECTORS_OF_TWO

template <typename T>
MSL_FUNCTION if_float<T> fma(T x, T y, T z) {
  return static_cast<T>(std::fma(static_cast<float>(x), static_cast<float>(y), static_cast<float>(z)));
}
template <typename T>
MSL_FUNCTION if_float<T> abs(T x) {
  return fabs(x);
}
template <typename T>
MSL_FUNCTION if_integral<T> abs(T x) {
  return x < 0 ? static_cast<T>(-x) : x;
}
template <typename T>
MSL_FUNCTION if_scalar<T> max(T x, T y) {
  if constexpr (is_floating_point_v<T>) return fmax(x, y);
  return x < y ? y : x;
}
template <typename T>
MSL_FUNCTION if_scalar<T> min(T x, T y) {
  if constexpr (is_floating_point_v<T>) return fmin(x, y);
  return y < x ? y : x;
}
template <typename T>
MSL_FUNCTION if_scalar<T> clamp(T x, T low, T high) {
  return min(max(x, low), high);
}
template <typename T>
MSL_FUNCTION if_float<T> sign(T x) {
  return static_cast<T>(x > T(0) ? 1.0f : x < T(0) ? -1.0f : 0.0f);
}
template <typename T>
MSL_FUNCTION if_float<T> mix(T x, T y, T a) {
  return x + (y - x) * a;
}
template <typename T>
MSL_FUNCTION T select(T when_false, T when_true, bool condition) {
  return condition ? when_true : when_false;
}
// By their bits, since a compiler may take arithmetic to be finite.
template <typename T>
MSL_FUNCTION bool isnan(T x) {
  return (as_type<uint32_t>(static_cast<float>(x)) & 0x7fffffffu) > 0x7f800000u;
}
template <typename T>
MSL_FUNCTION bool isinf(T x) {
  return (as_type<uint32_t>(static_cast<float>(x)) & 0x7fffffffu) == 0x7f800000u;
}
template <typename T>
MSL_FUNCTION bool isfinite(T x) {
  return (as_type<uint32_t>(static_cast<float>(x)) & 0x7f800000u) != 0x7f800000u;
}
template <typename T>
MSL_FUNCTION if_integral<T> popcount(T x) {
  return static_cast<T>(__builtin_popcountll(static_cast<make_unsigned_t<T>>(x)));
}
template <typename T>
MSL_FUNCTION if_integral<T> mulhi(T x, T y) {
  using Wide = conditional_t<is_signed_v<T>, __int128, unsigned __int128>;
  return static_cast<T>((static_cast<Wide>(x) * static_cast<Wide>(y)) >> (8 * sizeof(T)));
}
template <typename T>
MSL_FUNCTION if_integral<T> rotate(T x, T count) {
  constexpr unsigned bits = 8 * sizeof(T);
  unsigned n = static_cast<unsigned>(count) % bits;
  using U = make_unsigned_t<T>;
  return n ? static_cast<T>(static_cast<U>(x) << n | static_cast<U>(x) >> (bits - n)) : x;
}

namespace precise {
using metal::fma;
}
namespace fast {
using metal::acos;
using metal::acosh;
using metal::asin;
using metal::asinh;
using metal::atan;
using metal::atan2;
using metal::atanh;
using metal::cos;
using metal::cosh;
using metal::exp;
using metal::exp2;
using metal::fma;
using metal::log;
using metal::log10;
using metal::log2;
using metal::pow;
using metal::powr;
using metal::rsqrt;
using metal::sin;
using metal::sinh;
using metal::sqrt;
using metal::tan;
using metal::tanh;
}  // namespace fast

}  // namespace metal
