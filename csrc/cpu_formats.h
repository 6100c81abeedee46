// Storage formats on the CPU: a chunk of elements brought to float32 and back, with storage_formats.h for each element.
// Included by cpu_kernels.cpp alone, once per instruction set. A format is one line in load_chunk and one in store_chunk.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu_kernels.h"
#include FUSED_ADAM_HALF_HEADER

#define FUSED_ADAM_INLINE inline __attribute__((always_inline))
#define FUSED_ADAM_INLINE_LAMBDA __attribute__((always_inline))

#if defined(__clang__)
#define FUSED_ADAM_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#else
#define FUSED_ADAM_VECTORIZE _Pragma("GCC ivdep")
#endif

namespace fused_adam::cpu {
namespace {

// Elements that are loaded, updated and stored together: few enough that a processor overlaps one chunk's arithmetic with the
// next one's loads.
constexpr std::size_t kChunk = 32;

// The random bits of a chunk, if any rounding needs them.
struct ChunkRandom {
  std::uint32_t of_state[kChunk];
  std::uint32_t of_parameter[kChunk];
};

template <typename Value>
FUSED_ADAM_INLINE const Value* as(const char* bytes) {
  return reinterpret_cast<const Value*>(bytes);
}
template <typename Value>
FUSED_ADAM_INLINE Value* as(char* bytes) {
  return reinterpret_cast<Value*>(bytes);
}

// A chunk's values as float32: where they lie, or in the buffer. `at` is where the chunk begins within the run.
FUSED_ADAM_INLINE const float* load_chunk(const char* from, Format format, std::size_t at,
                                          float* buffer) {
  switch (format) {
    case Format::float32:
      return as<float>(from) + at;
    case Format::bfloat16: {
      auto values = as<std::uint16_t>(from) + at;
      FUSED_ADAM_VECTORIZE
      for (std::size_t i = 0; i < kChunk; ++i) buffer[i] = load_bfloat16(values[i]);
      return buffer;
    }
    case Format::float16:
      half::to_float(as<std::uint16_t>(from) + at, kChunk, buffer);
      return buffer;
  }
  return buffer;
}

// Stores 16 bits of each element. They are narrowed in a loop of their own: compilers that narrow within a longer loop do much
// of it in narrow lanes, twice as slowly.
template <typename StoreOne>
FUSED_ADAM_INLINE void store_each(std::uint16_t* to, StoreOne store_one) {
  alignas(64) std::uint32_t wide[kChunk];
  FUSED_ADAM_VECTORIZE
  for (std::size_t i = 0; i < kChunk; ++i) wide[i] = store_one(i);
  FUSED_ADAM_VECTORIZE
  for (std::size_t i = 0; i < kChunk; ++i) to[i] = std::uint16_t(wide[i]);
}

// Where a chunk's float32 results go, before store_chunk.
FUSED_ADAM_INLINE float* chunk_target(char* to, Format format, std::size_t at, float* buffer) {
  return format == Format::float32 ? as<float>(to) + at : buffer;
}

// `random` has 16 bits at `shift` for each element, or is null: to nearest.
FUSED_ADAM_INLINE void store_chunk(const float* x, char* to, Format format, std::size_t at,
                                   const std::uint32_t* random, int shift) {
  auto at_random = [=](std::size_t i) { return Rounding{true, random[i] >> shift & 0xFFFFu}; };
  switch (format) {
    case Format::float32:
      return;
    case Format::bfloat16: {
      auto values = as<std::uint16_t>(to) + at;
      if (random) {
        store_each(values, [=](std::size_t i) { return store_bfloat16(x[i], at_random(i)); });
      } else {
        store_each(values, [=](std::size_t i) { return store_bfloat16(x[i], {false, 0}); });
      }
      return;
    }
    case Format::float16: {
      auto values = as<std::uint16_t>(to) + at;
      if (random) {
        store_each(values, [=](std::size_t i) { return store_float16(x[i], at_random(i)); });
      } else {
        half::from_float(x, kChunk, values);
      }
      return;
    }
  }
}

// ---- A run's last chunk ----

constexpr std::size_t value_bytes(Format format) { return format == Format::float32 ? 4 : 2; }

// A short chunk is copied to a whole one, whose missing elements are zeros.
struct PaddedChunk {
  alignas(64) char values[kChunk * sizeof(float)] = {};

  const char* load(const char* from, Format format, std::size_t at, std::size_t count) {
    __builtin_memcpy(values, from + at * value_bytes(format), count * value_bytes(format));
    return values;
  }

  void store(char* to, Format format, std::size_t at, std::size_t count) const {
    __builtin_memcpy(to + at * value_bytes(format), values, count * value_bytes(format));
  }
};

}  // namespace
}  // namespace fused_adam::cpu
