// Transposes a tile of a column-major matrix, in blocks that fit into registers. Included by cpu/kernels.cpp alone,
// once per instruction set. A vector holds 16 bytes of each of several columns, so that all shuffles stay within 16
// bytes: such are the ones that every processor does at once, and 16-byte loads seldom cross a cache line.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

namespace fused_adam::cpu {
namespace {

template <typename Element>
struct Block {
  static constexpr std::size_t kPartBytes = 16;
  static constexpr std::size_t kParts = FUSED_ADAM_VECTOR_BYTES / kPartBytes;
  static constexpr std::size_t kRows = kPartBytes / sizeof(Element);
  static constexpr std::size_t kColumns = kRows * kParts;
  typedef Element Vector __attribute__((vector_size(FUSED_ADAM_VECTOR_BYTES)));

  // One of the kRows vectors of a block: 16 bytes of column `column`, of the one kRows later, and so on.
  static FUSED_ADAM_INLINE Vector load(const Element* from, std::ptrdiff_t from_stride) {
    return load_parts<kParts>(from, std::ptrdiff_t(kRows) * from_stride);
  }

  // log2(kRows) rounds of interleaving vector i with vector i + kRows / 2 transpose every part.
  static FUSED_ADAM_INLINE void transpose(Vector (&r)[kRows]) {
    using Lanes = std::make_index_sequence<kColumns>;
    for (std::size_t round = 1; round < kRows; round *= 2) {
      Vector t[kRows];
      for (std::size_t i = 0; i < kRows / 2; ++i) {
        t[2 * i] = interleave<0>(r[i], r[i + kRows / 2], Lanes());
        t[2 * i + 1] = interleave<kRows / 2>(r[i], r[i + kRows / 2], Lanes());
      }
      for (std::size_t i = 0; i < kRows; ++i) r[i] = t[i];
    }
  }

 private:
  template <std::size_t count>
  struct Parts {
    typedef Element Type __attribute__((vector_size(count * kPartBytes)));
  };

  template <std::size_t count>
  static FUSED_ADAM_INLINE typename Parts<count>::Type load_parts(const Element* from, std::ptrdiff_t stride) {
    if constexpr (count == 1) {
      typename Parts<1>::Type part;
      __builtin_memcpy(&part, from, sizeof part);
      return part;
    } else {
      return join(load_parts<count / 2>(from, stride),
                  load_parts<count / 2>(from + std::ptrdiff_t(count / 2) * stride, stride),
                  std::make_index_sequence<count * kRows>());
    }
  }

  template <typename Half, std::size_t... i>
  static FUSED_ADAM_INLINE auto join(Half a, Half b, std::index_sequence<i...>) {
    return __builtin_shufflevector(a, b, i...);
  }

  // The lower (from = 0) or upper (from = kRows / 2) halves of each part of two vectors, in turn.
  template <std::size_t from, std::size_t... i>
  static FUSED_ADAM_INLINE Vector interleave(Vector a, Vector b, std::index_sequence<i...>) {
    return __builtin_shufflevector(a, b, (i % 2 * kColumns + i / kRows * kRows + from + i % kRows / 2)...);
  }
};

// See Transpose in cpu/kernels.h.
template <typename Element>
void transpose(const char* from_bytes, std::ptrdiff_t from_stride, std::size_t rows, std::size_t columns,
               char* to_bytes) {
  using Tile = Block<Element>;
  constexpr std::size_t kLine = 64 / sizeof(Element);
  // Columns ahead of the block: lines of so many columns are on their way while one block is transposed.
  constexpr std::size_t kAhead = Tile::kColumns > 8 ? Tile::kColumns : 8;
  auto from = reinterpret_cast<const Element*>(from_bytes);
  auto to = reinterpret_cast<Element*>(to_bytes);
  std::size_t whole_rows = rows - rows % Tile::kRows;
  std::size_t whole_columns = columns - columns % Tile::kColumns;
  for (std::size_t j = 0; j < whole_columns; j += Tile::kColumns) {
    std::size_t ahead = j + kAhead + Tile::kColumns <= columns ? Tile::kColumns : 0;
    for (std::size_t i = 0; i < whole_rows; i += Tile::kRows) {
      if (i % kLine == 0) {
        for (std::size_t k = 0; k < ahead; ++k) {
          __builtin_prefetch(from + i + std::ptrdiff_t(j + kAhead + k) * from_stride);
        }
      }
      typename Tile::Vector block[Tile::kRows];
      for (std::size_t k = 0; k < Tile::kRows; ++k) {
        block[k] = Tile::load(from + i + std::ptrdiff_t(j + k) * from_stride, from_stride);
      }
      Tile::transpose(block);
      for (std::size_t k = 0; k < Tile::kRows; ++k) {
        __builtin_memcpy(to + (i + k) * columns + j, &block[k], sizeof block[k]);
      }
    }
    for (std::size_t i = whole_rows; i < rows; ++i) {
      for (std::size_t k = 0; k < Tile::kColumns; ++k) {
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

}  // namespace
}  // namespace fused_adam::cpu
