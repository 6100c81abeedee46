// Transposes a tile of a column-major matrix, in blocks that fit into registers. Included by cpu/kernels.cpp alone,
// once per instruction set. A vector holds consecutive elements of one column, a cache line of it where vectors are that
// long: so each line is read once, also where columns are a power of two apart and push each other out of the cache. All
// shuffles stay within 16 bytes: such are the ones that every processor does at once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace fused_adam::cpu {
namespace {

// kColumns columns, and as many rows for each 16 bytes of a vector.
template <typename Element, std::size_t vector_bytes>
struct Block {
  static constexpr std::size_t kPartBytes = 16;
  static constexpr std::size_t kParts = vector_bytes / kPartBytes;
  static constexpr std::size_t kColumns = kPartBytes / sizeof(Element);
  static constexpr std::size_t kRows = kColumns * kParts;
  typedef Element Vector __attribute__((vector_size(vector_bytes)));
  typedef Element Part __attribute__((vector_size(kPartBytes)));

  static FUSED_ADAM_INLINE void transpose(const Element* from, std::ptrdiff_t from_stride, Element* to,
                                          std::ptrdiff_t to_stride) {
    Vector columns[kColumns];
    for (std::size_t k = 0; k < kColumns; ++k) {
      __builtin_memcpy(&columns[k], from + std::ptrdiff_t(k) * from_stride, sizeof(Vector));
    }
    // log2(kColumns) rounds of interleaving vector i with vector i + kColumns / 2 transpose every part.
    for (std::size_t round = 1; round < kColumns; round *= 2) {
      Vector t[kColumns];
      for (std::size_t i = 0; i < kColumns / 2; ++i) {
        t[2 * i] = interleave<0>(columns[i], columns[i + kColumns / 2], std::make_index_sequence<kRows>());
        t[2 * i + 1] =
            interleave<kColumns / 2>(columns[i], columns[i + kColumns / 2], std::make_index_sequence<kRows>());
      }
      for (std::size_t i = 0; i < kColumns; ++i) columns[i] = t[i];
    }
    for (std::size_t k = 0; k < kColumns; ++k) {
      store_parts(columns[k], to + std::ptrdiff_t(k) * to_stride, std::ptrdiff_t(kColumns) * to_stride,
                  std::make_index_sequence<kParts>());
    }
  }

 private:
  // The lower (from = 0) or upper (from = kColumns / 2) halves of each part of two vectors, in turn.
  template <std::size_t from, std::size_t... i>
  static FUSED_ADAM_INLINE Vector interleave(Vector a, Vector b, std::index_sequence<i...>) {
    return __builtin_shufflevector(a, b, (i % 2 * kRows + i / kColumns * kColumns + from + i % kColumns / 2)...);
  }

  template <std::size_t... part>
  static FUSED_ADAM_INLINE void store_parts(Vector v, Element* to, std::ptrdiff_t stride,
                                            std::index_sequence<part...>) {
    (store_part<part>(v, to + std::ptrdiff_t(part) * stride, std::make_index_sequence<kColumns>()), ...);
  }
  template <std::size_t part, std::size_t... i>
  static FUSED_ADAM_INLINE void store_part(Vector v, Element* to, std::index_sequence<i...>) {
    Part x = __builtin_shufflevector(v, v, (part * kColumns + i)...);
    __builtin_memcpy(to, &x, sizeof x);
  }
};

// See Transpose in cpu/kernels.h.
template <typename Element>
void transpose(const char* from_bytes, std::ptrdiff_t from_stride, std::size_t rows, std::size_t columns,
               char* to_bytes, std::ptrdiff_t to_stride) {
  using Whole = Block<Element, FUSED_ADAM_VECTOR_BYTES>;
  using Part = Block<Element, 16>;
  constexpr std::size_t kLine = 64 / sizeof(Element);
  // Columns ahead of the block, whose lines are on their way while it is transposed.
  constexpr std::size_t kAhead = 8;
  auto from = reinterpret_cast<const Element*>(from_bytes);
  auto to = reinterpret_cast<Element*>(to_bytes);
  auto element = [&](std::size_t i, std::size_t j) {
    to[std::ptrdiff_t(i) * to_stride + std::ptrdiff_t(j)] = from[std::ptrdiff_t(i) + std::ptrdiff_t(j) * from_stride];
  };
  // A line of the tile is written by several blocks: before the next lines where those would push it out of the cache.
  std::size_t rows_at_once = is_crowding(to_stride * std::ptrdiff_t(sizeof(Element))) ? kLine : rows;
  std::size_t whole_columns = columns - columns % Part::kColumns;
  for (std::size_t first = 0; first < rows; first += rows_at_once) {
    std::size_t end = first + rows_at_once < rows ? first + rows_at_once : rows;
    std::size_t whole_end = end - (end - first) % Part::kRows;
    for (std::size_t j = 0; j < whole_columns; j += Part::kColumns) {
      auto strip = from + std::ptrdiff_t(j) * from_stride;
      std::size_t ahead = j + kAhead + Part::kColumns <= columns ? Part::kColumns : 0;
      for (std::size_t i = first; i < whole_end;) {
        if ((i - first) % kLine == 0) {
          for (std::size_t k = 0; k < ahead; ++k) {
            __builtin_prefetch(strip + i + std::ptrdiff_t(kAhead + k) * from_stride);
          }
        }
        auto target = to + std::ptrdiff_t(i) * to_stride + j;
        if (i + Whole::kRows <= whole_end) {
          Whole::transpose(strip + i, from_stride, target, to_stride);
          i += Whole::kRows;
        } else {
          Part::transpose(strip + i, from_stride, target, to_stride);
          i += Part::kRows;
        }
      }
      for (std::size_t i = whole_end; i < end; ++i) {
        for (std::size_t k = 0; k < Part::kColumns; ++k) element(i, j + k);
      }
    }
    for (std::size_t j = whole_columns; j < columns; ++j) {
      for (std::size_t i = first; i < end; ++i) element(i, j);
    }
  }
}

}  // namespace
}  // namespace fused_adam::cpu
