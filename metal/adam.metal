// The Metal kernels of the fused update: load -> rule -> store, one pass over each buffer. The rule is adam_rule.h.
// Compiled on the user's machine from the string that the build embeds; csrc/metal/adam.cpp adds the instantiations
// for the formats it meets (P: parameter, G: gradient, S: m and v) and chooses kernel, buffers and grid.
//
// An element costs 4 loads and 3 stores, 28 bytes in float32 and 14 in 16 bits, and 8 products, 4 sums, a division and
// a root: far less than a GPU computes while it moves them. docs/metal.md has the bandwidth to expect of each kernel.
#include <metal_stdlib>

#include "adam_args.h"
#include "math/adam_rule.h"
#include "math/encodings.h"
#include "math/random_bits.h"
#include "vector_io.h"

using namespace metal;
using namespace fused_adam;

// The results that are rounded stochastically. The host defines them in front of this text, so that nothing is left to
// be decided for each element; without it, kernels read them.
#ifndef FUSED_ADAM_ROUNDED_RESULTS
#define FUSED_ADAM_ROUNDED_RESULTS args.rounding.results
#endif

// Formats of more than one array; those of one are named by its type. encodings.h describes them.
template <typename Correction>
struct BfloatCorrection {};  // P
template <uint bits>
struct QuantizedState {};  // S

// The arrays in memory. T without a name is bfloat, which not every GPU has.
template <typename T>
struct Format {
  typedef T parameter;
  typedef short correction;  // where there is none
  typedef T m;
  typedef T v;
  enum { has_correction = 0, is_quantized = 0, values_per_item = 1 };
};
template <typename Correction>
struct Format<BfloatCorrection<Correction>> {
  typedef ushort parameter;
  typedef Correction correction;
  enum { has_correction = 1 };
};
template <>
struct Format<QuantizedState<8>> {
  typedef int8_t m;
  typedef uint8_t v;
  enum { is_quantized = 1, values_per_item = 1 };
};
template <>
struct Format<QuantizedState<4>> {
  typedef uint8_t m;
  typedef uint8_t v;
  enum { is_quantized = 1, values_per_item = 2 };
};

template <typename P, typename G, typename S>
struct RunLength {
  enum {
    value = sizeof(P) == 4 || sizeof(G) == 4 || sizeof(S) == 4 ? kShortRun : kLongRun,
    block_threads = kBlockElements / value,  // neighbours whose runs make up a block of quantized state
  };
};

// The arrays beside the values; read and written only where the formats have them.
template <typename Correction>
struct AuxiliaryPointers {
  const device Correction* correction;
  const device ushort* m_scale;
  const device ushort* v_scale;
  device Correction* new_correction;
  device ushort* new_m_scale;
  device ushort* new_v_scale;
};

// In place, outputs are inputs: no thread loads an element after its store, or one that is another thread's.
template <typename P, typename G, typename S>
struct TensorPointers {
  const device typename Format<P>::parameter* parameter;
  const device G* gradient;
  const device typename Format<S>::m* m;
  const device typename Format<S>::v* v;
  device typename Format<P>::parameter* new_parameter;
  device typename Format<S>::m* new_m;
  device typename Format<S>::v* new_v;
  AuxiliaryPointers<typename Format<P>::correction> auxiliary;
};

// Where m and v have an element, which is at this row and column.
template <typename S, typename Index>
inline Index item_of(Index element, Index row, uint column, uint columns) {
  constexpr uint neighbours = Format<S>::values_per_item;
  return neighbours == 1 ? element : row * Index((columns + neighbours - 1) / neighbours) + Index(column / neighbours);
}

// Moves the pointers of row-major arrays, but scales, to an element, and to an item of m and v.
template <typename P, typename G, typename S, typename Index>
inline TensorPointers<P, G, S> moved_to(TensorPointers<P, G, S> t, Index element, Index item) {
  t.parameter += element;
  t.gradient += element;
  t.m += item;
  t.v += item;
  t.new_parameter += element;
  t.new_m += item;
  t.new_v += item;
  t.auxiliary.correction += element;
  t.auxiliary.new_correction += element;
  return t;
}

// Shared by all elements of a tensor in one step.
struct TensorStep {
  AdamScalars<float> scalars;
  bool is_applied;
  AdamConstants constants;
  TensorRounding rounding;
};

inline TensorStep load_step(
    constant StepArgs& args,
    uint number,
    const device float* scalars,
    const device uint* step,
    bool is_quantized) {
  TensorStep tensor = {{scalars[0], 1.0f, 1.0f, 1.0f}, true, args.constants, {}};
  if (args.scalar_count == kAllScalars) {
    tensor.scalars = {scalars[0], scalars[1], scalars[2], scalars[3]};
    tensor.is_applied = scalars[4] != 0.0f;
  }
  RoundingRequest request = args.rounding;
  request.results = FUSED_ADAM_ROUNDED_RESULTS;
  if (request.results != 0u) {
    tensor.rounding = tensor_rounding(request, step[0], number, is_quantized);
  }
  return tensor;
}

// ---- A run: consecutive elements of a row, which one thread updates ----

struct Run {
  uint element;  // the first, by its row-major index modulo 2^32
  uint count;    // 0 beyond the end of a row
  bool uses_vectors;
  bool has_scales;  // the first of its block
};

template <uint N>
inline Run run_at(uint column, uint columns, bool vectors, uint element) {
  uint count = column < columns ? min(N, columns - column) : 0u;
  return {element, count, vectors && count == N, count > 0u && column % kBlockElements == 0u};
}

// The elements of a run of N as they are stored, zeros beyond `count`. A step that is not applied stores what it
// loaded.
template <typename P, typename S, uint N>
struct StoredRun {
  typename Format<P>::parameter parameter[N];
  typename Format<P>::correction correction[N];
  typename Format<S>::m m[N / Format<S>::values_per_item];
  typename Format<S>::v v[N / Format<S>::values_per_item];
};

// The items of m and v that hold a run; the last may be half used.
template <typename S>
inline uint items_of(Run run) {
  constexpr uint neighbours = Format<S>::values_per_item;
  return (run.count + neighbours - 1) / neighbours;
}

