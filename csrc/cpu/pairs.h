// Chunks whose values all take 16 bits, read and written as words of two neighbours: so every lane of the loop has 32
// bits, and nothing is widened, narrowed or moved between lanes. Included by cpu/kernels.cpp alone, once per
// instruction set.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/load_store.h"

namespace fused_adam::cpu {
namespace {

typedef std::uint32_t Word __attribute__((aligned(sizeof(std::uint16_t)), may_alias));

// Not as<Word>: a template's argument loses the attributes.
FUSED_ADAM_INLINE const Word* words_at(const char* bytes) { return reinterpret_cast<const Word*>(bytes); }
FUSED_ADAM_INLINE Word* words_at(char* bytes) { return reinterpret_cast<Word*>(bytes); }

FUSED_ADAM_INLINE std::uint16_t first_of(std::uint32_t word) { return std::uint16_t(word); }
FUSED_ADAM_INLINE std::uint16_t second_of(std::uint32_t word) { return std::uint16_t(word >> 16); }
// Signed values, in 32 bits throughout, since a narrower one would make the whole loop's vectors half as wide.
FUSED_ADAM_INLINE std::int32_t first_signed(std::uint32_t word) { return std::int32_t(word << 16) >> 16; }
FUSED_ADAM_INLINE std::int32_t second_signed(std::uint32_t word) { return std::int32_t(word) >> 16; }
FUSED_ADAM_INLINE std::uint32_t word_of(std::uint32_t first, std::uint32_t second) {
  return (first & 0xFFFFu) | (second << 16);
}

// How the values of a chunk's words are read and written in one format; `rounding` is that of both values of a word.
template <Format format>
class Pairs;

template <>
class Pairs<Format::bfloat16> {
 public:
  FUSED_ADAM_INLINE Pairs(Source from, std::size_t at) : words_(words_at(from.values + at * sizeof(std::uint16_t))) {}

  FUSED_ADAM_INLINE float first(std::size_t i) const { return load_bfloat16(first_of(words_[i])); }
  FUSED_ADAM_INLINE float second(std::size_t i) const { return load_bfloat16(second_of(words_[i])); }

  class Target {
   public:
    FUSED_ADAM_INLINE Target(cpu::Target to, std::size_t at)
        : words_(words_at(to.values + at * sizeof(std::uint16_t))) {}
    FUSED_ADAM_INLINE void store(std::size_t i, float first, Rounding of_first, float second, Rounding of_second) {
      words_[i] = word_of(store_bfloat16(first, of_first), store_bfloat16(second, of_second));
    }
    FUSED_ADAM_INLINE void finish(bool) {}

   private:
    Word* words_;
  };

 private:
  const Word* words_;
};

template <>
class Pairs<Format::bfloat16_correction_16> {
 public:
  FUSED_ADAM_INLINE Pairs(Source from, std::size_t at)
      : words_(words_at(from.values + at * sizeof(std::uint16_t))),
        corrections_(words_at(from.auxiliary + at * sizeof(std::int16_t))) {}

  FUSED_ADAM_INLINE float first(std::size_t i) const {
    return join(words_[i] & 0xFFFFu, first_signed(corrections_[i]));
  }
  FUSED_ADAM_INLINE float second(std::size_t i) const { return join(words_[i] >> 16, second_signed(corrections_[i])); }

  class Target {
   public:
    FUSED_ADAM_INLINE Target(cpu::Target to, std::size_t at)
        : words_(words_at(to.values + at * sizeof(std::uint16_t))),
          corrections_(words_at(to.auxiliary + at * sizeof(std::int16_t))) {}
    FUSED_ADAM_INLINE void store(std::size_t i, float first, Rounding, float second, Rounding) {
      SplitFloat a = split(first), b = split(second);
      words_[i] = word_of(a.bfloat16, b.bfloat16);
      corrections_[i] = word_of(a.correction, b.correction);
    }
    FUSED_ADAM_INLINE void finish(bool) {}

   private:
    Word* words_;
    Word* corrections_;
  };

 private:
  const Word* words_;
  const Word* corrections_;
};

// By the processor's conversions, which take and give neighbours, so through buffers; but what is rounded
// stochastically.
template <>
class Pairs<Format::float16> {
 public:
  FUSED_ADAM_INLINE Pairs(Source from, std::size_t at) {
    half::to_floats_apart(as<std::uint16_t>(from.values) + at, kChunk, firsts_, seconds_);
  }
  FUSED_ADAM_INLINE float first(std::size_t i) const { return firsts_[i]; }
  FUSED_ADAM_INLINE float second(std::size_t i) const { return seconds_[i]; }

  class Target {
   public:
    FUSED_ADAM_INLINE Target(cpu::Target to, std::size_t at) : values_(to.values + at * sizeof(std::uint16_t)) {}
    FUSED_ADAM_INLINE void store(std::size_t i, float first, Rounding of_first, float second, Rounding of_second) {
      if (of_first.is_stochastic) {
        words_at(values_)[i] = word_of(store_float16(first, of_first), store_float16(second, of_second));
      } else {
        firsts_[i] = first;
        seconds_[i] = second;
      }
    }
    FUSED_ADAM_INLINE void finish(bool is_stochastic) {
      if (!is_stochastic) half::from_floats_apart(firsts_, seconds_, kChunk, as<std::uint16_t>(values_));
    }

   private:
    char* values_;
    alignas(64) float firsts_[kChunk / 2], seconds_[kChunk / 2];
  };

 private:
  alignas(64) float firsts_[kChunk / 2], seconds_[kChunk / 2];
};

// Formats of tensors that are updated in pairs; m and v are bfloat16.
template <Format of_parameter, Format of_gradient>
struct InPairs {
  static constexpr Format parameter = of_parameter, gradient = of_gradient, m = Format::bfloat16, v = Format::bfloat16;
  static constexpr bool is_quantized() { return false; }
};

template <std::size_t count, Format of_parameter, Format of_gradient>
FUSED_ADAM_INLINE void update_chunk(const RunPointers& run, std::size_t at, std::size_t element,
                                    InPairs<of_parameter, of_gradient>, AdamScalars<float> scalars,
                                    AdamConstants constants, const TensorRounding& rounding) {
  static_assert(count == kChunk);
  using State = Pairs<Format::bfloat16>;
  Pairs<of_parameter> parameter(run.parameter, at);
  Pairs<of_gradient> gradient(run.gradient, at);
  State m(run.m, at), v(run.v, at);
  typename Pairs<of_parameter>::Target new_parameter(run.new_parameter, at);
  State::Target new_m(run.new_m, at), new_v(run.new_v, at);
  auto start = std::uint32_t(element);
  FUSED_ADAM_VECTORIZE
  for (std::uint32_t i = 0; i < count / 2; ++i) {
    AdamState<float> a{parameter.first(i), m.first(i), v.first(i)};
    AdamState<float> b{parameter.second(i), m.second(i), v.second(i)};
    a = adam_rule(a, gradient.first(i), scalars, constants);
    b = adam_rule(b, gradient.second(i), scalars, constants);
    ElementRounding of_a = element_rounding(rounding, start + 2 * i);
    ElementRounding of_b = element_rounding(rounding, start + 2 * i + 1);
    new_v.store(i, a.v, of_a.v, b.v, of_b.v);
    new_m.store(i, a.m, of_a.m, b.m, of_b.m);
    new_parameter.store(i, a.parameter, of_a.parameter, b.parameter, of_b.parameter);
  }
  new_parameter.finish((rounding.results & kRoundParameter) != 0u);
}

}  // namespace
}  // namespace fused_adam::cpu
