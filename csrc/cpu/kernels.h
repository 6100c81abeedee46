// The vectorised inner loops of the CPU back end: update a contiguous run, transpose a tile, gather by a table.
// kernels.cpp is compiled once per instruction set; isa.cpp chooses.
#pragma once

#include <cstddef>
#include <cstdint>

#include "math/adam_rule.h"
#include "math/encodings.h"
#include "math/random_bits.h"
#include "op/formats.h"

namespace fused_adam::cpu {

// An array of values, and beside it the auxiliary array of some formats: a correction for each value, or a scale for
// each block. Addressed by bytes, so that one type serves every format.
struct Source {
  const char* values;
  const char* auxiliary = nullptr;
};
struct Target {
  char* values;
  char* auxiliary = nullptr;
};

// The elements of a run: within one row, and from the beginning of a block if the formats have blocks.
struct RunPointers {
  Source parameter;
  Source gradient;
  Source m;
  Source v;
  Target new_parameter;  // these may equal the old ones
  Target new_m;
  Target new_v;
};

// Updates n consecutive elements, the tensor's `first` and on in row-major order.
using Update = void (*)(const RunPointers&, std::size_t first, std::size_t n, const TensorFormats&, AdamScalars<float>,
                        AdamConstants, const TensorRounding&);

// The sum of the squares of n elements, in float32 and then float64; in the same order on every processor. Infinite or
// NaN if a square is.
using SumOfSquares = double (*)(Source, Format, std::size_t n);

// Stores the n elements of a run in another format, rounded to nearest.
using Convert = void (*)(Source, Format, Target, Format, std::size_t n);

// Whether lines so many bytes apart fall into so few sets of a first-level cache that they push each other out.
constexpr bool is_crowding(std::ptrdiff_t bytes) { return bytes % 512 == 0; }

// Writes the rows x columns tile at `from` (element [i][j] at from[i + j * from_stride]) row by row, `to_stride`
// elements apart, to `to`. Strides are in elements.
using Transpose = void (*)(const char* from, std::ptrdiff_t from_stride, std::size_t rows, std::size_t columns,
                           char* to, std::ptrdiff_t to_stride);

// to[i] = from[offsets[i]], in elements.
using Gather = void (*)(const char* from, const std::int64_t* offsets, std::size_t n, char* to);

struct KernelSet {
  const char* isa;
  Update adam;
  Update keep;  // gives the old values to the new arrays, bit for bit
  SumOfSquares sum_of_squares;
  Convert convert;
  Transpose transpose_2_bytes;
  Transpose transpose_4_bytes;
  Gather gather_2_bytes;
  Gather gather_4_bytes;
};

// The set in use.
const KernelSet& kernels();

// The i-th set that this machine can run, best first; nullptr past the last.
const KernelSet* supported_kernels(std::size_t i);

}  // namespace fused_adam::cpu
