// Loads and stores a thread's run of N elements: by vectors of kRunBytes, or of all its bytes if they are fewer, or one
// by one. Metal only.
#pragma once

#include <metal_stdlib>

#include "adam_args.h"

// In front of loops over a thread's own arrays, which would else live in memory: Metal's front end unrolls nothing by
// itself, and no register has a dynamic index.
#if defined(__CUDACC__)
#define UNROLLED _Pragma("unroll")
#else
#define UNROLLED _Pragma("clang loop unroll(full)")
#endif

using namespace metal;
using namespace fused_adam;

// The unsigned integer of as many bytes.
template <uint bytes>
struct Unsigned {
  typedef uint type;
};
template <>
struct Unsigned<2> {
  typedef ushort type;
};
template <>
struct Unsigned<1> {
  typedef uchar type;
};

// So many bytes, in words of 4 if they are as many.
template <uint bytes>
struct Words {
  typedef vec<uint, bytes == 16 ? 4 : 2> type;
};
template <>
struct Words<4> {
  typedef uint type;
};
template <>
struct Words<2> {
  typedef ushort type;
};
inline uint word_of(uint words, uint) { return words; }
inline uint word_of(ushort words, uint) { return words; }
template <typename V>
inline uint word_of(V words, uint i) { return words[i]; }
inline void add_bits(thread uint& words, uint, uint bits) { words |= bits; }
inline void add_bits(thread ushort& words, uint, uint bits) { words |= ushort(bits); }
template <typename V>
inline void add_bits(thread V& words, uint i, uint bits) { words[i] |= bits; }

// Elements of type T as the bits of a vector: names for bits, no arithmetic.
template <typename T, uint N>
struct Vector {
  enum {
    bytes = N * sizeof(T) < kRunBytes ? N * sizeof(T) : kRunBytes,
    elements = bytes / sizeof(T),
    elements_per_word = 4 / sizeof(T),
    bits = 8 * sizeof(T)
  };
  typedef typename Words<bytes>::type type;
};

// At an address that is a multiple of the vector's size; N is a multiple of its elements.
template <uint N, typename T, typename Value>
inline void load_vectors(const device T* from, thread Value* values) {
  typedef Vector<T, N> V;
  UNROLLED
  for (uint start = 0; start < N; start += V::elements) {
    typename V::type words = *(const device typename V::type*)(from + start);
    UNROLLED
    for (uint k = 0; k < V::elements; ++k) {
      uint word = word_of(words, k / V::elements_per_word) >> (V::bits * (k % V::elements_per_word));
      values[start + k] = Value(as_type<T>(typename Unsigned<sizeof(T)>::type(word)));
    }
  }
}

template <uint N, typename T>
inline void store_vectors(device T* to, const thread T* values) {
  typedef Vector<T, N> V;
  UNROLLED
  for (uint start = 0; start < N; start += V::elements) {
    typename V::type words = typename V::type(0);
    UNROLLED
    for (uint k = 0; k < V::elements; ++k) {
      uint word = as_type<typename Unsigned<sizeof(T)>::type>(values[start + k]);
      add_bits(words, k / V::elements_per_word, word << (V::bits * (k % V::elements_per_word)));
    }
    *(device typename V::type*)(to + start) = words;
  }
}

// The first `count` elements; the others stay as they are.
template <uint N, typename T, typename Value>
inline void load_elements(const device T* from, uint count, thread Value* values) {
  UNROLLED
  for (uint k = 0; k < N; ++k) {
    if (k < count) {
      values[k] = Value(from[k]);
    }
  }
}

template <uint N, typename T>
inline void store_elements(device T* to, uint count, const thread T* values) {
  UNROLLED
  for (uint k = 0; k < N; ++k) {
    if (k < count) {
      to[k] = values[k];
    }
  }
}
