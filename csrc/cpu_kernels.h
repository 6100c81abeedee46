// What the CPU back end asks of its vectorised inner loops: update a contiguous run, transpose a tile.
// cpu_kernels.cpp is compiled once per instruction set; cpu_dispatch.h chooses.
#pragma once

#include <cstddef>
#include <cstdint>

#include "adam_rule.h"

namespace fused_adam::cpu {

// Elements are addressed by bytes here, so that one signature serves every dtype combination.
struct RunPointers {
  const char* parameter;
  const char* gradient;
  const char* m;
  const char* v;
  char* new_parameter;
  char* new_m;
  char* new_v;
};

enum Storage { kFloat32, kBfloat16, kFloat16, kStorageCount };
enum Rule { kAdam, kTraffic, kRuleCount };

// Updates n consecutive elements; a new_* pointer may equal its old one.
using Update = void (*)(const RunPointers&, std::size_t n, AdamScalars<float>, AdamConstants);

// Writes the rows x columns tile at `from` (element [i][j] at from[i + j * from_stride]) row by row, `columns` elements
// apart, to `to`. Strides are in elements.
using Transpose = void (*)(const char* from, std::ptrdiff_t from_stride, std::size_t rows,
                           std::size_t columns, char* to);

struct Kernels {
  const char* isa;
  Update update[kRuleCount][kStorageCount][kStorageCount]
               [kStorageCount];  // [parameter][gradient][state]
  Transpose transpose_2_bytes;
  Transpose transpose_4_bytes;
};

// The set in use; cpu_dispatch.cpp chooses it.
const Kernels& kernels();

}  // namespace fused_adam::cpu
