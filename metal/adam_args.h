// Shared by host (csrc/metal/adam.cpp) and shader (metal/adam.metal): buffer indices, argument structs, sizes.
// Valid C++ and MSL; structs hold only 32-bit fields so that both lay them out alike.
#pragma once

#include "math/adam_rule.h"
#include "math/random_bits.h"

namespace fused_adam {

// Buffers of every kernel. Tensor t of adam_group has kBuffersPerTensor of them from kFirstTensor + t *
// kBuffersPerTensor on.
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
  // Auxiliary arrays, read only where the formats have them:
  kCorrection = 14,
  kMScale = 15,
  kVScale = 16,
  kNewCorrection = 17,
  kNewMScale = 18,
  kNewVScale = 19,
  // The last that Metal has; read only where something is rounded stochastically.
  kStep = 30,
};

enum AdamLimits {
  kBuffersPerTensor = 7,
  kGroupTensors = 4,  // 2 + 4 * 7 buffers and kStep: Metal's 31
  kThreads = 256,     // of a threadgroup, in every kernel
  // A thread updates a run of elements: kShortRun where any of the tensor's arrays is float32, else kLongRun; in
  // adam_general one element, unless the state is quantized. Where alignment allows, one load or store takes a run's
  // bytes of an array, kRunBytes at most: so neighbouring threads access neighbouring bytes, whatever the widths.
  kRunBytes = 16,
  kShortRun = 4,
  kLongRun = 8,
  kLanes = 32,  // of a simdgroup
  // A tile of adam_tiled is a cache line wide along the gradient's unit stride, and along the state's in the narrowest
  // array; a threadgroup updates up to kStripTiles of a row of tiles, which share lines of state and scales.
  kLineBytes = 128,
  kStripTiles = 4,
  // adam_tiled walks bands of this many rows of tiles (by its logarithm), so that tiles which share the gradient's
  // cache lines run together, as well as those which share the state's.
  kTileBand = 2,
};

// Whether every run begins at a multiple of kRunBytes in every buffer.
enum VectorAccess {
  kGradientVectors = 1,
  kStateVectors = 2,  // parameter, m, v and correction, old and new
  kAllVectors = kGradientVectors | kStateVectors,
};

// Shared by all tensors of a node.
struct StepArgs {
  AdamConstants constants;
  RoundingRequest rounding;
  unsigned int scalar_count;  // of ScalarCounts (adam_rule.h)
};

struct LinearArgs {
  StepArgs step;
  unsigned int number;         // of the tensor, in the random bits
  unsigned int first_element;  // of the tensor that the dispatch updates, in row-major order
  // All of the dispatch's elements; with quantized state, those of a row, after which blocks begin anew.
  unsigned int row_length;
  unsigned int vectors;  // VectorAccess
};

struct GroupArgs {
  StepArgs step;
  unsigned int numbers[kGroupTensors];
  unsigned int sizes[kGroupTensors];
  unsigned int vectors[kGroupTensors];
  // Tensor t belongs to the threads before thread_ends[t] and not before those of t - 1.
  unsigned int thread_ends[kGroupTensors];
};

struct TiledArgs {
  StepArgs step;
  unsigned int number;
  unsigned int rows;
  unsigned int columns;
  unsigned int axes;     // around the matrix; may be 0
  unsigned int vectors;  // VectorAccess; other than of quantized state, only where runs are whole
  unsigned int band;     // kTileBand or 0
  unsigned int strip;    // tiles of a threadgroup, at most kStripTiles
};

struct GeneralArgs {
  StepArgs step;
  unsigned int number;
  unsigned int first_element;
  unsigned int axes;          // at least 2
  unsigned int wide_indices;  // whether places in an array need 64 bits
  unsigned int vectors;       // VectorAccess, of quantized state
};

}  // namespace fused_adam