// The run's first element is where the pointers point.
template <uint N, typename P, typename G, typename S>
inline StoredRun<P, S, N> load_run(TensorPointers<P, G, S> t, Run run) {
  StoredRun<P, S, N> stored = {};
  constexpr uint items = N / Format<S>::values_per_item;
  if (run.uses_vectors) {
    load_vectors<N>(t.parameter, stored.parameter);
    load_vectors<items>(t.m, stored.m);
    load_vectors<items>(t.v, stored.v);
    if (Format<P>::has_correction) {
      load_vectors<N>(t.auxiliary.correction, stored.correction);
    }
  } else {
    load_elements<N>(t.parameter, run.count, stored.parameter);
    load_elements<items>(t.m, items_of<S>(run), stored.m);
    load_elements<items>(t.v, items_of<S>(run), stored.v);
    if (Format<P>::has_correction) {
      load_elements<N>(t.auxiliary.correction, run.count, stored.correction);
    }
  }
  return stored;
}

template <uint N, typename P, typename G, typename S>
inline void store_run(TensorPointers<P, G, S> t, Run run, thread StoredRun<P, S, N>& stored) {
  constexpr uint items = N / Format<S>::values_per_item;
  if (run.uses_vectors) {
    store_vectors<N>(t.new_parameter, stored.parameter);
    store_vectors<items>(t.new_m, stored.m);
    store_vectors<items>(t.new_v, stored.v);
    if (Format<P>::has_correction) {
      store_vectors<N>(t.auxiliary.new_correction, stored.correction);
    }
  } else {
    store_elements<N>(t.new_parameter, run.count, stored.parameter);
    store_elements<items>(t.new_m, items_of<S>(run), stored.m);
    store_elements<items>(t.new_v, items_of<S>(run), stored.v);
    if (Format<P>::has_correction) {
      store_elements<N>(t.auxiliary.new_correction, run.count, stored.correction);
    }
  }
}

// ---- The update of a run in registers ----

// Rounds a result to how it is stored.
template <typename T>
inline void encode(float x, Rounding rounding, thread T& stored) {
  stored = rounding.is_stochastic ? as_type<T>(ushort(store_bfloat16(x, rounding))) : T(x);
}
inline void encode(float x, Rounding rounding, thread half& stored) {
  stored = rounding.is_stochastic ? as_type<half>(ushort(store_float16(x, rounding))) : half(x);
}
inline void encode(float x, Rounding rounding, thread float& stored) {
  stored = x;
}

template <typename P, typename S, uint N>
inline float decode_parameter(const thread StoredRun<P, S, N>& run, uint k) {
  return float(run.parameter[k]);
}
template <typename S, uint N>
inline float decode_parameter(const thread StoredRun<BfloatCorrection<short>, S, N>& run, uint k) {
  return join(run.parameter[k], run.correction[k]);
}
template <typename S, uint N>
inline float decode_parameter(const thread StoredRun<BfloatCorrection<int8_t>, S, N>& run, uint k) {
  return join_24(run.parameter[k], run.correction[k]);
}

template <typename P, typename S, uint N>
inline void encode_parameter(float x, Rounding rounding, thread StoredRun<P, S, N>& run, uint k) {
  encode(x, rounding, run.parameter[k]);
}
template <typename S, uint N>
inline void encode_parameter(
    float x, Rounding rounding, thread StoredRun<BfloatCorrection<short>, S, N>& run, uint k) {
  SplitFloat parts = split(x);
  run.parameter[k] = ushort(parts.bfloat16);
  run.correction[k] = as_type<short>(ushort(parts.correction));
}
template <typename S, uint N>
inline void encode_parameter(
    float x, Rounding rounding, thread StoredRun<BfloatCorrection<int8_t>, S, N>& run, uint k) {
  SplitFloat parts = split_24(x, rounding);
  run.parameter[k] = ushort(parts.bfloat16);
  run.correction[k] = as_type<int8_t>(uint8_t(parts.correction));
}

template <typename P, typename S, uint N>
inline void update_stored(
    thread StoredRun<P, S, N>& run, const thread float* gradient, Run at, TensorStep step, threadgroup uint*) {
  UNROLLED
  for (uint k = 0; k < N; ++k) {
    AdamState<float> old = {decode_parameter(run, k), float(run.m[k]), float(run.v[k])};
    AdamState<float> next = adam_rule(old, gradient[k], step.scalars, step.constants);
    ElementRounding rounding = element_rounding(step.rounding, at.element + k);
    encode_parameter(next.parameter, rounding.parameter, run, k);
    encode(next.m, rounding.m, run.m[k]);
    encode(next.v, rounding.v, run.v[k]);
  }
}

// The threads of a block share its scales by shuffles, in which all must take part: those beyond the end of a row with
// zeros, so none of them may leave early. Only the first reads and writes the scales, m's in the lower and v's in the
// upper half of a word: another's read could come after the write.
template <uint threads>
inline uint any_in_block(uint x) {
  UNROLLED
  for (uint apart = 1; apart < threads; apart *= 2) {
    x |= simd_shuffle_xor(x, apart);
  }
  return x;
}
template <uint threads>
inline uint largest_in_block(uint x) {
  UNROLLED
  for (uint apart = 1; apart < threads; apart *= 2) {
    x = max(x, simd_shuffle_xor(x, apart));
  }
  return x;
}

// Scales go through threadgroup memory, since the few blocks of a simdgroup would load and store a whole line.
template <typename P, typename G, typename S>
inline void load_scales(TensorPointers<P, G, S> t, int64_t block, threadgroup uint* scales) {
  *scales = uint(t.auxiliary.m_scale[block]) | uint(t.auxiliary.v_scale[block]) << 16;
}
template <typename P, typename G, typename S>
inline void store_scales(TensorPointers<P, G, S> t, int64_t block, const threadgroup uint* scales) {
  t.auxiliary.new_m_scale[block] = ushort(*scales);
  t.auxiliary.new_v_scale[block] = ushort(*scales >> 16);
}

// Values of quantized state, by the number of their bits; in 4 bits, value k is in the half k % 2 of byte k / 2.
typedef QuantizedState<8> In8Bits;
typedef QuantizedState<4> In4Bits;
inline float load_m_of(In8Bits, const thread int8_t* m, uint k, float scale) { return load_int8(m[k], scale); }
inline float load_v_of(In8Bits, const thread uint8_t* v, uint k, float scale) { return load_uint8(v[k], scale); }
inline BlockScale m_scale_of(In8Bits, uint largest) { return scale_of_m8(largest); }
inline BlockScale v_scale_of(In8Bits, uint largest) { return scale_of_v8(largest); }
inline void store_m_of(In8Bits, float x, float inverse, Rounding rounding, thread int8_t* m, uint k) {
  m[k] = int8_t(store_int8(x, inverse, rounding));
}
inline void store_v_of(In8Bits, float x, float inverse, Rounding rounding, thread uint8_t* v, uint k) {
  v[k] = uint8_t(store_uint8(x, inverse, rounding));
}

