// Runs of elements that a thread loads and stores 16 bytes at a time. Metal only; included by the shaders.
#pragma once

#include <metal_stdlib>

#include "adam_args.h"

using namespace metal;
using namespace fused_adam;

// Element k of 16 bytes, and back: names for bits, no arithmetic. For 16-bit types, and for float.
template <typename T>
inline T get_element(uint4 words, uint k, T) {
  return as_type<T>(ushort(words[k / 2] >> (16 * (k % 2))));
}
inline float get_element(uint4 words, uint k, float) { return as_type<float>(words[k]); }
template <typename T>
inline void set_element(thread uint4& words, uint k, T value) {
  words[k / 2] |= uint(as_type<ushort>(value)) << (16 * (k % 2));
}
inline void set_element(thread uint4& words, uint k, float value) {
  words[k] = as_type<uint>(value);
}

template <uint N, typename T, typename Value>
inline void load_run(const device T* from, thread Value* values) {
  constexpr uint count = kRunBytes / sizeof(T);
  for (uint start = 0; start < N; start += count) {
    uint4 words = *(const device uint4*)(from + start);
    for (uint k = 0; k < count; ++k) {
      values[start + k] = Value(get_element(words, k, T(0)));
    }
  }
}

template <uint N, typename T, typename Value>
inline void store_run(device T* to, const thread Value* values) {
  constexpr uint count = kRunBytes / sizeof(T);
  for (uint start = 0; start < N; start += count) {
    uint4 words = uint4(0);
    for (uint k = 0; k < count; ++k) {
      set_element(words, k, T(values[start + k]));
    }
    *(device uint4*)(to + start) = words;
  }
}
