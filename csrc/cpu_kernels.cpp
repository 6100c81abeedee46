// The CPU's inner loops: load -> rule -> store, vectorised by the compiler. CMake compiles this file once per instruction
// set, with FUSED_ADAM_ISA naming it, FUSED_ADAM_HALF_HEADER its float16 conversions and
// FUSED_ADAM_VECTOR_BYTES the width of its vectors. No standard container or algorithm may enter here: an inline function compiled
// for a newer instruction set could be the copy that the linker keeps for everyone.
#include "cpu_kernels.h"

#include <utility>

#include FUSED_ADAM_HALF_HEADER

#if defined(__clang__)
#define FUSED_ADAM_VECTORIZE _Pragma("clang loop vectorize(assume_safety)")
#else
#define FUSED_ADAM_VECTORIZE _Pragma("GCC ivdep")
#endif

namespace fused_adam::cpu {
namespace {

std::uint32_t bits_of(float x) {
  std::uint32_t u;
  __builtin_memcpy(&u, &x, sizeof u);
  return u;
}

float float_of(std::uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, sizeof x);
  return x;
}

struct Float32 {
  using Element = float;
  static float load(float x) { return x; }
  static float store(float x) { return x; }
};

// Round to nearest even; every NaN becomes the one that MLX stores.
struct Bfloat16 {
  using Element = std::uint16_t;
  static float load(std::uint16_t h) { return float_of(std::uint32_t(h) << 16); }
  static std::uint16_t store(float x) {
    std::uint32_t u = bits_of(x);
    std::uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
    return std::uint16_t(x != x ? 0x7FC0u : rounded);
  }
};

template <typename Rule, typename P, typename G, typename S>
void update(const RunPointers& run, std::size_t n, AdamScalars<float> scalars,
            AdamConstants constants) {
  auto parameter = reinterpret_cast<const typename P::Element*>(run.parameter);
  auto gradient = reinterpret_cast<const typename G::Element*>(run.gradient);
  auto m = reinterpret_cast<const typename S::Element*>(run.m);
  auto v = reinterpret_cast<const typename S::Element*>(run.v);
  auto new_parameter = reinterpret_cast<typename P::Element*>(run.new_parameter);
  auto new_m = reinterpret_cast<typename S::Element*>(run.new_m);
  auto new_v = reinterpret_cast<typename S::Element*>(run.new_v);
  FUSED_ADAM_VECTORIZE
  for (std::size_t i = 0; i < n; ++i) {
    AdamState<float> old{P::load(parameter[i]), S::load(m[i]), S::load(v[i])};
    AdamState<float> next = Rule::step(old, G::load(gradient[i]), scalars, constants);
    new_parameter[i] = P::store(next.parameter);
    new_m[i] = S::store(next.m);
    new_v[i] = S::store(next.v);
  }
}

// float16 has conversions of its own (FUSED_ADAM_HALF_HEADER), and compilers do not vectorise them inside the loop above: whole blocks are
// brought to float32 and back in the first-level cache.
struct Float16 {
  using Element = std::uint16_t;
};

constexpr std::size_t kBlock = 512;

// A float16 array stands as float32 while a block is updated; the others stay where they are.
template <typename Storage>
struct Staged {
  using Type = Storage;
  static const char* in(const char* from, std::size_t, float*) { return from; }
  static char* out(char* to, float*) { return to; }
  static void finish(const float*, std::size_t, char*) {}
};

template <>
struct Staged<Float16> {
  using Type = Float32;
  static const char* in(const char* from, std::size_t n, float* block) {
    half::to_float(reinterpret_cast<const std::uint16_t*>(from), n, block);
    return reinterpret_cast<const char*>(block);
  }
  static char* out(char*, float* block) { return reinterpret_cast<char*>(block); }
  static void finish(const float* block, std::size_t n, char* to) {
    half::from_float(block, n, reinterpret_cast<std::uint16_t*>(to));
  }
};

template <typename Rule, typename P, typename G, typename S>
void update_in_blocks(const RunPointers& run, std::size_t n, AdamScalars<float> scalars,
                      AdamConstants constants) {
  float parameter[kBlock], gradient[kBlock], m[kBlock], v[kBlock];
  for (std::size_t start = 0; start < n; start += kBlock) {
    std::size_t count = n - start < kBlock ? n - start : kBlock;
    std::size_t p = start * sizeof(typename P::Element);
    std::size_t g = start * sizeof(typename G::Element);
    std::size_t s = start * sizeof(typename S::Element);
    RunPointers block = {Staged<P>::in(run.parameter + p, count, parameter),
                         Staged<G>::in(run.gradient + g, count, gradient),
                         Staged<S>::in(run.m + s, count, m),
                         Staged<S>::in(run.v + s, count, v),
                         Staged<P>::out(run.new_parameter + p, parameter),
                         Staged<S>::out(run.new_m + s, m),
                         Staged<S>::out(run.new_v + s, v)};
    update<Rule, typename Staged<P>::Type, typename Staged<G>::Type, typename Staged<S>::Type>(
        block, count, scalars, constants);
    Staged<P>::finish(parameter, count, run.new_parameter + p);
    Staged<S>::finish(m, count, run.new_m + s);
    Staged<S>::finish(v, count, run.new_v + s);
  }
}

template <typename Storage>
constexpr bool is_staged = false;
template <>
constexpr bool is_staged<Float16> = true;

template <typename Rule, typename P, typename G, typename S>
constexpr Update update_of() {
  if constexpr (is_staged<P> || is_staged<G> || is_staged<S>) {
    return update_in_blocks<Rule, P, G, S>;
  } else {
    return update<Rule, P, G, S>;
  }
}

template <typename P, typename G>
void fill(Update (&row)[kStorageCount]) {
  row[int(Storage::float32)] = update_of<AdamRule, P, G, Float32>();
  row[int(Storage::bfloat16)] = update_of<AdamRule, P, G, Bfloat16>();
  row[int(Storage::float16)] = update_of<AdamRule, P, G, Float16>();
}

template <typename P>
void fill(Update (&table)[kStorageCount][kStorageCount]) {
  fill<P, Float32>(table[int(Storage::float32)]);
  fill<P, Bfloat16>(table[int(Storage::bfloat16)]);
  fill<P, Float16>(table[int(Storage::float16)]);
}

void fill(Update (&table)[kStorageCount][kStorageCount][kStorageCount]) {
  fill<Float32>(table[int(Storage::float32)]);
  fill<Bfloat16>(table[int(Storage::bfloat16)]);
  fill<Float16>(table[int(Storage::float16)]);
}

// Square blocks as wide as a vector, FUSED_ADAM_VECTOR_BYTES bytes: whole cache lines where the target has such vectors, so
// that many lines are asked for at once.
template <typename Element>
struct Block {
  static constexpr std::size_t kSide = FUSED_ADAM_VECTOR_BYTES / sizeof(Element) > 16
                                           ? 16
                                           : FUSED_ADAM_VECTOR_BYTES / sizeof(Element);
  typedef Element Vector __attribute__((vector_size(kSide * sizeof(Element))));

