// Storage formats on the CPU: a chunk of elements brought to float32 and back, with encodings.h for each element.
// Included by cpu/kernels.cpp alone, once per instruction set. A format is one line in load_chunk and one in
// store_chunk.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/kernels.h"
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

// A chunk is `count` elements that are loaded, updated and stored together: kChunk, a block of the 8-bit formats, so
// few that a processor overlaps one chunk's arithmetic with the next one's loads; or several blocks, where the steps
// from values to a block's scale and on to quantized values are long, so that one block's steps overlap another's.
constexpr std::size_t kChunk = kBlockElements;

// The random bits of a chunk, if any rounding needs them.
template <std::size_t count>
struct ChunkRandom {
  std::uint32_t of_state[count];
  std::uint32_t of_parameter[count];
};

template <typename Value>
FUSED_ADAM_INLINE const Value* as(const char* bytes) {
  return reinterpret_cast<const Value*>(bytes);
}
template <typename Value>
FUSED_ADAM_INLINE Value* as(char* bytes) {
  return reinterpret_cast<Value*>(bytes);
}

// Loads bfloat16 values with corrections by `join_one(value, correction)`.
template <std::size_t count, typename Correction, typename JoinOne>
FUSED_ADAM_INLINE void load_joined(Source from, std::size_t at, float* buffer, JoinOne join_one) {
  auto values = as<std::uint16_t>(from.values) + at;
  auto corrections = as<Correction>(from.auxiliary) + at;
  FUSED_ADAM_VECTORIZE
  for (std::size_t i = 0; i < count; ++i) buffer[i] = join_one(values[i], corrections[i]);
}

// A block's values of 4 bits, two to a byte, and as a byte each. Spelled out, since compilers do not vectorise it; by
// whole vectors, since what is read at once had better been written so.
typedef std::uint8_t Packed __attribute__((vector_size(kChunk / 2)));
typedef std::uint8_t Bytes __attribute__((vector_size(kChunk)));

