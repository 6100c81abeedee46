// The CPU's inner loops: load -> rule -> store, vectorised by the compiler. CMake compiles this file once per instruction
// set with FUSED_ADAM_ISA naming it. No standard container or algorithm may enter here: an inline function compiled
// for a newer instruction set could be the copy that the linker keeps for everyone.
#include "cpu_kernels.h"

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

// Integer arithmetic with selects (the method of F. Giesen's float/half conversions), since compilers vectorise it for
// every instruction set; round to nearest even, subnormals kept.
struct Float16 {
  using Element = std::uint16_t;
  static float load(std::uint16_t h) {
    std::uint32_t magnitude = std::uint32_t(h & 0x7FFFu) << 13;
    std::uint32_t normal = magnitude + ((127u - 15u) << 23);
    std::uint32_t special = normal + ((128u - 16u) << 23);
    std::uint32_t subnormal = bits_of(float_of(normal + (1u << 23)) - float_of(113u << 23));
    std::uint32_t u = (h & 0x7C00u) == 0x7C00u ? special : normal;
    u = (h & 0x7C00u) == 0u ? subnormal : u;
    return float_of(u | (std::uint32_t(h & 0x8000u) << 16));
  }
  static std::uint16_t store(float x) {
    std::uint32_t sign = bits_of(x) & 0x80000000u;
    std::uint32_t u = bits_of(x) ^ sign;
    std::uint32_t normal = (u - ((127u - 15u) << 23) + 0xFFFu + ((u >> 13) & 1u)) >> 13;
    const std::uint32_t magic = ((127u - 15u) + (23u - 10u) + 1u) << 23;
    std::uint32_t subnormal = bits_of(float_of(u) + float_of(magic)) - magic;
    std::uint32_t h = u < (113u << 23) ? subnormal : normal;
    h = u >= ((127u + 16u) << 23) ? 0x7C00u : h;
    h = u > (255u << 23) ? 0x7E00u : h;
    return std::uint16_t(h | (sign >> 16));
  }
};

template <typename RuleT, typename P, typename G, typename S>
void update(const Run& run, std::size_t n, AdamScalars<float> scalars, AdamConstants constants) {
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
    AdamState<float> next = RuleT::step(old, G::load(gradient[i]), scalars, constants);
    new_parameter[i] = P::store(next.parameter);
    new_m[i] = S::store(next.m);
    new_v[i] = S::store(next.v);
  }
}

template <typename RuleT, typename P, typename G>
void fill(Update (&row)[kStorageCount]) {
  row[kFloat32] = update<RuleT, P, G, Float32>;
  row[kBfloat16] = update<RuleT, P, G, Bfloat16>;
  row[kFloat16] = update<RuleT, P, G, Float16>;
}

template <typename RuleT, typename P>
void fill(Update (&table)[kStorageCount][kStorageCount]) {
  fill<RuleT, P, Float32>(table[kFloat32]);
  fill<RuleT, P, Bfloat16>(table[kBfloat16]);
  fill<RuleT, P, Float16>(table[kFloat16]);
}

template <typename RuleT>
void fill(Update (&table)[kStorageCount][kStorageCount][kStorageCount]) {
  fill<RuleT, Float32>(table[kFloat32]);
  fill<RuleT, Bfloat16>(table[kBfloat16]);
  fill<RuleT, Float16>(table[kFloat16]);
}

// Sixteen-byte vectors: every target has them, and a tile of this size stays in registers.
template <typename Element>
struct Block;

template <>
struct Block<std::uint32_t> {
  typedef std::uint32_t Vector __attribute__((vector_size(16)));
  static constexpr std::size_t kSide = 4;
  static void transpose(Vector (&r)[kSide]) {
    Vector a = __builtin_shufflevector(r[0], r[1], 0, 4, 1, 5);
    Vector b = __builtin_shufflevector(r[0], r[1], 2, 6, 3, 7);
    Vector c = __builtin_shufflevector(r[2], r[3], 0, 4, 1, 5);
    Vector d = __builtin_shufflevector(r[2], r[3], 2, 6, 3, 7);
    r[0] = __builtin_shufflevector(a, c, 0, 1, 4, 5);
    r[1] = __builtin_shufflevector(a, c, 2, 3, 6, 7);
    r[2] = __builtin_shufflevector(b, d, 0, 1, 4, 5);
    r[3] = __builtin_shufflevector(b, d, 2, 3, 6, 7);
  }
};

template <>
struct Block<std::uint16_t> {
  typedef std::uint16_t Vector __attribute__((vector_size(16)));
  static constexpr std::size_t kSide = 8;
  // Three rounds of interleaving row i with row i + 4 transpose an 8 x 8 block.
  static void transpose(Vector (&r)[kSide]) {
    for (int round = 0; round < 3; ++round) {
      Vector t[kSide];
      for (std::size_t i = 0; i < 4; ++i) {
        t[2 * i] = __builtin_shufflevector(r[i], r[i + 4], 0, 8, 1, 9, 2, 10, 3, 11);
        t[2 * i + 1] = __builtin_shufflevector(r[i], r[i + 4], 4, 12, 5, 13, 6, 14, 7, 15);
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

Kernels make_kernels(const char* isa) {
  Kernels set;
  set.isa = isa;
  fill<AdamRule>(set.update[kAdam]);
  fill<TrafficRule>(set.update[kTraffic]);
  set.transpose_2_bytes = transpose<std::uint16_t>;
  set.transpose_4_bytes = transpose<std::uint32_t>;
  return set;
}

}  // namespace

#define FUSED_ADAM_NAME_(isa) #isa
#define FUSED_ADAM_NAME(isa) FUSED_ADAM_NAME_(isa)

namespace FUSED_ADAM_ISA {
Kernels kernels() { return make_kernels(FUSED_ADAM_NAME(FUSED_ADAM_ISA)); }
}  // namespace FUSED_ADAM_ISA

}  // namespace fused_adam::cpu
