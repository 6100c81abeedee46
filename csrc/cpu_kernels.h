// What the CPU back end asks of its vectorised inner loops: update a contiguous run, transpose a tile, gather by a table. cpu_kernels.cpp is compiled once per instruction set; cpu_dispatch.cpp chooses.
#pragma once

#include <cstddef>
#include <cstdint>

#include "adam_rule.h"
#include "storage.h"
#include "storage_formats.h"

namespace fused_adam::cpu {

// The elements of a run. They are addressed by bytes, so that one type serves every format.
struct RunPointers {
  const char* parameter;
  const char* gradient;
  const char* m;
  const char* v;
  char* new_parameter;  // these may equal the old ones
  char* new_m;
  char* new_v;
};

struct RunFormats {
  Format parameter;
  Format gradient;
  Format state;  // m and v
};

// What of a tensor's results is rounded stochastically in one step.
struct StepRounding {
  bool parameter = false;
  bool m = false;
  bool v = false;
  RoundingKey key{};
};

// Updates n consecutive elements, the tensor's `first` and on in row-major order.
using Update = void (*)(const RunPointers&, std::size_t first, std::size_t n, RunFormats,
                        AdamScalars<float>, AdamConstants, const StepRounding&);

// Writes the rows x columns tile at `from` (element [i][j] at from[i + j * from_stride]) row by row, `columns` elements
// apart, to `to`. Strides are in elements.
using Transpose = void (*)(const char* from, std::ptrdiff_t from_stride, std::size_t rows,
                           std::size_t columns, char* to);

// to[i] = from[offsets[i]], in elements.
using Gather = void (*)(const char* from, const std::int64_t* offsets, std::size_t n, char* to);

struct Kernels {
  const char* isa;
  Update adam;
  Update traffic;
  Transpose transpose_2_bytes;
  Transpose transpose_4_bytes;
  Gather gather_2_bytes;
  Gather gather_4_bytes;
};

// The set in use.
const Kernels& kernels();

// The i-th set that this machine can run, best first; nullptr past the last.
const Kernels* supported_kernels(std::size_t i);

}  // namespace fused_adam::cpu
