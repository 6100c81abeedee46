// bfloat and the vector types of the Metal Shading Language, for the emulator (msl_cpu.h) and for nvcc (msl_cuda.h).
// A vector is copied as one word of its size and alignment, as Metal loads it: the emulator sees one access, not four.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

#ifdef __CUDACC__
#define MSL_FUNCTION __host__ __device__ inline
#else
#define MSL_FUNCTION inline
#endif

namespace metal {

template <typename To, typename From>
MSL_FUNCTION To as_type(From from) {
  static_assert(sizeof(To) == sizeof(From), "as_type needs types of one size");
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

// Upper half of a float, rounded to nearest, ties to even.
struct bfloat {
  uint16_t bits;

  bfloat() = default;
  template <typename T, typename = std::enable_if_t<std::is_convertible<T, float>::value>>
  MSL_FUNCTION constexpr bfloat(T value) : bits(round(static_cast<float>(value))) {}
  MSL_FUNCTION constexpr operator float() const { return __builtin_bit_cast(float, static_cast<uint32_t>(bits) << 16); }

 private:
  MSL_FUNCTION static constexpr uint16_t round(float value) {
    uint32_t word = __builtin_bit_cast(uint32_t, value);
    if ((word & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>(word >> 16 | 0x40);
    return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
  }
};

template <typename T>
using if_bfloat = std::enable_if_t<std::is_same<T, bfloat>::value, T>;

// Templates, so that only bfloat with bfloat stays bfloat; bfloat with float becomes float.
#define MSL_BFLOAT_OPERATOR(op)                                        \
  template <typename T>                                                \
  MSL_FUNCTION constexpr if_bfloat<T> operator op(T a, T b) {          \
    return bfloat(static_cast<float>(a) op static_cast<float>(b));     \
  }                                                                    \
  template <typename T>                                                \
  MSL_FUNCTION constexpr bfloat& operator op## = (bfloat & a, T b) {   \
    return a = bfloat(static_cast<float>(a) op static_cast<float>(b)); \
  }
MSL_BFLOAT_OPERATOR(+)
MSL_BFLOAT_OPERATOR(-)
MSL_BFLOAT_OPERATOR(*)
MSL_BFLOAT_OPERATOR(/)
#undef MSL_BFLOAT_OPERATOR

template <size_t Size>
struct word_of_size;
template <>
struct word_of_size<2> {
  using type = uint16_t;
};
template <>
struct word_of_size<4> {
  using type = uint32_t;
};
template <>
struct word_of_size<8> {
  using type = uint64_t;
};
template <>
struct word_of_size<16> {
  using type = unsigned __int128;
};
template <>
struct word_of_size<32> {
  struct alignas(32) type {
    unsigned __int128 low, high;
  };
};

template <typename T, int N>
struct vec;

#define MSL_VECTOR(N, SLOTS, ...)                                        \
  template <typename T>                                                  \
  struct alignas(SLOTS * sizeof(T)) vec<T, N> {                          \
    union {                                                              \
      typename word_of_size<SLOTS * sizeof(T)>::type word;               \
      struct {                                                           \
        T __VA_ARGS__;                                                   \
      };                                                                 \
    };                                                                   \
    vec() = default;                                                     \
    MSL_FUNCTION vec(const vec& other) : word(other.word) {}             \
    MSL_FUNCTION vec& operator=(const vec& other) {                      \
      word = other.word;                                                 \
      return *this;                                                      \
    }                                                                    \
    MSL_FUNCTION vec(T value) {                                          \
      for (int i = 0; i < N; ++i) (*this)[i] = value;                    \
    }                                                                    \
    template <typename U>                                                \
    MSL_FUNCTION explicit vec(const vec<U, N>& other) {                  \
      for (int i = 0; i < N; ++i) (*this)[i] = static_cast<T>(other[i]); \
    }                                                                    \
    MSL_FUNCTION T& operator[](int i) { return (&x)[i]; }                \
    MSL_FUNCTION const T& operator[](int i) const { return (&x)[i]; }

MSL_VECTOR(2, 2, x, y)
MSL_FUNCTION vec(T a, T b) {
  x = a;
  y = b;
}
};
MSL_VECTOR(3, 4, x, y, z)
MSL_FUNCTION vec(T a, T b, T c) {
  x = a;
  y = b;
  z = c;
}
}
;
MSL_VECTOR(4, 4, x, y, z, w)
MSL_FUNCTION vec(T a, T b, T c, T d) {
  x = a;
  y = b;
  z = c;
  w = d;
}
MSL_FUNCTION vec(vec<T, 2> a, vec<T, 2> b) : vec(a.x, a.y, b.x, b.y) {}
MSL_FUNCTION vec(vec<T, 3> a, T b) : vec(a.x, a.y, a.z, b) {}
}
;
#undef MSL_VECTOR

#define MSL_VECTOR_OPERATOR(op)                                         \
  template <typename T, int N>                                          \
  MSL_FUNCTION auto operator op(vec<T, N> a, vec<T, N> b) {             \
    vec<decltype(a.x op b.x), N> result;                                \
    for (int i = 0; i < N; ++i) result[i] = a[i] op b[i];               \
    return result;                                                      \
  }                                                                     \
  template <typename T, int N>                                          \
  MSL_FUNCTION auto operator op(vec<T, N> a, std::common_type_t<T> b) { \
    return a op vec<T, N>(b);                                           \
  }                                                                     \
  template <typename T, int N>                                          \
  MSL_FUNCTION auto operator op(std::common_type_t<T> a, vec<T, N> b) { \
    return vec<T, N>(a) op b;                                           \
  }
#define MSL_VECTOR_ASSIGNMENT(op)                                       \
  template <typename T, int N, typename U>                              \
  MSL_FUNCTION vec<T, N>& operator op## = (vec<T, N> & a, const U& b) { \
    return a = a op b;                                                  \
  }
MSL_VECTOR_OPERATOR(+)
MSL_VECTOR_OPERATOR(-)
MSL_VECTOR_OPERATOR(*)
MSL_VECTOR_OPERATOR(/)
MSL_VECTOR_OPERATOR(==)
MSL_VECTOR_OPERATOR(!=)
MSL_VECTOR_OPERATOR(<)
MSL_VECTOR_OPERATOR(>)
MSL_VECTOR_ASSIGNMENT(+)
MSL_VECTOR_ASSIGNMENT(-)
MSL_VECTOR_ASSIGNMENT(*)
MSL_VECTOR_ASSIGNMENT(/)
#undef MSL_VECTOR_OPERATOR
#undef MSL_VECTOR_ASSIGNMENT

template <typename T, int N>
MSL_FUNCTION vec<T, N> operator-(vec<T, N> a) {
  for (int i = 0; i < N; ++i) a[i] = -a[i];
  return a;
}

template <int N>
MSL_FUNCTION bool any(vec<bool, N> a) {
  for (int i = 0; i < N; ++i) {
    if (a[i]) return true;
  }
  return false;
}

template <int N>
MSL_FUNCTION bool all(vec<bool, N> a) {
  for (int i = 0; i < N; ++i) {
    if (!a[i]) return false;
  }
  return true;
}

}  // namespace metal

using metal::as_type;  // in MSL an operator of the language, known everywhere
