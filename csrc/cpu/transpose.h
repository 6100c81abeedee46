// Transposes a tile of a column-major matrix, in blocks that fit into registers. Included by cpu/kernels.cpp alone,
// once per instruction set. A block has as many columns as 16 bytes have elements: few, since their lines share a few
// places of the first-level cache where columns are a power of two apart. Wider vectors were no faster.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace fused_adam::cpu {
namespace {

template <typename Element>
struct Block {
  static constexpr std::size_t kSide = 16 / sizeof(Element);
  typedef Element Vector __attribute__((vector_size(16)));

  static FUSED_ADAM_INLINE void transpose(const Element* from, std::ptrdiff_t from_stride, Element* to,
                                          std::ptrdiff_t to_stride) {
    Vector columns[kSide];
    for (std::size_t k = 0; k < kSide; ++k) {
      __builtin_memcpy(&columns[k], from + std::ptrdiff_t(k) * from_stride, sizeof(Vector));
    }
    // log2(kSide) rounds of interleaving vector i with vector i + kSide / 2.
    using Lanes = std::make_index_sequence<kSide>;
    for (std::size_t round = 1; round < kSide; round *= 2) {
      Vector t[kSide];
      for (std::size_t i = 0; i < kSide / 2; ++i) {
        t[2 * i] = interleave<0>(columns[i], columns[i + kSide / 2], Lanes());
        t[2 * i + 1] = interleave<kSide / 2>(columns[i], columns[i + kSide / 2], Lanes());
      }
      for (std::size_t i = 0; i < kSide; ++i) columns[i] = t[i];
    }
    for (std::size_t k = 0; k < kSide; ++k) {
      __builtin_memcpy(to + std::ptrdiff_t(k) * to_stride, &columns[k], sizeof(Vector));
    }
  }

 private:
  // The lower (from = 0) or upper (from = kSide / 2) halves of two vectors, in turn.
  template <std::size_t from, std::size_t... i>
  static FUSED_ADAM_INLINE Vector interleave(Vector a, Vector b, std::index_sequence<i...>) {
    return __builtin_shufflevector(a, b, (i % 2 * kSide + from + i / 2)...);
  }
};

// See Transpose in cpu/kernels.h.
template <typename Element>
void transpose(const char* from_bytes, std::ptrdiff_t from_stride, std::size_t rows, std::size_t columns,
               char* to_bytes, std::ptrdiff_t to_stride) {
  constexpr std::size_t kSide = Block<Element>::kSide, kLine = 64 / sizeof(Element);
  // Columns ahead of the block, whose lines are on their way while it is transposed.
  constexpr std::size_t kAhead = 8;
  auto from = reinterpret_cast<const Element*>(from_bytes);
  auto to = reinterpret_cast<Element*>(to_bytes);
  auto element = [&](std::size_t i, std::size_t j) {
    to[std::ptrdiff_t(i) * to_stride + std::ptrdiff_t(j)] = from[std::ptrdiff_t(i) + std::ptrdiff_t(j) * from_stride];
  };
  // A line of the tile is written by several blocks: before the next lines where those would push it out of the cache.
  std::size_t rows_at_once = is_crowding(to_stride * std::ptrdiff_t(sizeof(Element))) ? kLine : rows;
  std::size_t whole_columns = columns - columns % kSide;
  for (std::size_t first = 0; first < rows; first += rows_at_once) {
    std::size_t end = first + rows_at_once < rows ? first + rows_at_once : rows;
    std::size_t whole_end = end - (end - first) % kSide;
    for (std::size_t j = 0; j < whole_columns; j += kSide) {
      auto strip = from + std::ptrdiff_t(j) * from_stride;
      std::size_t ahead = j + kAhead + kSide <= columns ? kSide : 0;
      for (std::size_t i = first; i < whole_end; i += kSide) {
        if ((i - first) % kLine == 0) {
          for (std::size_t k = 0; k < ahead; ++k) {
            __builtin_prefetch(strip + i + std::ptrdiff_t(kAhead + k) * from_stride);
          }
        }
        Block<Element>::transpose(strip + i, from_stride, to + std::ptrdiff_t(i) * to_stride + j, to_stride);
      }
      for (std::size_t i = whole_end; i < end; ++i) {
        for (std::size_t k = 0; k < kSide; ++k) element(i, j + k);
      }
    }
    for (std::size_t j = whole_columns; j < columns; ++j) {
      for (std::size_t i = first; i < end; ++i) element(i, j);
    }
  }
}

}  // namespace
}  // namespace fused_adam::cpu
