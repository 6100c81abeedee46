// Storage formats on the CPU: a chunk of elements brought to float32 and back, with encodings.h for each element.
// Included by cpu/kernels.cpp alone, once per instruction set. A format is one line in load_chunk and one in
// store_chunk.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/vectors.h"
// After it, since templates of encodings.h call what it has for vectors.
#include "cpu/kernels.h"
#include FUSED_ADAM_HALF_HEADER

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

// Loads quantized values by `load_one(q, scale)`, block by block.
template <std::size_t count, unsigned bits, typename Quantized, typename LoadOne>
FUSED_ADAM_INLINE void load_quantized(Source from, std::size_t at, float* buffer, LoadOne load_one) {
  for (std::size_t block = 0; block < count; block += kChunk) {
    float scale = load_bfloat16(as<std::uint16_t>(from.auxiliary)[(at + block) / kChunk]);
    for (std::size_t i = 0; i < kChunk; i += kLanes) {
      auto values = as<Quantized>(from.values + (at + block + i) * bits / 8);
      Ints q;
      if constexpr (bits == 8) {
        q = widen(values);
      } else {
        q = unpack(values);
      }
      store_vector(buffer + block + i, load_one(q, scale));
    }
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
      load_quantized<count, 8, std::int8_t>(from, at, buffer, [](Ints q, float scale) { return load_int8(q, scale); });
      return buffer;
    case Format::uint8:
      load_quantized<count, 8, std::uint8_t>(from, at, buffer,
                                             [](Ints q, float scale) { return load_uint8(q, scale); });
      return buffer;
    case Format::int4:
      load_quantized<count, 4, std::uint8_t>(from, at, buffer, [](Ints q, float scale) { return load_int4(q, scale); });
      return buffer;
    case Format::uint4:
      load_quantized<count, 4, std::uint8_t>(from, at, buffer,
                                             [](Ints q, float scale) { return load_uint4(q, scale); });
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

// Where a chunk's float32 results go, before store_chunk.
FUSED_ADAM_INLINE float* chunk_target(Target to, Format format, std::size_t at, float* buffer) {
  return format == Format::float32 ? as<float>(to.values) + at : buffer;
}

// How a chunk's values are rounded: stochastically, if there are bits for its elements.
struct ChunkRounding {
  const std::uint32_t* random = nullptr;
  unsigned shift = 0;
  unsigned advance = 0;

  FUSED_ADAM_INLINE Rounding operator[](std::size_t i) const { return {true, random_half(random[i], shift, advance)}; }

  // Of the elements of a vector from `i` on.
  FUSED_ADAM_INLINE RoundingOf<Words> vector(std::size_t i) const {
    if (!random) return {false, Words{}};
    return {true, random_half(load_vector<Words>(random + i), shift, advance)};
  }
};

// Of a block.
FUSED_ADAM_INLINE std::uint32_t largest_magnitude(const float* x) {
  Words largest = Words{};
  for (std::size_t i = 0; i < kChunk; i += kLanes) {
    Words magnitudes = block_magnitude(load_vector<Floats>(x + i));
    largest = magnitudes > largest ? magnitudes : largest;
  }
  return largest_lane(largest);
}

// Stores the scales of all blocks first, by `scale_of(largest magnitude)`; then values by `store_one(x, inverse scale,
// rounding)`.
template <std::size_t count, unsigned bits, typename ScaleOf, typename StoreOne>
FUSED_ADAM_INLINE void store_quantized(const float* x, Target to, std::size_t at, ChunkRounding rounding,
                                       ScaleOf scale_of, StoreOne store_one) {
  float inverses[count / kChunk];
  for (std::size_t block = 0; block < count / kChunk; ++block) {
    BlockScale scale = scale_of(largest_magnitude(x + block * kChunk));
    as<std::uint16_t>(to.auxiliary)[at / kChunk + block] = std::uint16_t(scale.stored);
    inverses[block] = scale.inverse;
  }
  for (std::size_t i = 0; i < count; i += kLanes) {
    Ints q = store_one(load_vector<Floats>(x + i), inverses[i / kChunk], rounding.vector(i));
    auto values = as<std::uint8_t>(to.values + (at + i) * bits / 8);
    if constexpr (bits == 8) {
      narrow(q, values);
    } else {
      pack(q, values);
    }
  }
}

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
    case Format::int8:
      return store_quantized<count, 8>(
          x, to, at, rounding, [](std::uint32_t largest) { return scale_of_m8(largest); },
          [](Floats x, float inverse, RoundingOf<Words> rounding) { return store_int8(x, inverse, rounding); });
    case Format::uint8:
      return store_quantized<count, 8>(
          x, to, at, rounding, [](std::uint32_t largest) { return scale_of_v8(largest); },
          [](Floats x, float inverse, RoundingOf<Words> rounding) { return store_uint8(x, inverse, rounding); });
    case Format::int4:
      return store_quantized<count, 4>(
          x, to, at, rounding, [](std::uint32_t largest) { return scale_of_m4(largest); },
          [](Floats x, float inverse, RoundingOf<Words> rounding) { return store_int4(x, inverse, rounding); });
    case Format::uint4:
      return store_quantized<count, 4>(
          x, to, at, rounding, [](std::uint32_t largest) { return scale_of_v4(largest); },
          [](Floats x, float inverse, RoundingOf<Words> rounding) { return store_uint4(x, inverse, rounding); });
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