inline int half_of(const thread uint8_t* packed, uint k) { return packed[k / 2] >> (4 * (k % 2)) & 15; }
inline void set_half(thread uint8_t* packed, uint k, int q) {
  uint before = k % 2 == 0 ? 0u : uint(packed[k / 2]);
  packed[k / 2] = uint8_t(before | uint(q) << (4 * (k % 2)));
}
inline float load_m_of(In4Bits, const thread uint8_t* m, uint k, float scale) { return load_int4(half_of(m, k), scale); }
inline float load_v_of(In4Bits, const thread uint8_t* v, uint k, float scale) { return load_uint4(half_of(v, k), scale); }
inline BlockScale m_scale_of(In4Bits, uint largest) { return scale_of_m4(largest); }
inline BlockScale v_scale_of(In4Bits, uint largest) { return scale_of_v4(largest); }
inline void store_m_of(In4Bits, float x, float inverse, Rounding rounding, thread uint8_t* m, uint k) {
  set_half(m, k, store_int4(x, inverse, rounding));
}
inline void store_v_of(In4Bits, float x, float inverse, Rounding rounding, thread uint8_t* v, uint k) {
  set_half(v, k, store_uint4(x, inverse, rounding));
}

template <typename P, uint N, uint bits>
inline void update_stored(
    thread StoredRun<P, QuantizedState<bits>, N>& run,
    const thread float* gradient,
    Run at,
    TensorStep step,
    threadgroup uint* scales) {
  constexpr uint threads = kBlockElements / N;
  QuantizedState<bits> format = {};
  uint old_scales = any_in_block<threads>(at.has_scales ? *scales : 0u);
  float old_m_scale = load_bfloat16(ushort(old_scales));
  float old_v_scale = load_bfloat16(ushort(old_scales >> 16));
  float m[N], v[N];
  uint largest_m = 0u;
  uint largest_v = 0u;
  UNROLLED
  for (uint k = 0; k < N; ++k) {
    AdamState<float> old = {
        decode_parameter(run, k),
        load_m_of(format, run.m, k, old_m_scale),
        load_v_of(format, run.v, k, old_v_scale)};
    AdamState<float> next = adam_rule(old, gradient[k], step.scalars, step.constants);
    encode_parameter(
        next.parameter, element_rounding(step.rounding, at.element + k).parameter, run, k);
    // Zeros beyond the end of a row, where a byte may have its second half.
    m[k] = k < at.count ? next.m : 0.0f;
    v[k] = k < at.count ? next.v : 0.0f;
    largest_m = max(largest_m, block_magnitude(m[k]));
    largest_v = max(largest_v, block_magnitude(v[k]));
  }
  BlockScale m_scale = m_scale_of(format, largest_in_block<threads>(largest_m));
  BlockScale v_scale = v_scale_of(format, largest_in_block<threads>(largest_v));
  UNROLLED
  for (uint k = 0; k < N; ++k) {
    ElementRounding rounding = element_rounding(step.rounding, at.element + k);
    store_m_of(format, m[k], m_scale.inverse, rounding.m, run.m, k);
    store_v_of(format, v[k], v_scale.inverse, rounding.v, run.v, k);
  }
  if (at.has_scales) {
    *scales = m_scale.stored | v_scale.stored << 16;
  }
}

// Where a thread's block has its scales, in a kernel whose blocks follow each other in the grid.
struct BlockPlace {
  threadgroup uint* scales;  // of the threadgroup
  uint thread_in_group;
  uint block;   // the thread's block if threads were blocks: that of the threadgroup's first thread, and its own number
  uint blocks;  // of the grid
};

template <typename P, typename G, typename S>
inline BlockPlace block_place(threadgroup uint* scales, uint thread_in_grid, uint thread_in_group, uint threads) {
  constexpr uint each = RunLength<P, G, S>::block_threads;
  return {scales, thread_in_group, (thread_in_grid - thread_in_group) / each + thread_in_group, threads / each};
}

// Updates a run that is loaded; `stored` is then what is to be stored.
template <uint N, typename P, typename G, typename S>
inline void update_loaded(
    TensorPointers<P, G, S> t,
    const thread float* gradient,
    Run run,
    thread StoredRun<P, S, N>& stored,
    TensorStep step,
    BlockPlace place) {
  constexpr uint block_threads = kBlockElements / N;
  bool moves_scales =
      Format<S>::is_quantized && place.thread_in_group < kThreads / block_threads && place.block < place.blocks;
  if (moves_scales) {
    load_scales(t, place.block, place.scales + place.thread_in_group);
  }
  if (Format<S>::is_quantized) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (step.is_applied) {
    update_stored(stored, gradient, run, step, place.scales + place.thread_in_group / block_threads);
  }
  if (Format<S>::is_quantized) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
  }
  if (moves_scales) {
    store_scales(t, place.block, place.scales + place.thread_in_group);
  }
}

template <uint N, typename P, typename G, typename S>
inline void update_run(
    TensorPointers<P, G, S> t,
    const thread float* gradient,
    Run run,
    TensorStep step,
    BlockPlace place) {
  StoredRun<P, S, N> stored = load_run<N>(t, run);
  update_loaded(t, gradient, run, stored, step, place);
  store_run(t, run, stored);
}

// ---- Runs of quantized state that no vector fits ----

// Where a simdgroup exchanges elements: neighbouring threads load and store neighbouring elements, which are another
// thread's to update. An element's load and store are still one thread's.
template <uint N, typename Index>
struct Spread {
  typedef typename Unsigned<kRunBytes / N>::type Item;
  // A word apart, so that what a simdgroup reads at once is in different banks.
  enum { pitch = N + 4 / sizeof(Item), items_of_group = kThreads * pitch };
  threadgroup Item* items;    // of the simdgroup's runs
  threadgroup Index* starts;  // of its threads, in the array that is exchanged
  threadgroup uint* counts;
  uint lane;
  uint lanes;  // as many as the simdgroup has
};

template <uint N, typename Index>
inline Spread<N, Index> spread_of(
    threadgroup typename Spread<N, Index>::Item* items,
    threadgroup Index* starts,
    threadgroup uint* counts,
    uint thread_in_group,
    uint threads_left) {
  uint lane = thread_in_group % kLanes;
  uint first = thread_in_group - lane;
  uint lanes = min(uint(kLanes), threads_left + lane);
  return {items + first * Spread<N, Index>::pitch, starts + first, counts + first, lane, lanes};
}

