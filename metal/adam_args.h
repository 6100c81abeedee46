// What host (csrc/metal/adam.cpp) and shader (metal/adam.metal) must agree on: buffer indices, argument structs, tile sizes.
// Valid C++ and MSL; structs hold only 32-bit fields so that both lay them out alike.
#pragma once

#include "math/adam_rule.h"

namespace fused_adam {

// Buffers of every kernel. Those of tensor t of adam_group follow each other from kFirstTensor + t * kBuffersPerTensor.
enum AdamBuffer {
  kArgs = 0,
  kScalars = 1,
  kFirstTensor = 2,
  // The other kernels have one tensor:
  kParameter = 2,
  kGradient = 3,
  kM = 4,
  kV = 5,
  kNewParameter = 6,
  kNewM = 7,
  kNewV = 8,
  // Axes of adam_tiled and adam_general:
  kShape = 9,
  kParameterStrides = 10,
  kGradientStrides = 11,
  kMStrides = 12,
  kVStrides = 13,
  // What some formats have beside the values; read only where the formats have it:
  kRemainder = 14,
  kMScale = 15,
  kVScale = 16,
  kNewRemainder = 17,
  kNewMScale = 18,
  kNewVScale = 19,
  // The last that Metal has; read only where something is rounded stochastically.
  kStep = 30,
};

enum AdamLimits {
  kBuffersPerTensor = 7,
  kGroupTensors = 4,  // 2 + 4 * 7 buffers and kStep: Metal's 31
  kThreads = 256,     // of a threadgroup, in every kernel
  // A thread of the other kernels than adam_general updates a run of elements: kShortRun where all the tensor's arrays are
  // float32, else kLongRun. Memory is loaded and stored kRunBytes at a time, codes half as much, where alignment allows.
  kRunBytes = 16,
  kShortRun = 4,
  kLongRun = 8,
  // A block of codes has this many runs, of neighbouring threads: so in every kernel, adam_general too.
  kBlockThreads = 4,
  kTileRuns = 8,  // along a side of the tile that adam_tiled transposes: a cache line of 128 bytes
};

// Results that are rounded stochastically.
enum RoundingFlags { kRoundParameter = 1, kRoundM = 2, kRoundV = 4 };

struct RoundingArgs {
  unsigned int flags;
  unsigned int seed_low;
  unsigned int seed_high;
};

// The buffer of scalars is one of AdamScalarCounts (adam_rule.h).
struct LinearArgs {
  AdamConstants constants;
  unsigned int scalar_count;
  RoundingArgs rounding;
  unsigned int number;         // of the tensor
  unsigned int first_element;  // of the tensor that the dispatch updates, in row-major order
  unsigned int size;
  unsigned int row_length;  // of codes, whose blocks begin anew with each row
  unsigned int vectors;     // whether every run begins at a multiple of kRunBytes in every buffer
};

struct GroupArgs {
  AdamConstants constants;
  unsigned int scalar_count;
  RoundingArgs rounding;
  unsigned int numbers[kGroupTensors];
  unsigned int sizes[kGroupTensors];
  unsigned int vectors[kGroupTensors];
  // Tensor t belongs to the threads before thread_ends[t] and not before those of t - 1.
  unsigned int thread_ends[kGroupTensors];
};

struct TiledArgs {
  AdamConstants constants;
  unsigned int scalar_count;
  RoundingArgs rounding;
  unsigned int number;
  unsigned int rows;
  unsigned int columns;
  unsigned int axes;  // around the matrix; may be 0
  unsigned int vectors;
};

struct GeneralArgs {
  AdamConstants constants;
  unsigned int scalar_count;
  RoundingArgs rounding;
  unsigned int number;
  unsigned int first_element;
  unsigned int axes;  // at least 2
};

}  // namespace fused_adam
