// The CPU's inner loops: load -> rule -> store, vectorised by the compiler. CMake compiles this file once per
// instruction set, with FUSED_ADAM_ISA naming it, FUSED_ADAM_HALF_HEADER its float16 conversions and
// FUSED_ADAM_VECTOR_BYTES the width of its vectors. No standard container or algorithm may enter here: an inline
// function compiled for a newer instruction set could be the copy that the linker keeps for everyone.
#include <type_traits>

#include "cpu/load_store.h"
#include "cpu/pairs.h"
#include "cpu/transpose.h"

namespace fused_adam::cpu {
namespace {

// Formats known when the kernel is compiled, for what most tensors have; TensorFormats are known when it runs. One text
// for both: a new format adds to the kernels and does not multiply them.
template <Format format>
struct AllIn {
  static constexpr Format parameter = format, gradient = format, m = format, v = format;
  static constexpr bool is_quantized() { return false; }
};

FUSED_ADAM_INLINE bool rounds(const TensorRounding& rounding, unsigned result) {
  return (rounding.results & result) != 0u;
}

template <std::size_t count>
FUSED_ADAM_INLINE void fill_random(ChunkRandom<count>& random, std::size_t first, const TensorRounding& rounding) {
  auto start = std::uint32_t(first);
  if (rounds(rounding, kRoundM | kRoundV)) {
    FUSED_ADAM_VECTORIZE
    for (std::size_t i = 0; i < count; ++i) {
      random.of_state[i] = random_bits(rounding.state_key, start + std::uint32_t(i));
    }
  }
  if (rounds(rounding, kRoundParameter)) {
    FUSED_ADAM_VECTORIZE
    for (std::size_t i = 0; i < count; ++i) {
      random.of_parameter[i] = more_random_bits(rounding.parameter_key, start + std::uint32_t(i));
    }
  }
}

template <std::size_t count, typename Formats>
FUSED_ADAM_INLINE void update_chunk(const RunPointers& run, std::size_t at, std::size_t element, const Formats& formats,
                                    AdamScalars<float> scalars, AdamConstants constants,
                                    const TensorRounding& rounding) {
  alignas(64) float parameter_buffer[count], gradient_buffer[count], m_buffer[count], v_buffer[count];
  auto parameter = load_chunk<count>(run.parameter, formats.parameter, at, parameter_buffer);
  auto gradient = load_chunk<count>(run.gradient, formats.gradient, at, gradient_buffer);
  auto m = load_chunk<count>(run.m, formats.m, at, m_buffer);
  auto v = load_chunk<count>(run.v, formats.v, at, v_buffer);
  auto new_parameter = chunk_target(run.new_parameter, formats.parameter, at, parameter_buffer);
  auto new_m = chunk_target(run.new_m, formats.m, at, m_buffer);
  auto new_v = chunk_target(run.new_v, formats.v, at, v_buffer);
  FUSED_ADAM_VECTORIZE
  for (std::size_t i = 0; i < count; ++i) {
    AdamState<float> next = adam_rule(AdamState<float>{parameter[i], m[i], v[i]}, gradient[i], scalars, constants);
    new_parameter[i] = next.parameter;
    new_m[i] = next.m;
    new_v[i] = next.v;
  }
  ChunkRandom<count> random;
  fill_random(random, element, rounding);
  auto state_bits = [&](bool is_random, unsigned shift) {
    return ChunkRounding{is_random ? random.of_state : nullptr, shift, rounding.advance};
  };
  store_chunk<count>(new_parameter, run.new_parameter, formats.parameter, at,
                     {rounds(rounding, kRoundParameter) ? random.of_parameter : nullptr});
  store_chunk<count>(new_m, run.new_m, formats.m, at, state_bits(rounds(rounding, kRoundM), 16));
  store_chunk<count>(new_v, run.new_v, formats.v, at, state_bits(rounds(rounding, kRoundV), 0));
}

// Compiled once, where a run has few chunks.
template <typename Formats>
__attribute__((noinline)) void update_one_chunk(const RunPointers& run, std::size_t at, std::size_t element,
                                                const Formats& formats, AdamScalars<float> scalars,
                                                AdamConstants constants, const TensorRounding& rounding) {
  update_chunk<kChunk>(run, at, element, formats, scalars, constants, rounding);
}

template <typename Formats>
void update_short_chunk(const RunPointers& run, std::size_t at, std::size_t count, std::size_t element,
                        const Formats& formats, AdamScalars<float> scalars, AdamConstants constants,
                        const TensorRounding& rounding) {
  PaddedChunk parameter, gradient, m, v;
  RunPointers padded = {parameter.load(run.parameter, formats.parameter, at, count),
                        gradient.load(run.gradient, formats.gradient, at, count),
                        m.load(run.m, formats.m, at, count),
                        v.load(run.v, formats.v, at, count),
                        parameter.target(run.new_parameter, formats.parameter, at),
                        m.target(run.new_m, formats.m, at),
                        v.target(run.new_v, formats.v, at)};
  update_one_chunk(padded, 0, element, formats, scalars, constants, rounding);
  parameter.store(run.new_parameter, formats.parameter, at, count);
  m.store(run.new_m, formats.m, at, count);
  v.store(run.new_v, formats.v, at, count);
}

// An update of chunks of up to `most` elements, whose rounding of `results` is known when the kernel is compiled.
// Never inlined: in one function with others, a loop is compiled worse.
template <std::size_t most, unsigned results, typename Formats>
__attribute__((noinline)) void update_as(const RunPointers& run, std::size_t first, std::size_t n,
                                         const Formats& formats, AdamScalars<float> scalars, AdamConstants constants,
                                         const TensorRounding& given) {
  unsigned advance = formats.is_quantized() ? given.advance : 0u;
  TensorRounding rounding{results, given.parameter_key, given.state_key, advance};
  std::size_t at = 0;
  for (; at + most <= n; at += most) {
    update_chunk<most>(run, at, first + at, formats, scalars, constants, rounding);
  }
  for (; at + kChunk <= n; at += kChunk) {
    update_one_chunk(run, at, first + at, formats, scalars, constants, rounding);
  }
  if (at < n) {
    update_short_chunk(run, at, n - at, first + at, formats, scalars, constants, rounding);
  }
}

// The cases are all that options and formats ask for.
template <std::size_t most, typename Formats>
FUSED_ADAM_INLINE void update_with(const RunPointers& run, std::size_t first, std::size_t n, const Formats& formats,
                                   AdamScalars<float> scalars, AdamConstants constants,
                                   const TensorRounding& rounding) {
  switch (rounding.results) {
    case 0:
      return update_as<most, 0>(run, first, n, formats, scalars, constants, rounding);
    case kRoundParameter:
      return update_as<most, kRoundParameter>(run, first, n, formats, scalars, constants, rounding);
    case kRoundV:
      return update_as<most, kRoundV>(run, first, n, formats, scalars, constants, rounding);
    case kRoundM | kRoundV:
      return update_as<most, kRoundM | kRoundV>(run, first, n, formats, scalars, constants, rounding);
    case kRoundParameter | kRoundV:
      return update_as<most, kRoundParameter | kRoundV>(run, first, n, formats, scalars, constants, rounding);
    case kRoundParameter | kRoundM | kRoundV:
      return update_as<most, kRoundParameter | kRoundM | kRoundV>(run, first, n, formats, scalars, constants, rounding);
  }
}

void update(const RunPointers& run, std::size_t first, std::size_t n, const TensorFormats& formats,
            AdamScalars<float> scalars, AdamConstants constants, const TensorRounding& rounding) {
  constexpr Format f32 = Format::float32, bf16 = Format::bfloat16, f16 = Format::float16,
                   split = Format::bfloat16_correction_16;
  auto are = [&](Format parameter, Format gradient, Format state) {
    return formats.parameter == parameter && formats.gradient == gradient && formats.m == state && formats.v == state;
  };
  if (are(f32, f32, f32)) {
    update_as<kChunk, 0>(run, first, n, AllIn<f32>(), scalars, constants, rounding);
  } else if (are(bf16, bf16, bf16)) {
    update_with<kChunk>(run, first, n, InPairs<bf16, bf16>(), scalars, constants, rounding);
  } else if (are(f16, f16, bf16)) {
    update_with<kChunk>(run, first, n, InPairs<f16, f16>(), scalars, constants, rounding);
  } else if (are(split, bf16, bf16)) {
    update_with<kChunk>(run, first, n, InPairs<split, bf16>(), scalars, constants, rounding);
  } else {
    update_with<4 * kChunk>(run, first, n, formats, scalars, constants, rounding);
  }
}

FUSED_ADAM_INLINE void keep_array(Source from, Target to, Format format, std::size_t n) {
  if (from.values != to.values) __builtin_memcpy(to.values, from.values, bytes_of(format, n));
  if (from.auxiliary == to.auxiliary) return;
  std::size_t corrections = n * correction_bytes(format);
  std::size_t scales = (n + kChunk - 1) / kChunk * sizeof(std::uint16_t);
  __builtin_memcpy(to.auxiliary, from.auxiliary, corrections ? corrections : scales);
}

void keep(const RunPointers& run, std::size_t, std::size_t n, const TensorFormats& formats, AdamScalars<float>,
          AdamConstants, const TensorRounding&) {
  keep_array(run.parameter, run.new_parameter, formats.parameter, n);
  keep_array(run.m, run.new_m, formats.m, n);
  keep_array(run.v, run.new_v, formats.v, n);
}

// One lane for each element of a chunk, so that the order of summation does not depend on the width of vectors.
class SquareLanes {
 public:
  FUSED_ADAM_INLINE void add(const float* x) {
    for (std::size_t i = 0; i < kVectors; ++i) {
      Vector values;
      __builtin_memcpy(&values, x + i * kWidth, sizeof values);
      sums_[i] += values * values;
    }
  }