// The k-th of a simdgroup's elements that this thread moves.
template <uint N, typename Index>
inline uint exchanged_place(Spread<N, Index> spread, uint k) { return k * spread.lanes + spread.lane; }

// Of M elements at most from `start` on, in each thread.
template <uint M, uint N, typename Index, typename T>
inline void load_spread(
    Spread<N, Index> spread, const device T* from, Index start, Index stride, uint count, thread T* values) {
  typedef typename Unsigned<sizeof(T)>::type Bits;
  constexpr uint pitch = Spread<N, Index>::pitch;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  spread.starts[spread.lane] = start;
  spread.counts[spread.lane] = count;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  UNROLLED
  for (uint k = 0; k < M; ++k) {
    uint place = exchanged_place(spread, k);
    uint owner = place / M;
    Index i = Index(place % M);
    if (place % M < spread.counts[owner]) {
      spread.items[owner * pitch + place % M] = as_type<Bits>(from[spread.starts[owner] + i * stride]);
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  UNROLLED
  for (uint k = 0; k < M; ++k) {
    if (k < count) {
      values[k] = as_type<T>(Bits(spread.items[spread.lane * pitch + k]));
    }
  }
}

template <uint M, uint N, typename Index, typename T>
inline void store_spread(Spread<N, Index> spread, device T* to, Index start, uint count, const thread T* values) {
  typedef typename Unsigned<sizeof(T)>::type Bits;
  constexpr uint pitch = Spread<N, Index>::pitch;
  simdgroup_barrier(mem_flags::mem_threadgroup);
  spread.starts[spread.lane] = start;
  spread.counts[spread.lane] = count;
  UNROLLED
  for (uint k = 0; k < M; ++k) {
    if (k < count) {
      spread.items[spread.lane * pitch + k] = as_type<Bits>(values[k]);
    }
  }
  simdgroup_barrier(mem_flags::mem_threadgroup);
  UNROLLED
  for (uint k = 0; k < M; ++k) {
    uint place = exchanged_place(spread, k);
    uint owner = place / M;
    if (place % M < spread.counts[owner]) {
      to[spread.starts[owner] + Index(place % M)] = as_type<T>(Bits(spread.items[owner * pitch + place % M]));
    }
  }
}

// The run at this element, and at this item of m and v; the parameter is elsewhere.
template <uint N, typename P, typename G, typename S, typename Index>
inline StoredRun<P, S, N> load_spread_run(
    Spread<N, Index> spread,
    TensorPointers<P, G, S> t,
    Index parameter_at,
    Index parameter_stride,
    Index element,
    Index item,
    Run run) {
  StoredRun<P, S, N> stored = {};
  constexpr uint items = N / Format<S>::values_per_item;
  load_spread<N>(spread, t.parameter, parameter_at, parameter_stride, run.count, stored.parameter);
  load_spread<items>(spread, t.m, item, Index(1), items_of<S>(run), stored.m);
  load_spread<items>(spread, t.v, item, Index(1), items_of<S>(run), stored.v);
  if (Format<P>::has_correction) {
    load_spread<N>(spread, t.auxiliary.correction, element, Index(1), run.count, stored.correction);
  }
  return stored;
}

template <uint N, typename P, typename G, typename S, typename Index>
inline void store_spread_run(
    Spread<N, Index> spread,
    TensorPointers<P, G, S> t,
    Index element,
    Index item,
    Run run,
    thread StoredRun<P, S, N>& stored) {
  constexpr uint items = N / Format<S>::values_per_item;
  store_spread<N>(spread, t.new_parameter, element, run.count, stored.parameter);
  store_spread<items>(spread, t.new_m, item, items_of<S>(run), stored.m);
  store_spread<items>(spread, t.new_v, item, items_of<S>(run), stored.v);
  if (Format<P>::has_correction) {
    store_spread<N>(spread, t.auxiliary.new_correction, element, run.count, stored.correction);
  }
}

// ---- Kernels ----

// Updates one element; of quantized state, never called.
template <typename P, typename G, typename S>
inline void update_element(TensorPointers<P, G, S> t, float gradient, uint element, TensorStep step) {
  constexpr uint length = Format<S>::is_quantized ? RunLength<P, G, S>::value : 1;
  float values[length] = {gradient};
  update_run<length>(t, values, Run{element, 1u, false, false}, step, BlockPlace{});
}

// Updates the run of one thread of a row-major tensor. Elements that go one by one are spread, so that neighbouring
// threads take neighbouring ones. Quantized state goes in vectors; where none fits, the host takes adam_general.
template <typename P, typename G, typename S>
inline void update_row_major(
    TensorPointers<P, G, S> t,
    uint thread_in_tensor,
    uint first_element,
    uint row_length,
    uint vectors,
    TensorStep step,
    BlockPlace place) {
  constexpr uint length = RunLength<P, G, S>::value;
  uint row = 0u;
  uint thread_in_row = thread_in_tensor;
  if (Format<S>::is_quantized) {
    uint row_threads = (row_length + kBlockElements - 1) / kBlockElements * RunLength<P, G, S>::block_threads;
    row = thread_in_tensor / row_threads;
    thread_in_row -= row * row_threads;
  }
  uint column = thread_in_row * length;
  uint element = row * row_length + column;
  Run run = run_at<length>(column, row_length, (vectors & kStateVectors) != 0u, first_element + element);
  if (!Format<S>::is_quantized && !run.uses_vectors) {
    // A simdgroup's elements, of which each of its threads takes every so-manieth; but the last run of a tensor whose
    // others go in vectors.
    uint lane = thread_in_tensor % kLanes;
    uint threads = (row_length + length - 1u) / length;
    uint apart = min(uint(kLanes), threads + lane - thread_in_tensor);
    if ((vectors & kStateVectors) != 0u) {
      lane = 0u;
      apart = 1u;
    }
    element -= lane * (length - 1u);
    for (uint k = 0; k < length; ++k, element += apart) {
      if (element < row_length) {
        TensorPointers<P, G, S> at = moved_to(t, element, element);
        update_element(at, float(*at.gradient), first_element + element, step);
      }
    }
    return;
  }
  t = moved_to(t, element, item_of<S>(element, row, column, row_length));
  float gradient[length] = {};
  if (Format<S>::is_quantized) {
    // Threads beyond the end of a row only take part in the shuffles.
    StoredRun<P, S, length> stored = {};
    run.uses_vectors = true;
    if (run.count > 0u) {
      load_vectors<length>(t.gradient, gradient);
      stored = load_run<length>(t, run);
    }
    update_loaded(t, gradient, run, stored, step, place);
    if (run.count > 0u) {
      store_run(t, run, stored);
    }
    return;
  }
  if (run.count == length && (vectors & kGradientVectors) != 0u) {
    load_vectors<length>(t.gradient, gradient);
  } else {
    load_elements<length>(t.gradient, length, gradient);
  }
  update_run<length>(t, gradient, run, step, place);
}

// One row-major tensor, or a piece of one: the host cuts what exceeds 32-bit indices.
template <typename P, typename G, typename S>
[[kernel, max_total_threads_per_threadgroup(kThreads)]] void adam_linear(
    constant LinearArgs& args [[buffer(kArgs)]],
    const device float* scalars [[buffer(kScalars)]],
    const device typename Format<P>::parameter* parameter [[buffer(kParameter)]],
    const device G* gradient [[buffer(kGradient)]],
    const device typename Format<S>::m* m [[buffer(kM)]],
    const device typename Format<S>::v* v [[buffer(kV)]],
    device typename Format<P>::parameter* new_parameter [[buffer(kNewParameter)]],
    device typename Format<S>::m* new_m [[buffer(kNewM)]],
    device typename Format<S>::v* new_v [[buffer(kNewV)]],
    const device typename Format<P>::correction* correction [[buffer(kCorrection)]],
    const device ushort* m_scale [[buffer(kMScale)]],
    const device ushort* v_scale [[buffer(kVScale)]],
    device typename Format<P>::correction* new_correction [[buffer(kNewCorrection)]],
    device ushort* new_m_scale [[buffer(kNewMScale)]],
    device ushort* new_v_scale [[buffer(kNewVScale)]],
    const device uint* step [[buffer(kStep)]],
    uint thread_in_grid [[thread_position_in_grid]],
    uint thread_in_group [[thread_position_in_threadgroup]],
    uint threads [[threads_per_grid]]) {
  threadgroup uint scales[Format<S>::is_quantized ? kThreads / RunLength<P, G, S>::block_threads : 1];
  AuxiliaryPointers<typename Format<P>::correction> auxiliary = {
      correction, m_scale, v_scale, new_correction, new_m_scale, new_v_scale};
  TensorPointers<P, G, S> tensor = {
      parameter, gradient, m, v, new_parameter, new_m, new_v, auxiliary};
  update_row_major(
      tensor,
      thread_in_grid,
      args.first_element,
      args.row_length,
      args.vectors,
      load_step(args.step, args.number, scalars, step, Format<S>::is_quantized),
      block_place<P, G, S>(scales, thread_in_grid, thread_in_group, threads));
}

// Several small row-major tensors without auxiliary arrays in one dispatch: the grid holds the threads of one after the
// other.
template <typename P, typename G, typename S>
[[kernel, max_total_threads_per_threadgroup(kThreads)]] void adam_group(
    constant GroupArgs& args [[buffer(kArgs)]],
    const device float* scalars [[buffer(kScalars)]],
    const device P* parameter_0 [[buffer(2)]],
    const device G* gradient_0 [[buffer(3)]],
    const device S* m_0 [[buffer(4)]],
    const device S* v_0 [[buffer(5)]],
    device P* new_parameter_0 [[buffer(6)]],
    device S* new_m_0 [[buffer(7)]],
    device S* new_v_0 [[buffer(8)]],
    const device P* parameter_1 [[buffer(9)]],
    const device G* gradient_1 [[buffer(10)]],
    const device S* m_1 [[buffer(11)]],
    const device S* v_1 [[buffer(12)]],
    device P* new_parameter_1 [[buffer(13)]],
    device S* new_m_1 [[buffer(14)]],
    device S* new_v_1 [[buffer(15)]],
    const device P* parameter_2 [[buffer(16)]],
    const device G* gradient_2 [[buffer(17)]],
    const device S* m_2 [[buffer(18)]],
    const device S* v_2 [[buffer(19)]],
    device P* new_parameter_2 [[buffer(20)]],
    device S* new_m_2 [[buffer(21)]],
    device S* new_v_2 [[buffer(22)]],
    const device P* parameter_3 [[buffer(23)]],
    const device G* gradient_3 [[buffer(24)]],
    const device S* m_3 [[buffer(25)]],
    const device S* v_3 [[buffer(26)]],
    device P* new_parameter_3 [[buffer(27)]],
    device S* new_m_3 [[buffer(28)]],
    device S* new_v_3 [[buffer(29)]],
    const device uint* step [[buffer(kStep)]],
    uint thread_in_grid [[thread_position_in_grid]]) {
  AuxiliaryPointers<short> none = {};
  TensorPointers<P, G, S> tensor = {
      parameter_0, gradient_0, m_0, v_0, new_parameter_0, new_m_0, new_v_0, none};
  uint which = 0;
  if (thread_in_grid >= args.thread_ends[2]) {
    which = 3;
    tensor = {parameter_3, gradient_3, m_3, v_3, new_parameter_3, new_m_3, new_v_3, none};
  } else if (thread_in_grid >= args.thread_ends[1]) {
    which = 2;
    tensor = {parameter_2, gradient_2, m_2, v_2, new_parameter_2, new_m_2, new_v_2, none};
  } else if (thread_in_grid >= args.thread_ends[0]) {
    which = 1;
    tensor = {parameter_1, gradient_1, m_1, v_1, new_parameter_1, new_m_1, new_v_1, none};
  }
  uint first_thread = which == 0 ? 0 : args.thread_ends[which - 1];
  update_row_major(
      tensor,
      thread_in_grid - first_thread,
      0u,
      args.sizes[which],
      args.vectors[which],
      load_step(args.step, args.numbers[which], scalars, step, false),
      BlockPlace{});
}

// A tile of a matrix: columns in a row of the state, rows in a column of the gradient.
template <typename P, typename G, typename S>
struct Tile {
  enum {
    length = RunLength<P, G, S>::value,
    of_parameter = sizeof(typename Format<P>::parameter),
    of_correction = Format<P>::has_correction ? sizeof(typename Format<P>::correction) : of_parameter,
    of_state = sizeof(typename Format<S>::m),
    narrower = of_parameter < of_correction ? of_parameter : of_correction,
    columns = kLineBytes / (narrower < of_state ? narrower : of_state),
    rows = kLineBytes / sizeof(G),
    // Threads that walk a row of the state, or a column of the gradient.
    row_threads = columns / length,
    column_threads = rows / length,
    runs = rows * columns / length / kThreads,  // of a thread
    at_once = runs < 2 ? runs : 2,              // in registers
    blocks = kStripTiles * columns / kBlockElements,  // in a row of a strip of tiles
    // In threadgroup memory, columns are a word more than a line apart, and runs of columns as much further as makes
    // the words that a simdgroup reads at once, of so many rows, lie in different banks.
    word = 4 / sizeof(G),
    row_words = kLanes / row_threads > word ? kLanes / row_threads / word : 1,
    pad = length / row_words % 2 == 0 ? row_words * word : 0,
    size = columns * (rows + word) + row_threads * pad,
  };
  static uint at(uint column, uint row) { return column * (rows + word) + column / length * pad + row; }
};

// The tile at `from`, of which the matrix has so many columns and rows and perhaps more.
template <typename T, typename G>
inline void load_tile(
    threadgroup G* tile,
    const device G* from,
    int64_t column_stride,
    uint columns,
    uint rows,
    uint vectors,
    uint thread_index) {
  if ((vectors & kGradientVectors) != 0u) {
    uint start = thread_index % T::column_threads * T::length;
    UNROLLED
    for (uint j = 0; j < T::runs; ++j) {
      uint k = thread_index / T::column_threads + j * (kThreads / T::column_threads);
      if (k < columns && start < rows) {
        G values[T::length];
        load_vectors<T::length>(from + (k * column_stride + start), values);
        UNROLLED
        for (uint i = 0; i < T::length; ++i) {
          tile[T::at(k, start + i)] = values[i];
        }
      }
    }
    return;
  }
  for (uint i = thread_index; i < T::rows * T::columns; i += kThreads) {
    uint k = i / T::rows;
    uint row = i % T::rows;
    if (k < columns && row < rows) {
      tile[T::at(k, row)] = from[k * column_stride + row];
    }
  }
}

// The gradients of a run, zeros beyond `count`.
template <typename T, typename G>
inline void load_from_tile(const threadgroup G* tile, uint column, uint row, uint count, thread float* values) {
  UNROLLED
  for (uint i = 0; i < T::length; ++i) {
    values[i] = i < count ? float(tile[T::at(column + i, row)]) : 0.0f;
  }
}

template <typename S, typename T>
inline uint scale_in_strip(uint row, uint column) {
  return Format<S>::is_quantized ? row * T::blocks + column / kBlockElements : 0u;
}

// The tensor's block whose scales are a strip's i-th; -1 beyond the edges.
template <typename T>
inline int64_t block_of_strip(
    constant TiledArgs& args, uint i, uint first_row, uint strip_column, int64_t first_of_rows, int64_t rows_apart) {
  uint row = first_row + i / T::blocks;
  int64_t first_block = strip_column / kBlockElements;
  int64_t block = first_block + i % T::blocks;
  int64_t row_blocks = (args.columns + kBlockElements - 1) / kBlockElements;
  bool is_inside =
      row < args.rows && i % T::blocks < args.strip * (T::columns / kBlockElements) && block < row_blocks;
  return is_inside ? (first_of_rows + row * rows_apart) * row_blocks + block : -1;
}

// A matrix (or a batch of them, along the grid's z) whose gradient is column-major: tiles of it go through threadgroup
// memory, so that gradient and state are both walked along their unit strides, a run a thread. A threadgroup takes a
// strip of args.strip tiles of a row, one after the other.
template <typename P, typename G, typename S>
[[kernel, max_total_threads_per_threadgroup(kThreads)]] void adam_tiled(
    constant TiledArgs& args [[buffer(kArgs)]],
    const device float* scalars [[buffer(kScalars)]],
    const device typename Format<P>::parameter* parameter [[buffer(kParameter)]],
    const device G* gradient [[buffer(kGradient)]],
    const device typename Format<S>::m* m [[buffer(kM)]],
    const device typename Format<S>::v* v [[buffer(kV)]],
    device typename Format<P>::parameter* new_parameter [[buffer(kNewParameter)]],
    device typename Format<S>::m* new_m [[buffer(kNewM)]],
    device typename Format<S>::v* new_v [[buffer(kNewV)]],
    constant const int64_t* shape [[buffer(kShape)]],
    constant const int64_t* parameter_strides [[buffer(kParameterStrides)]],
    constant const int64_t* gradient_strides [[buffer(kGradientStrides)]],
    const device typename Format<P>::correction* correction [[buffer(kCorrection)]],
    const device ushort* m_scale [[buffer(kMScale)]],
    const device ushort* v_scale [[buffer(kVScale)]],
    device typename Format<P>::correction* new_correction [[buffer(kNewCorrection)]],
    device ushort* new_m_scale [[buffer(kNewMScale)]],
    device ushort* new_v_scale [[buffer(kNewVScale)]],
    const device uint* step [[buffer(kStep)]],
    uint3 tile_in_grid [[threadgroup_position_in_grid]],
    uint3 thread_in_tile [[thread_position_in_threadgroup]]) {
  typedef Tile<P, G, S> T;
  constexpr uint length = T::length;
  threadgroup G tile[T::size];
  threadgroup uint scales[Format<S>::is_quantized ? T::rows * T::blocks : 1];
  // Of quantized state that no vector fits.
  typedef Spread<length, int64_t> Exchange;
  threadgroup typename Exchange::Item items[Format<S>::is_quantized ? Exchange::items_of_group : 1];
  threadgroup int64_t starts[Format<S>::is_quantized ? kThreads : 1];
  threadgroup uint counts[Format<S>::is_quantized ? kThreads : 1];

  // The last two strides are those of the matrix: its rows in the state, its columns in the gradient.
  int64_t row_stride = parameter_strides[args.axes];
  int64_t column_stride = gradient_strides[args.axes];
  int64_t matrix = 0;
  int64_t gradient_matrix = 0;
  // Strides in rows of quantized state follow the parameter's.
  int64_t rows_apart = 0;
  int64_t first_of_rows = 0;
  if (Format<S>::is_quantized) {
    rows_apart = parameter_strides[2 * args.axes + 1];
  }
  uint batch = tile_in_grid.z;
  for (uint axis = args.axes; axis-- > 0;) {
    uint size = uint(shape[axis]);
    int64_t i = batch % size;
    batch /= size;
    matrix += i * parameter_strides[axis];
    gradient_matrix += i * gradient_strides[axis];
    if (Format<S>::is_quantized) {
      first_of_rows += i * parameter_strides[args.axes + 1 + axis];
    }
  }
  uint first_row = ((tile_in_grid.y << args.band) + (tile_in_grid.x & ((1u << args.band) - 1u))) * T::rows;
  uint strip_column = (tile_in_grid.x >> args.band) * (args.strip * T::columns);
  if (first_row >= args.rows) {
    return;  // all of the threadgroup
  }
  uint thread_index = thread_in_tile.x;

  AuxiliaryPointers<typename Format<P>::correction> auxiliary = {
      correction, m_scale, v_scale, new_correction, new_m_scale, new_v_scale};
  TensorPointers<P, G, S> tensor = {
      parameter, gradient, m, v, new_parameter, new_m, new_v, auxiliary};
  TensorStep tensor_step = load_step(args.step, args.number, scalars, step, Format<S>::is_quantized);
  bool in_vectors = (args.vectors & kStateVectors) != 0u;
  Exchange spread = spread_of<length, int64_t>(items, starts, counts, thread_index, kThreads - thread_index);

  // The scales of the strip, which each thread stores where it has loaded them.
  if (Format<S>::is_quantized) {
    for (uint i = thread_index; i < T::rows * T::blocks; i += kThreads) {
      int64_t block = block_of_strip<T>(args, i, first_row, strip_column, first_of_rows, rows_apart);
      if (block >= 0) {
        load_scales(tensor, block, scales + i);
      }
    }
  }

  for (uint first_column = strip_column;
       first_column < min(args.columns, strip_column + args.strip * T::columns);
       first_column += T::columns) {
    constexpr uint lines_apart = kThreads / T::row_threads;
    uint first_line = thread_index / T::row_threads;
    uint of_tile = thread_index % T::row_threads * length;
    uint column = first_column + of_tile;
    const device G* from = gradient + (gradient_matrix + first_column * column_stride + first_row);
    uint columns = args.columns - first_column;  // those left, and rows
    uint rows = args.rows - first_row;
    if (first_column > strip_column) {
      threadgroup_barrier(mem_flags::mem_threadgroup);  // all have read the tile before
    }
    for (uint line = first_line; in_vectors && line < T::rows; line += T::at_once * lines_apart) {
      int64_t element[T::at_once], item[T::at_once];
      Run run[T::at_once];
      StoredRun<P, S, length> stored[T::at_once];
      UNROLLED
      for (uint j = 0; j < T::at_once; ++j) {
        uint row = first_row + line + j * lines_apart;
        element[j] = matrix + row * row_stride + column;
        item[j] = item_of<S>(element[j], first_of_rows + row * rows_apart, column, args.columns);
        run[j] = run_at<length>(column, row < args.rows ? args.columns : 0u, true, uint(element[j]));
        stored[j] = {};
        if (run[j].uses_vectors) {
          stored[j] = load_run<length>(moved_to(tensor, element[j], item[j]), run[j]);
        }
      }
      // After the first loads of the state, so that they do not wait for it.
      if (line == first_line) {
        load_tile<T>(tile, from, column_stride, columns, rows, args.vectors, thread_index);
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
      UNROLLED
      for (uint j = 0; j < T::at_once; ++j) {
        // Of quantized state, threads beyond an edge take part in the shuffles.
        float values[length];
        uint line_of_run = line + j * lines_apart;
        load_from_tile<T>(tile, of_tile, line_of_run, run[j].uses_vectors ? length : 0u, values);
        if (tensor_step.is_applied) {
          uint scale = scale_in_strip<S, T>(line_of_run, column - strip_column);
          update_stored(stored[j], values, run[j], tensor_step, scales + scale);
        }
        if (run[j].uses_vectors) {
          store_run(moved_to(tensor, element[j], item[j]), run[j], stored[j]);
        }
      }
    }
    if (in_vectors) {
      continue;
    }

    load_tile<T>(tile, from, column_stride, columns, rows, args.vectors, thread_index);
    threadgroup_barrier(mem_flags::mem_threadgroup);
    if (Format<S>::is_quantized) {
      for (uint line = first_line; line < T::rows; line += lines_apart) {
        uint row = first_row + line;
        int64_t element = matrix + row * row_stride + column;
        int64_t item = item_of<S>(element, first_of_rows + row * rows_apart, column, args.columns);
        Run run = run_at<length>(column, row < args.rows ? args.columns : 0u, false, uint(element));
        StoredRun<P, S, length> stored =
            load_spread_run(spread, tensor, element, int64_t(1), element, item, run);
        float values[length];
        load_from_tile<T>(tile, of_tile, line, run.count, values);
        if (tensor_step.is_applied) {
          uint scale = scale_in_strip<S, T>(line, column - strip_column);
          update_stored(stored, values, run, tensor_step, scales + scale);
        }
        store_spread_run(spread, tensor, element, item, run, stored);
      }
      continue;
    }
    for (uint i = thread_index; i < T::rows * T::columns; i += kThreads) {
      uint line = i / T::columns;
      uint k = i % T::columns;
      uint row = first_row + line;
      if (row < args.rows && first_column + k < args.columns) {
        int64_t element = matrix + row * row_stride + (first_column + k);
        update_element(
            moved_to(tensor, element, element),
            float(tile[T::at(k, line)]),
            uint(element),
            tensor_step);
      }
    }
  }

  if (Format<S>::is_quantized) {
    threadgroup_barrier(mem_flags::mem_threadgroup);
    for (uint i = thread_index; i < T::rows * T::blocks; i += kThreads) {
      int64_t block = block_of_strip<T>(args, i, first_row, strip_column, first_of_rows, rows_apart);
      if (block >= 0) {
        store_scales(tensor, block, scales + i);
      }
    }
  }
}

// Where an element of adam_general is in each array.
struct Places {
  int64_t parameter;
  int64_t gradient;
  int64_t m;
  int64_t v;
};

// The grid's place is that of an element but for the column. Index is 64 bits wide where 32 are too few.
template <typename Index>
inline Places places_of(
    uint3 place,
    uint column,
    uint axes,
    constant const int64_t* shape,
    constant const int64_t* parameter_strides,
    constant const int64_t* gradient_strides,
    constant const int64_t* m_strides,
    constant const int64_t* v_strides) {
  Index parameter_at = 0;
  Index gradient_at = 0;
  Index m_at = 0;
  Index v_at = 0;
  uint last = axes - 1;
  uint outer = place.z;
  for (uint axis = axes; axis-- > 0;) {
    Index i = Index(axis == last ? column : place.y);
    if (axis + 2 < axes) {
      uint size = uint(shape[axis]);
      i = Index(outer % size);
      outer /= size;
    }
    parameter_at += i * Index(parameter_strides[axis]);
    gradient_at += i * Index(gradient_strides[axis]);
    m_at += i * Index(m_strides[axis]);
    v_at += i * Index(v_strides[axis]);
  }
  return {parameter_at, gradient_at, m_at, v_at};
}

// Any strides of any array but quantized state and auxiliary arrays; the outputs are row-major. The grid's x is the
// last axis, y the one before, z all others; where the state is quantized, all are in x, as neighbours in a simdgroup
// are defined by that alone.
template <typename P, typename G, typename S>
[[kernel, max_total_threads_per_threadgroup(kThreads)]] void adam_general(
    constant GeneralArgs& args [[buffer(kArgs)]],
    const device float* scalars [[buffer(kScalars)]],
    const device typename Format<P>::parameter* parameter [[buffer(kParameter)]],
    const device G* gradient [[buffer(kGradient)]],
    const device typename Format<S>::m* m [[buffer(kM)]],
    const device typename Format<S>::v* v [[buffer(kV)]],
    device typename Format<P>::parameter* new_parameter [[buffer(kNewParameter)]],
    device typename Format<S>::m* new_m [[buffer(kNewM)]],
    device typename Format<S>::v* new_v [[buffer(kNewV)]],
    constant const int64_t* shape [[buffer(kShape)]],
    constant const int64_t* parameter_strides [[buffer(kParameterStrides)]],
    constant const int64_t* gradient_strides [[buffer(kGradientStrides)]],
    constant const int64_t* m_strides [[buffer(kMStrides)]],
    constant const int64_t* v_strides [[buffer(kVStrides)]],
    const device typename Format<P>::correction* correction [[buffer(kCorrection)]],
    const device ushort* m_scale [[buffer(kMScale)]],
    const device ushort* v_scale [[buffer(kVScale)]],
    device typename Format<P>::correction* new_correction [[buffer(kNewCorrection)]],
    device ushort* new_m_scale [[buffer(kNewMScale)]],
    device ushort* new_v_scale [[buffer(kNewVScale)]],
    const device uint* step [[buffer(kStep)]],
    uint3 thread_in_grid [[thread_position_in_grid]],
    uint3 thread_in_group [[thread_position_in_threadgroup]],
    uint3 grid [[threads_per_grid]]) {
  constexpr uint length = Format<S>::is_quantized ? RunLength<P, G, S>::value : 1;
  threadgroup uint scales[Format<S>::is_quantized ? kThreads / RunLength<P, G, S>::block_threads : 1];
  typedef Spread<length, int64_t> Exchange;
  threadgroup typename Exchange::Item items[Format<S>::is_quantized ? Exchange::items_of_group : 1];
  threadgroup int64_t starts[Format<S>::is_quantized ? kThreads : 1];
  threadgroup uint counts[Format<S>::is_quantized ? kThreads : 1];
  uint last = args.axes - 1;
  uint columns = uint(shape[last]);
  uint3 place = thread_in_grid;
  uint rows = grid.y;
  if (Format<S>::is_quantized) {
    uint row_threads = (columns + kBlockElements - 1) / kBlockElements * RunLength<P, G, S>::block_threads;
    rows = uint(shape[last - 1]);
    place.x = thread_in_grid.x % row_threads;
    place.y = thread_in_grid.x / row_threads % rows;
    place.z = thread_in_grid.x / row_threads / rows;
  }
  uint column = place.x * length;
  Places at;
  if (args.wide_indices != 0u) {
    at = places_of<int64_t>(
        place, column, args.axes, shape, parameter_strides, gradient_strides, m_strides, v_strides);
  } else {
    at = places_of<int>(
        place, column, args.axes, shape, parameter_strides, gradient_strides, m_strides, v_strides);
  }
  // A dispatch has fewer elements than 32 bits count.
  int row = int(place.z * rows + place.y);
  int element = row * int(columns) + int(column);
  AuxiliaryPointers<typename Format<P>::correction> auxiliary = {
      correction, m_scale, v_scale, new_correction, new_m_scale, new_v_scale};
  TensorPointers<P, G, S> tensor = {
      parameter, gradient, m, v, new_parameter, new_m, new_v, auxiliary};
  TensorStep tensor_step = load_step(args.step, args.number, scalars, step, Format<S>::is_quantized);
  Run run = run_at<length>(column, columns, (args.vectors & kStateVectors) != 0u, args.first_element + uint(element));
  int item = item_of<S>(element, row, column, columns);
  TensorPointers<P, G, S> here = moved_to(tensor, element, item);
  here.parameter = parameter + at.parameter;
  if (!Format<S>::is_quantized) {
    here.m = m + at.m;
    here.v = v + at.v;
    float value[length] = {float(gradient[at.gradient])};
    run.uses_vectors = false;
    update_run<length>(here, value, run, tensor_step, BlockPlace{});
    return;
  }
  Exchange spread =
      spread_of<length, int64_t>(items, starts, counts, thread_in_group.x, grid.x - thread_in_grid.x);
  G loaded[length] = {};
  load_spread<length>(spread, gradient, at.gradient, gradient_strides[last], run.count, loaded);
  float values[length];
  UNROLLED
  for (uint k = 0; k < length; ++k) {
    values[k] = float(loaded[k]);
  }
  StoredRun<P, S, length> stored = {};
  bool in_vectors = (args.vectors & kStateVectors) != 0u;
  if (run.uses_vectors) {
    stored = load_run<length>(here, run);
  } else if (!in_vectors) {
    stored = load_spread_run(
        spread, tensor, at.parameter, parameter_strides[last], int64_t(element), int64_t(item), run);
  }
  update_loaded(
      tensor,
      values,
      run,
      stored,
      tensor_step,
      block_place<P, G, S>(scales, thread_in_grid.x, thread_in_group.x, grid.x));
  if (run.uses_vectors) {
    store_run(here, run, stored);
  } else if (!in_vectors) {
    store_spread_run(spread, tensor, int64_t(element), int64_t(item), run, stored);
  }
}