FUSED_ADAM_INLINE void unpack(const char* values, std::uint8_t* to) {
  Packed both;
  __builtin_memcpy(&both, values, sizeof both);
  Packed first = both & 0xF, second = both >> 4;
  Bytes bytes = __builtin_shufflevector(first, second, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23,  //
                                        8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  __builtin_memcpy(to, &bytes, sizeof bytes);
}

FUSED_ADAM_INLINE void pack(const std::uint8_t* from, char* values) {
  Bytes bytes;
  __builtin_memcpy(&bytes, from, sizeof bytes);
  Packed first = __builtin_shufflevector(bytes, bytes, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  Packed second = __builtin_shufflevector(bytes, bytes, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  first |= second << 4;
  __builtin_memcpy(values, &first, sizeof first);
}

// Where a block's quantized values are, a byte each: in place, or those of 4 bits in the buffer.
template <unsigned bits>
FUSED_ADAM_INLINE const char* block_bytes(const char* values, std::uint8_t* buffer) {
  if constexpr (bits == 8) return values;
  unpack(values, buffer);
  return reinterpret_cast<const char*>(buffer);
}

// Loads quantized values by `load_one(q, scale)`, block by block.
template <std::size_t count, unsigned bits, typename Quantized, typename LoadOne>
FUSED_ADAM_INLINE void load_quantized(Source from, std::size_t at, float* buffer, LoadOne load_one) {
  for (std::size_t block = 0; block < count; block += kChunk) {
    alignas(64) std::uint8_t bytes[kChunk];
    auto quantized = as<Quantized>(block_bytes<bits>(from.values + (at + block) * bits / 8, bytes));
    float scale = load_bfloat16(as<std::uint16_t>(from.auxiliary)[(at + block) / kChunk]);
    FUSED_ADAM_VECTORIZE
    for (std::size_t i = 0; i < kChunk; ++i) buffer[block + i] = load_one(quantized[i], scale);
  }
}

// Returns a chunk's values as float32: in place, or in the buffer. `at` is the chunk's place within the run.
template <std::size_t count>
FUSED_ADAM_INLINE const float* load_chunk(Source from, Format format, std::size_t at, float* buffer) {
  switch (format) {
    case Format::float32:
      return as<float>(from.values) + at;
    case Format::bfloat16: {
      auto values = as<std::uint16_t>(from.values) + at;
      FUSED_ADAM_VECTORIZE
      for (std::size_t i = 0; i < count; ++i) buffer[i] = load_bfloat16(values[i]);
      return buffer;
    }
    case Format::float16:
      half::to_float(as<std::uint16_t>(from.values) + at, count, buffer);
      return buffer;
    case Format::bfloat16_correction_16:
      load_joined<count, std::int16_t>(from, at, buffer, [](int upper, int lower) { return join(upper, lower); });
      return buffer;
    case Format::bfloat16_correction_8:
      load_joined<count, std::int8_t>(from, at, buffer, [](int upper, int lower) { return join_24(upper, lower); });
      return buffer;
    case Format::int8:
      load_quantized<count, 8, std::int8_t>(from, at, buffer, [](int q, float scale) { return load_int8(q, scale); });
      return buffer;
    case Format::uint8:
      load_quantized<count, 8, std::uint8_t>(from, at, buffer, [](int q, float scale) { return load_uint8(q, scale); });
      return buffer;
    case Format::int4:
      load_quantized<count, 4, std::uint8_t>(from, at, buffer, [](int q, float scale) { return load_int4(q, scale); });
      return buffer;
    case Format::uint4:
      load_quantized<count, 4, std::uint8_t>(from, at, buffer, [](int q, float scale) { return load_uint4(q, scale); });
      return buffer;
  }
  return buffer;
}

// Stores 8 or 16 bits of each element. They are narrowed in a loop of their own: compilers that narrow within a longer
// loop do much of it in narrow lanes, twice as slowly.
template <std::size_t count, typename Value, typename StoreOne>
FUSED_ADAM_INLINE void store_each(Value* to, StoreOne store_one) {
  alignas(64) std::uint32_t wide[count];
  FUSED_ADAM_VECTORIZE
  for (std::size_t i = 0; i < count; ++i) wide[i] = store_one(i);
  FUSED_ADAM_VECTORIZE
  for (std::size_t i = 0; i < count; ++i) to[i] = Value(wide[i]);
}

// Stores bfloat16 values and their corrections, narrowed likewise.
template <std::size_t count, typename Correction, typename SplitOne>
FUSED_ADAM_INLINE void store_split(Target to, std::size_t at, SplitOne split_one) {
  auto values = as<std::uint16_t>(to.values) + at;
  auto corrections = as<Correction>(to.auxiliary) + at;
  alignas(64) std::uint32_t uppers[count], lowers[count];
  FUSED_ADAM_VECTORIZE
  for (std::size_t i = 0; i < count; ++i) {
    SplitFloat parts = split_one(i);
    uppers[i] = parts.bfloat16;
    lowers[i] = parts.correction;
  }
  FUSED_ADAM_VECTORIZE
  for (std::size_t i = 0; i < count; ++i) values[i] = std::uint16_t(uppers[i]);
  FUSED_ADAM_VECTORIZE
  for (std::size_t i = 0; i < count; ++i) corrections[i] = Correction(lowers[i]);
}

// Stores a block's quantized values, of which those of 4 bits must be no larger.
template <unsigned bits, typename StoreOne>
FUSED_ADAM_INLINE void store_block(char* to, StoreOne store_one) {
  if constexpr (bits == 8) {
    store_each<kChunk>(as<std::uint8_t>(to), store_one);
  } else {
    alignas(64) std::uint8_t bytes[kChunk];
    store_each<kChunk>(bytes, store_one);
    pack(bytes, to);
  }
}

// Where a chunk's float32 results go, before store_chunk.
FUSED_ADAM_INLINE float* chunk_target(Target to, Format format, std::size_t at, float* buffer) {
  return format == Format::float32 ? as<float>(to.values) + at : buffer;
}

// In two loops, since compilers do not vectorise a maximum of what is chosen.
FUSED_ADAM_INLINE std::uint32_t largest_magnitude(const float* x) {
  alignas(64) std::uint32_t magnitudes[kChunk];
  FUSED_ADAM_VECTORIZE
  for (std::size_t i = 0; i < kChunk; ++i) magnitudes[i] = block_magnitude(x[i]);
  std::uint32_t largest = 0;
  FUSED_ADAM_VECTORIZE
  for (std::size_t i = 0; i < kChunk; ++i) {
    largest = magnitudes[i] > largest ? magnitudes[i] : largest;
  }
  return largest;
}

// Stores the scales of all blocks first, by `scale_of(largest magnitude)`; then values by `store_one(i, inverse
// scale)`.
template <std::size_t count, unsigned bits, typename ScaleOf, typename StoreOne>
FUSED_ADAM_INLINE void store_quantized(const float* x, Target to, std::size_t at, ScaleOf scale_of,
                                       StoreOne store_one) {
  float inverses[count / kChunk];
  for (std::size_t block = 0; block < count / kChunk; ++block) {
    BlockScale scale = scale_of(largest_magnitude(x + block * kChunk));
    as<std::uint16_t>(to.auxiliary)[at / kChunk + block] = std::uint16_t(scale.stored);
    inverses[block] = scale.inverse;
  }
  for (std::size_t block = 0; block < count / kChunk; ++block) {
    float inverse = inverses[block];
    store_block<bits>(to.values + (at + block * kChunk) * bits / 8,
                      [=](std::size_t i) { return store_one(block * kChunk + i, inverse); });
  }
}

// How a chunk's values are rounded: stochastically, if there are bits for its elements.
struct ChunkRounding {
  const std::uint32_t* random = nullptr;
  unsigned shift = 0;
  unsigned advance = 0;

  FUSED_ADAM_INLINE Rounding operator[](std::size_t i) const { return {true, random_half(random[i], shift, advance)}; }
};

template <std::size_t count>
FUSED_ADAM_INLINE void store_chunk(const float* x, Target to, Format format, std::size_t at, ChunkRounding rounding) {
  const Rounding nearest{false, 0};
  switch (format) {
    case Format::float32:
      return;
    case Format::bfloat16: {
      auto values = as<std::uint16_t>(to.values) + at;
      if (rounding.random) {
        store_each<count>(values, [=](std::size_t i) { return store_bfloat16(x[i], rounding[i]); });
      } else {
        store_each<count>(values, [=](std::size_t i) { return store_bfloat16(x[i], nearest); });
      }
      return;
    }
    case Format::float16: {
      auto values = as<std::uint16_t>(to.values) + at;
      if (rounding.random) {
        store_each<count>(values, [=](std::size_t i) { return store_float16(x[i], rounding[i]); });
      } else {
        half::from_float(x, count, values);
      }
      return;
    }
    case Format::bfloat16_correction_16:
      store_split<count, std::uint16_t>(to, at, [=](std::size_t i) { return split(x[i]); });
      return;
    case Format::bfloat16_correction_8:
      if (rounding.random) {
        store_split<count, std::uint8_t>(to, at, [=](std::size_t i) { return split_24(x[i], rounding[i]); });
      } else {
        store_split<count, std::uint8_t>(to, at, [=](std::size_t i) { return split_24(x[i], nearest); });
      }
      return;
    case Format::int8: {
      store_quantized<count, 8>(
          x, to, at, [](std::uint32_t largest) { return scale_of_m8(largest); },
          [=](std::size_t i, float inverse) {
            return store_int8(x[i], inverse, rounding.random ? rounding[i] : nearest);
          });
      return;
    }
    case Format::uint8: {
      store_quantized<count, 8>(
          x, to, at, [](std::uint32_t largest) { return scale_of_v8(largest); },
          [=](std::size_t i, float inverse) {
            return store_uint8(x[i], inverse, rounding.random ? rounding[i] : nearest);
          });
      return;
    }
    case Format::int4: {
      store_quantized<count, 4>(
          x, to, at, [](std::uint32_t largest) { return scale_of_m4(largest); },
          [=](std::size_t i, float inverse) {
            return store_int4(x[i], inverse, rounding.random ? rounding[i] : nearest);
          });
      return;
    }
    case Format::uint4: {
      store_quantized<count, 4>(
          x, to, at, [](std::uint32_t largest) { return scale_of_v4(largest); },
          [=](std::size_t i, float inverse) {
            return store_uint4(x[i], inverse, rounding.random ? rounding[i] : nearest);
          });
      return;
    }
  }
}

// ---- A run's last chunk ----

// A short chunk is copied to a whole one, whose missing elements are zeros. Scales are read and written in place.
struct PaddedChunk {
  alignas(64) char values[kChunk * sizeof(float)] = {};
  alignas(64) char corrections[kChunk * sizeof(std::int16_t)] = {};

  Source load(Source from, Format format, std::size_t at, std::size_t count) {
    __builtin_memcpy(values, from.values + bytes_of(format, at), bytes_of(format, count));
    if (std::size_t bytes = correction_bytes(format)) {
      __builtin_memcpy(corrections, from.auxiliary + at * bytes, count * bytes);
      return {values, corrections};
    }
    if (from.auxiliary) from.auxiliary += at / kChunk * sizeof(std::uint16_t);
    return {values, from.auxiliary};
  }

  Target target(Target to, Format format, std::size_t at) {
    if (correction_bytes(format)) return {values, corrections};
    if (to.auxiliary) to.auxiliary += at / kChunk * sizeof(std::uint16_t);
    return {values, to.auxiliary};
  }

  void store(Target to, Format format, std::size_t at, std::size_t count) const {
    __builtin_memcpy(to.values + bytes_of(format, at), values, bytes_of(format, count));
    // The other half of a row's last byte is no element's.
    if (value_bits(format) == 4 && count % 2 == 1) to.values[bytes_of(format, at + count) - 1] &= 0xF;
    if (std::size_t bytes = correction_bytes(format)) {
      __builtin_memcpy(to.auxiliary + at * bytes, corrections, count * bytes);
    }
  }
};

}  // namespace
}  // namespace fused_adam::cpu