  // The sum of all lanes, pairwise.
  FUSED_ADAM_INLINE float total() const {
    float lanes[kChunk];
    __builtin_memcpy(lanes, sums_, sizeof lanes);
    for (std::size_t half = kChunk / 2; half > 0; half /= 2) {
      for (std::size_t i = 0; i < half; ++i) lanes[i] += lanes[i + half];
    }
    return lanes[0];
  }

 private:
  static constexpr std::size_t kWidth = FUSED_ADAM_VECTOR_BYTES / sizeof(float);
  static constexpr std::size_t kVectors = kChunk / kWidth;
  typedef float Vector __attribute__((vector_size(FUSED_ADAM_VECTOR_BYTES)));

  Vector sums_[kVectors] = {};
};

// A processor reads several streams faster than one: a run is read from so many places at once.
constexpr std::size_t kStreams = 8;

// The format may be one that is known when the kernel is compiled.
template <typename OneFormat>
FUSED_ADAM_INLINE double sum_of_squares_of(Source from, OneFormat format, std::size_t n) {
  // So few additions a lane that their rounding stays far below a gradient's own.
  constexpr std::size_t kMostAdditions = 64;
  alignas(64) float buffer[kChunk];
  double sum = 0.0;
  SquareLanes lanes;
  std::size_t additions = 0;
  auto add = [&](const float* x) FUSED_ADAM_INLINE_LAMBDA {
    lanes.add(x);
    if (++additions < kMostAdditions) return;
    sum += double(lanes.total());
    lanes = SquareLanes();
    additions = 0;
  };
  std::size_t chunks = n / kChunk, stream = chunks / kStreams;
  for (std::size_t i = 0; i < stream; ++i) {
    for (std::size_t j = 0; j < kStreams; ++j) {
      add(load_chunk<kChunk>(from, format, (j * stream + i) * kChunk, buffer));
    }
  }
  for (std::size_t i = stream * kStreams; i < chunks; ++i) {
    add(load_chunk<kChunk>(from, format, i * kChunk, buffer));
  }
  if (n % kChunk > 0) {
    PaddedChunk last;
    auto rest = last.load(from, format, chunks * kChunk, n % kChunk);
    add(load_chunk<kChunk>(rest, format, 0, buffer));
  }
  return sum + double(lanes.total());
}

double sum_of_squares(Source from, Format format, std::size_t n) {
  if (format == Format::float32) {
    return sum_of_squares_of(from, std::integral_constant<Format, Format::float32>(), n);
  }
  if (format == Format::bfloat16) {
    return sum_of_squares_of(from, std::integral_constant<Format, Format::bfloat16>(), n);
  }
  return sum_of_squares_of(from, format, n);
}

void convert(Source from, Format from_format, Target to, Format to_format, std::size_t n) {
  auto one = [=](Source source, Target target, std::size_t at) {
    alignas(64) float buffer[kChunk];
    auto x = load_chunk<kChunk>(source, from_format, at, buffer);
    auto y = chunk_target(target, to_format, at, buffer);
    if (x != y) __builtin_memmove(y, x, sizeof buffer);
    store_chunk<kChunk>(y, target, to_format, at, {});
  };
  std::size_t at = 0;
  for (; at + kChunk <= n; at += kChunk) one(from, to, at);
  if (at == n) return;
  PaddedChunk old, converted;
  one(old.load(from, from_format, at, n - at), converted.target(to, to_format, at), 0);
  converted.store(to, to_format, at, n - at);
}

template <typename Element>
void gather(const char* from_bytes, const std::int64_t* offsets, std::size_t n, char* to_bytes) {
  auto from = reinterpret_cast<const Element*>(from_bytes);
  auto to = reinterpret_cast<Element*>(to_bytes);
  for (std::size_t i = 0; i < n; ++i) to[i] = from[offsets[i]];
}

KernelSet make_kernels(const char* isa) {
  KernelSet set;
  set.isa = isa;
  set.adam = update;
  set.keep = keep;
  set.sum_of_squares = sum_of_squares;
  set.convert = convert;
  set.transpose_2_bytes = transpose<std::uint16_t>;
  set.transpose_4_bytes = transpose<std::uint32_t>;
  set.gather_2_bytes = gather<std::uint16_t>;
  set.gather_4_bytes = gather<std::uint32_t>;
  return set;
}

}  // namespace

#define FUSED_ADAM_NAME_(isa) #isa
#define FUSED_ADAM_NAME(isa) FUSED_ADAM_NAME_(isa)

namespace FUSED_ADAM_ISA {
KernelSet kernels() { return make_kernels(FUSED_ADAM_NAME(FUSED_ADAM_ISA)); }
}  // namespace FUSED_ADAM_ISA

}  // namespace fused_adam::cpu
