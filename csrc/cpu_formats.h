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

// Elements that are loaded, updated and stored together: a block of the 8-bit formats, and few enough that a processor overlaps
// one chunk's arithmetic with the next one's loads.
constexpr std::size_t kChunk = kBlockElements;

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

FUSED_ADAM_INLINE float load_scale(Source from, std::size_t at) {
  return load_bfloat16(as<std::uint16_t>(from.extra)[at / kChunk]);
}

// A chunk's values as float32: where they lie, or in the buffer. `at` is where the chunk begins within the run.
FUSED_ADAM_INLINE const float* load_chunk(Source from, Format format, std::size_t at,
                                          float* buffer) {
  switch (format) {
    case Format::float32:
      return as<float>(from.values) + at;
    case Format::bfloat16: {
      auto values = as<std::uint16_t>(from.values) + at;
      FUSED_ADAM_VECTORIZE
      for (std::size_t i = 0; i < kChunk; ++i) buffer[i] = load_bfloat16(values[i]);
      return buffer;
    }
    case Format::float16:
      half::to_float(as<std::uint16_t>(from.values) + at, kChunk, buffer);
      return buffer;
    case Format::bfloat16_remainder: {
      auto values = as<std::uint16_t>(from.values) + at;
      auto remainders = as<std::int16_t>(from.extra) + at;
      FUSED_ADAM_VECTORIZE
      for (std::size_t i = 0; i < kChunk; ++i) buffer[i] = join(values[i], remainders[i]);
      return buffer;
    }
    case Format::int8: {
      auto codes = as<std::int8_t>(from.values) + at;
      float scale = load_scale(from, at);
      FUSED_ADAM_VECTORIZE
      for (std::size_t i = 0; i < kChunk; ++i) buffer[i] = load_int8(codes[i], scale);
      return buffer;
    }
    case Format::uint8: {
      auto codes = as<std::uint8_t>(from.values) + at;
      float scale = load_scale(from, at);
      FUSED_ADAM_VECTORIZE
      for (std::size_t i = 0; i < kChunk; ++i) buffer[i] = load_uint8(codes[i], scale);
      return buffer;
    }
  }
  return buffer;
}

// Stores 8 or 16 bits of each element. They are narrowed in a loop of their own: compilers that narrow within a longer loop do
// much of it in narrow lanes, twice as slowly.
template <typename Value, typename StoreOne>
FUSED_ADAM_INLINE void store_each(Value* to, StoreOne store_one) {
  alignas(64) std::uint32_t wide[kChunk];
  FUSED_ADAM_VECTORIZE
  for (std::size_t i = 0; i < kChunk; ++i) wide[i] = store_one(i);
  FUSED_ADAM_VECTORIZE
  for (std::size_t i = 0; i < kChunk; ++i) to[i] = Value(wide[i]);
}

// Where a chunk's float32 results go, before store_chunk.
FUSED_ADAM_INLINE float* chunk_target(Target to, Format format, std::size_t at, float* buffer) {
  return format == Format::float32 ? as<float>(to.values) + at : buffer;
}

FUSED_ADAM_INLINE std::uint32_t largest_magnitude(const float* x) {
  std::uint32_t largest = 0;
  for (std::size_t i = 0; i < kChunk; ++i) {
    std::uint32_t magnitude = block_magnitude(x[i]);
    largest = magnitude > largest ? magnitude : largest;
  }
  return largest;
}

// Returns what values of the chunk that begins at `at` are multiplied by.
FUSED_ADAM_INLINE float store_scale(BlockScale scale, Target to, std::size_t at) {
  as<std::uint16_t>(to.extra)[at / kChunk] = std::uint16_t(scale.stored);
  return scale.inverse;
}

// `random` has 16 bits at `shift` for each element, or is null: to nearest.
FUSED_ADAM_INLINE void store_chunk(const float* x, Target to, Format format, std::size_t at,
                                   const std::uint32_t* random, int shift) {
  auto at_random = [=](std::size_t i) { return Rounding{true, random[i] >> shift & 0xFFFFu}; };
  const Rounding nearest{false, 0};
  switch (format) {
    case Format::float32:
      return;
    case Format::bfloat16: {
      auto values = as<std::uint16_t>(to.values) + at;
      if (random) {
        store_each(values, [=](std::size_t i) { return store_bfloat16(x[i], at_random(i)); });
      } else {
        store_each(values, [=](std::size_t i) { return store_bfloat16(x[i], nearest); });
      }
      return;
    }
    case Format::float16: {
      auto values = as<std::uint16_t>(to.values) + at;
      if (random) {
        store_each(values, [=](std::size_t i) { return store_float16(x[i], at_random(i)); });
      } else {
        half::from_float(x, kChunk, values);
      }
      return;
    }
    case Format::bfloat16_remainder: {
      store_each(as<std::uint16_t>(to.values) + at,
                 [=](std::size_t i) { return split(x[i]).bfloat16; });
      store_each(as<std::int16_t>(to.extra) + at,
                 [=](std::size_t i) { return std::uint32_t(split(x[i]).remainder); });
      return;
    }
    case Format::int8: {
      auto codes = as<std::int8_t>(to.values) + at;
      float inverse = store_scale(scale_of_m(largest_magnitude(x)), to, at);
      if (random) {
        store_each(codes, [=](std::size_t i) { return store_int8(x[i], inverse, at_random(i)); });
      } else {
        store_each(codes, [=](std::size_t i) { return store_int8(x[i], inverse, nearest); });
      }
      return;
    }
    case Format::uint8: {
      auto codes = as<std::uint8_t>(to.values) + at;
      float inverse = store_scale(scale_of_v(largest_magnitude(x)), to, at);
      if (random) {
        store_each(codes, [=](std::size_t i) { return store_uint8(x[i], inverse, at_random(i)); });
      } else {
        store_each(codes, [=](std::size_t i) { return store_uint8(x[i], inverse, nearest); });
      }
      return;
    }
  }
}

// ---- A run's last chunk ----

constexpr std::size_t value_bytes(Format format) {
  return format == Format::float32 ? 4 : format == Format::int8 || format == Format::uint8 ? 1 : 2;
}

// A short chunk is copied to a whole one, whose missing elements are zeros. Scales are read and written where they lie.
struct PaddedChunk {
  alignas(64) char values[kChunk * sizeof(float)] = {};
  alignas(64) char remainders[kChunk * sizeof(std::int16_t)] = {};

  Source load(Source from, Format format, std::size_t at, std::size_t count) {
    __builtin_memcpy(values, from.values + at * value_bytes(format), count * value_bytes(format));
    if (format == Format::bfloat16_remainder) {
      __builtin_memcpy(remainders, from.extra + at * sizeof(std::int16_t),
                       count * sizeof(std::int16_t));
      return {values, remainders};
    }
    if (from.extra) from.extra += at / kChunk * sizeof(std::uint16_t);
    return {values, from.extra};
  }

  Target target(Target to, Format format, std::size_t at) {
    if (format == Format::bfloat16_remainder) return {values, remainders};
    if (to.extra) to.extra += at / kChunk * sizeof(std::uint16_t);
    return {values, to.extra};
  }

  void store(Target to, Format format, std::size_t at, std::size_t count) const {
    __builtin_memcpy(to.values + at * value_bytes(format), values, count * value_bytes(format));
    if (format == Format::bfloat16_remainder) {
      __builtin_memcpy(to.extra + at * sizeof(std::int16_t), remainders,
                       count * sizeof(std::int16_t));
    }
  }
};

}  // namespace
}  // namespace fused_adam::cpu