  // Interleaves the lower (from = 0) or upper (from = kSide / 2) halves of two rows.
  template <std::size_t from, std::size_t... i>
  static Vector interleave(Vector a, Vector b, std::index_sequence<i...>) {
    return __builtin_shufflevector(a, b, (i % 2 * kSide + from + i / 2)...);
  }

  // log2(kSide) rounds of interleaving row i with row i + kSide / 2 transpose the block.
  static void transpose(Vector (&r)[kSide]) {
    using Lanes = std::make_index_sequence<kSide>;
    for (std::size_t round = 1; round < kSide; round *= 2) {
      Vector t[kSide];
      for (std::size_t i = 0; i < kSide / 2; ++i) {
        t[2 * i] = interleave<0>(r[i], r[i + kSide / 2], Lanes());
        t[2 * i + 1] = interleave<kSide / 2>(r[i], r[i + kSide / 2], Lanes());
      }
      for (std::size_t i = 0; i < kSide; ++i) r[i] = t[i];
    }
  }
};

template <typename Element>
void transpose(const char* from_bytes, std::ptrdiff_t from_stride, std::size_t rows,
               std::size_t columns, char* to_bytes) {
  using Tile = Block<Element>;
  using Vector = typename Tile::Vector;
  constexpr std::size_t side = Tile::kSide;
  auto from = reinterpret_cast<const Element*>(from_bytes);
  auto to = reinterpret_cast<Element*>(to_bytes);
  std::size_t whole_rows = rows - rows % side;
  std::size_t whole_columns = columns - columns % side;
  for (std::size_t j = 0; j < whole_columns; j += side) {
    for (std::size_t i = 0; i < whole_rows; i += side) {
      Vector block[side];
      for (std::size_t k = 0; k < side; ++k) {
        __builtin_memcpy(&block[k], from + i + std::ptrdiff_t(j + k) * from_stride, sizeof(Vector));
      }
      Tile::transpose(block);
      for (std::size_t k = 0; k < side; ++k) {
        __builtin_memcpy(to + (i + k) * columns + j, &block[k], sizeof(Vector));
      }
    }
    for (std::size_t i = whole_rows; i < rows; ++i) {
      for (std::size_t k = 0; k < side; ++k) {
        to[i * columns + j + k] = from[i + std::ptrdiff_t(j + k) * from_stride];
      }
    }
  }
  for (std::size_t j = whole_columns; j < columns; ++j) {
    for (std::size_t i = 0; i < rows; ++i) {
      to[i * columns + j] = from[i + std::ptrdiff_t(j) * from_stride];
    }
  }
}

template <typename Element>
void gather(const char* from_bytes, const std::int64_t* offsets, std::size_t n, char* to_bytes) {
  auto from = reinterpret_cast<const Element*>(from_bytes);
  auto to = reinterpret_cast<Element*>(to_bytes);
  for (std::size_t i = 0; i < n; ++i) to[i] = from[offsets[i]];
}

Kernels make_kernels(const char* isa) {
  Kernels set;
  set.isa = isa;
  fill(set.adam);
  set.traffic[int(Storage::float32)] = update_of<TrafficRule, Float32, Float32, Float32>();
  set.traffic[int(Storage::bfloat16)] = update_of<TrafficRule, Bfloat16, Bfloat16, Bfloat16>();
  set.traffic[int(Storage::float16)] = update_of<TrafficRule, Float16, Float16, Float16>();
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
Kernels kernels() { return make_kernels(FUSED_ADAM_NAME(FUSED_ADAM_ISA)); }
}  // namespace FUSED_ADAM_ISA

}  // namespace fused_adam::cpu
