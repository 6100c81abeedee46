// The Metal kernels of the fused update: load -> rule -> store, one pass over each buffer. The rule is adam_rule.h.
// Compiled on the user's machine from the string that the build embeds; csrc/metal/adam.cpp adds the instantiations
// for the formats it meets (P: parameter, G: gradient, S: m and v) and chooses kernel, buffers and grid.
//
// An element costs 4 loads and 3 stores, 28 bytes in float32 and 14 in 16 bits, and 8 products, 4 sums, a division and a
// root: far less than a GPU computes while it moves them. docs/metal.md has the bandwidth to expect of each kernel.
#include <metal_stdlib>

#include "adam_args.h"
#include "math/adam_rule.h"
#include "vector_io.h"
#include "math/encodings.h"

using namespace metal;
using namespace fused_adam;

// Formats of more than one array; those of one are named by its type. encodings.h describes them.
struct BfloatRemainder {};  // P
struct Codes {};            // S

// The types of the arrays of values. T without a name is bfloat, which not every GPU has: hence the bits alone.
template <typename T>
struct Format {
  typedef T parameter;
  typedef T m;
  typedef T v;
  enum { has_codes = 0 };
};
template <>
struct Format<BfloatRemainder> {
  typedef ushort parameter;
};
template <>
struct Format<Codes> {
  typedef int8_t m;
  typedef uint8_t v;
  enum { has_codes = 1 };
};

// What formats have beside the values.
struct ExtraPointers {
  const device short* remainder;
  const device ushort* m_scale;
  const device ushort* v_scale;
  device short* new_remainder;
  device ushort* new_m_scale;
  device ushort* new_v_scale;
};

template <typename P, typename G, typename S>
struct TensorPointers {
  const device typename Format<P>::parameter* parameter;
  const device G* gradient;
  const device typename Format<S>::m* m;
  const device typename Format<S>::v* v;
  device typename Format<P>::parameter* new_parameter;
  device typename Format<S>::m* new_m;
  device typename Format<S>::v* new_v;
  ExtraPointers extra;
};

// How the results of a tensor are rounded in one step, and those of one element.
struct TensorRounding {
  uint flags;
  TensorRandom random;
};

struct ElementRounding {
  Rounding parameter;
  Rounding m;
  Rounding v;
};

// What all elements of a tensor share in one step.
struct TensorStep {
  AdamScalars<float> scalars;
  bool is_applied;
  AdamConstants constants;
  TensorRounding rounding;
};

inline AdamScalars<float> load_scalars(const device float* scalars, uint count) {
  if (count == kStepSizeOnly) {
    return {scalars[0], 1.0f, 1.0f, 1.0f};
  }
  return {scalars[0], scalars[1], scalars[2], count == kGuarded ? scalars[3] : 1.0f};
}

// Args are those of any kernel.
template <typename Args>
inline TensorStep tensor_step(
    constant Args& args,
    uint number,
    const device float* scalars,
    const device uint* step,
    bool has_codes) {
  TensorRounding rounding = {args.rounding.flags, {{0u, 0u}, {0u, 0u}, 0u}};
  if (rounding.flags != 0u) {
    rounding.random = tensor_random(
        args.rounding.seed_low, args.rounding.seed_high, step[0], number, has_codes);
  }
  bool is_applied = args.scalar_count != kGuarded || scalars[kGuarded - 1] != 0.0f;
  return {load_scalars(scalars, args.scalar_count), is_applied, args.constants, rounding};
}

inline ElementRounding element_rounding(TensorRounding tensor, uint element) {
  uint of_state = 0u;
  uint of_parameter = 0u;
  if ((tensor.flags & (kRoundM | kRoundV)) != 0u) {
    of_state = random_bits(tensor.random.of_state, element);
  }
  if ((tensor.flags & kRoundParameter) != 0u) {
    of_parameter = more_random_bits(tensor.random.of_parameter, element);
  }
  return {
      {(tensor.flags & kRoundParameter) != 0u, of_parameter & 0xFFFFu},
      {(tensor.flags & kRoundM) != 0u, random_half(of_state, 16u, tensor.random.advance)},
      {(tensor.flags & kRoundV) != 0u, random_half(of_state, 0u, tensor.random.advance)}};
}

// A result as it is stored, or as float32 where storing it takes more than one array.
template <typename T>
inline T stored(float x, Rounding rounding, T) {
  return rounding.is_stochastic ? as_type<T>(ushort(store_bfloat16(x, rounding))) : T(x);
}
inline half stored(float x, Rounding rounding, half) {
  return rounding.is_stochastic ? as_type<half>(ushort(store_float16(x, rounding))) : half(x);
}
inline float stored(float x, Rounding, float) {
  return x;
}
inline float stored(float x, Rounding, BfloatRemainder) {
  return x;
}

// Elements of a run.
template <typename P, typename G, typename S>
struct Run {
  enum { length = sizeof(P) == 4 && sizeof(G) == 4 && sizeof(S) == 4 ? kShortRun : kLongRun };
};

// A parameter, whose value lies at `at`, and what it has beside it at `extra_at`.
template <typename P, typename G, typename S, typename Index>
inline float load_parameter(TensorPointers<P, G, S> t, Index at, Index) {
  return float(t.parameter[at]);
}
template <typename G, typename S, typename Index>
inline float load_parameter(TensorPointers<BfloatRemainder, G, S> t, Index at, Index extra_at) {
  return join(t.parameter[at], t.extra.remainder[extra_at]);
}

template <typename P, typename G, typename S, typename Index>
inline void store_parameter(TensorPointers<P, G, S> t, Index at, P value) {
  t.new_parameter[at] = value;
}
template <typename G, typename S, typename Index>
inline void store_parameter(TensorPointers<BfloatRemainder, G, S> t, Index at, float value) {
  SplitFloat parts = split(value);
  t.new_parameter[at] = ushort(parts.bfloat16);
  t.extra.new_remainder[at] = as_type<short>(ushort(parts.remainder));
}

// A run of parameters.
template <uint N, typename P, typename G, typename S, typename Index>
inline void load_parameters(TensorPointers<P, G, S> t, Index at, thread float* values) {
  load_run<N>(t.parameter + at, values);
}
template <uint N, typename G, typename S, typename Index>
inline void load_parameters(
    TensorPointers<BfloatRemainder, G, S> t, Index at, thread float* values) {
  ushort upper[N];
  short remainder[N];
  load_run<N>(t.parameter + at, upper);
  load_run<N>(t.extra.remainder + at, remainder);
  for (uint k = 0; k < N; ++k) {
    values[k] = join(upper[k], remainder[k]);
  }
}

template <uint N, typename P, typename G, typename S, typename Index>
inline void store_parameters(TensorPointers<P, G, S> t, Index at, const thread float* values) {
  store_run<N>(t.new_parameter + at, values);
}
template <uint N, typename G, typename S, typename Index>
inline void store_parameters(
    TensorPointers<BfloatRemainder, G, S> t, Index at, const thread float* values) {
  ushort upper[N];
  short remainder[N];
  for (uint k = 0; k < N; ++k) {
    SplitFloat parts = split(values[k]);
    upper[k] = ushort(parts.bfloat16);
    remainder[k] = as_type<short>(ushort(parts.remainder));
  }
  store_run<N>(t.new_parameter + at, upper);
  store_run<N>(t.extra.new_remainder + at, remainder);
}

// A step that is not applied: parameter and moments as they were, bit for bit, whatever buffers the results have.
template <typename P, typename G, typename S, typename From, typename To>
inline void keep_parameter(TensorPointers<P, G, S> t, From from, To to) {
  t.new_parameter[to] = t.parameter[from];
}
template <typename G, typename S, typename From, typename To>
inline void keep_parameter(TensorPointers<BfloatRemainder, G, S> t, From from, To to) {
  t.new_parameter[to] = t.parameter[from];
  t.extra.new_remainder[to] = t.extra.remainder[to];
}

template <typename Index, typename P, typename G, typename S>
inline void keep_element(TensorPointers<P, G, S> t, Index at) {
  keep_parameter(t, at, at);
  t.new_m[at] = t.m[at];
  t.new_v[at] = t.v[at];
}

// Updates the element that lies at `at` in all arrays but the gradient, whose element is given, and is the tensor's `element`.
template <typename Rule, typename Index, typename P, typename G, typename S>
inline void update_element(
    TensorPointers<P, G, S> t,
    Index at,
    uint element,
    float gradient,
    TensorStep step) {
  if (!step.is_applied) {
    keep_element(t, at);
    return;
  }
  AdamState<float> old = {load_parameter(t, at, at), float(t.m[at]), float(t.v[at])};
  AdamState<float> next = Rule::step(old, gradient, step.scalars, step.constants);
  ElementRounding how = element_rounding(step.rounding, element);
  S new_m = stored(next.m, how.m, S());
  S new_v = stored(next.v, how.v, S());
  store_parameter(t, at, stored(next.parameter, how.parameter, P()));
  t.new_m[at] = new_m;
  t.new_v[at] = new_v;
}

// The same for a run from `at` on.
template <typename Rule, typename Index, typename P, typename G, typename S>
inline void update_run(
    TensorPointers<P, G, S> t,
    Index at,
    uint element,
    const thread float* gradient,
    TensorStep step) {
  constexpr uint length = Run<P, G, S>::length;
  if (!step.is_applied) {
    for (uint k = 0; k < length; ++k) {
      keep_element(t, at + Index(k));
    }
    return;
  }
  float parameter[length], m[length], v[length];
  load_parameters<length>(t, at, parameter);
  load_run<length>(t.m + at, m);
  load_run<length>(t.v + at, v);
  for (uint k = 0; k < length; ++k) {
    AdamState<float> old = {parameter[k], m[k], v[k]};
    AdamState<float> next = Rule::step(old, gradient[k], step.scalars, step.constants);
    ElementRounding how = element_rounding(step.rounding, element + k);
    parameter[k] = float(stored(next.parameter, how.parameter, P()));
    m[k] = float(stored(next.m, how.m, S()));
    v[k] = float(stored(next.v, how.v, S()));
  }
  store_parameters<length>(t, at, parameter);
  store_run<length>(t.new_m + at, m);
  store_run<length>(t.new_v + at, v);
}

// ---- Codes ----
//
// Four threads that follow each other in a simdgroup have a block of a row, a run each. What they share goes through shuffles,
// in which all four must take part: those beyond the end of a row with nothing, so none of them may leave early. The scales
// are read and written by the first alone: in place, another's read could come after the write.

template <typename T>
inline void load_codes(const device T* from, uint count, bool whole, thread T* codes) {
  if (whole) {
    uint2 words = *(const device uint2*)from;
    for (uint k = 0; k < kLongRun; ++k) {
      codes[k] = T(words[k / 4] >> (8 * (k % 4)));
    }
    return;
  }
  for (uint k = 0; k < kLongRun; ++k) {
    codes[k] = k < count ? from[k] : T(0);
  }
}

template <typename T>
inline void store_codes(device T* to, uint count, bool whole, const thread T* codes) {
  if (whole) {
    uint2 words = uint2(0);
    for (uint k = 0; k < kLongRun; ++k) {
      words[k / 4] |= uint(uint8_t(codes[k])) << (8 * (k % 4));
    }
    *(device uint2*)to = words;
    return;
  }
  for (uint k = 0; k < kLongRun; ++k) {
    if (k < count) {
      to[k] = codes[k];
    }
  }
}

// How many elements of a run that begins at `column` lie in its row.
inline uint run_count(uint column, uint columns) {
  return column < columns ? min(uint(kLongRun), columns - column) : 0u;
}

// What the four threads of a block have between them.
inline uint any_of_block(uint x) {
  x |= simd_shuffle_xor(x, 1);
  x |= simd_shuffle_xor(x, 2);
  return x;
}
inline uint largest_of_block(uint x) {
  x = max(x, simd_shuffle_xor(x, 1));
  x = max(x, simd_shuffle_xor(x, 2));
  return x;
}

// A step that is not applied; the old parameters lie `stride` apart from `from` on.
template <typename Index, typename P, typename G>
inline void keep_codes(
    TensorPointers<P, G, Codes> t,
    Index from,
    Index stride,
    Index at,
    Index block,
    bool is_first_of_block,
    uint count) {
  for (uint k = 0; k < count; ++k) {
    keep_parameter(t, from + Index(k) * stride, at + Index(k));
    t.new_m[at + Index(k)] = t.m[at + Index(k)];
    t.new_v[at + Index(k)] = t.v[at + Index(k)];
  }
  if (is_first_of_block && count > 0u) {
    t.extra.new_m_scale[block] = t.extra.m_scale[block];
    t.extra.new_v_scale[block] = t.extra.v_scale[block];
  }
}

// Updates the `count` elements of a run, whose parameters and gradients are given, zeros beyond them.
template <typename Rule, typename Index, typename P, typename G>
inline void update_codes(
    TensorPointers<P, G, Codes> t,
    Index at,
    Index block,
    bool is_first_of_block,
    uint element,
    uint count,
    bool vectors,
    thread float* parameter,
    const thread float* gradient,
    TensorStep step) {
  bool has_scales = is_first_of_block && count > 0u;
  bool whole = vectors && count == kLongRun;
  uint scales = 0u;
  if (has_scales) {
    scales = uint(t.extra.m_scale[block]) | (uint(t.extra.v_scale[block]) << 16);
  }
  scales = any_of_block(scales);
  float old_m_scale = load_bfloat16(ushort(scales & 0xFFFFu));
  float old_v_scale = load_bfloat16(ushort(scales >> 16));

  int8_t m_codes[kLongRun];
  uint8_t v_codes[kLongRun];
  load_codes(t.m + at, count, whole, m_codes);
  load_codes(t.v + at, count, whole, v_codes);
  float m[kLongRun], v[kLongRun];
  uint largest_m = 0u;
  uint largest_v = 0u;
  for (uint k = 0; k < kLongRun; ++k) {
    AdamState<float> old = {
        parameter[k], load_int8(m_codes[k], old_m_scale), load_uint8(v_codes[k], old_v_scale)};
    AdamState<float> next = Rule::step(old, gradient[k], step.scalars, step.constants);
    parameter[k] = next.parameter;
    m[k] = next.m;
    v[k] = next.v;
    largest_m = max(largest_m, block_magnitude(next.m));
    largest_v = max(largest_v, block_magnitude(next.v));
  }
  BlockScale m_scale = scale_of_m(largest_of_block(largest_m));
  BlockScale v_scale = scale_of_v(largest_of_block(largest_v));

  for (uint k = 0; k < kLongRun; ++k) {
    ElementRounding how = element_rounding(step.rounding, element + k);
    parameter[k] = float(stored(parameter[k], how.parameter, P()));
    m_codes[k] = int8_t(store_int8(m[k], m_scale.inverse, how.m));
    v_codes[k] = uint8_t(store_uint8(v[k], v_scale.inverse, how.v));
  }
  if (whole) {
    store_parameters<kLongRun>(t, at, parameter);
  } else {
    for (uint k = 0; k < kLongRun; ++k) {
      if (k < count) {
        store_parameter(t, at + k, stored(parameter[k], {false, 0u}, P()));
      }
    }
  }
  store_codes(t.new_m + at, count, whole, m_codes);
  store_codes(t.new_v + at, count, whole, v_codes);
  if (has_scales) {
    t.extra.new_m_scale[block] = ushort(m_scale.stored);
    t.extra.new_v_scale[block] = ushort(v_scale.stored);
  }
}

// The parameters of a run of `count` elements, zeros beyond them.
template <typename P, typename G, typename Index>
inline void load_parameters_of_codes(
    TensorPointers<P, G, Codes> t, Index at, uint count, bool vectors, thread float* values) {
  if (vectors && count == kLongRun) {
    load_parameters<kLongRun>(t, at, values);
    return;
  }
  for (uint k = 0; k < kLongRun; ++k) {
    values[k] = k < count ? load_parameter(t, at + k, at + k) : 0.0f;
  }
}

// ---- What a thread of each kernel does ----

// The run of one thread of a row-major tensor; at its end, the elements that are left.
template <typename Rule, typename P, typename G, typename S>
inline void update_row_major(
    TensorPointers<P, G, S> t,
    uint thread_of_tensor,
    uint first_element,
    uint size,
    uint,
    bool vectors,
    TensorStep step) {
  constexpr uint length = Run<P, G, S>::length;
  uint start = thread_of_tensor * length;
  if (vectors && size - start >= length) {
    float gradient[length];
    load_run<length>(t.gradient + start, gradient);
    update_run<Rule>(t, start, first_element + start, gradient, step);
    return;
  }
  uint end = min(size, start + length);
  for (uint i = start; i < end; ++i) {
    update_element<Rule>(
        t, i, first_element + i, float(t.gradient[i]), step);
  }
}
template <typename Rule, typename P, typename G>
inline void update_row_major(
    TensorPointers<P, G, Codes> t,
    uint thread_of_tensor,
    uint first_element,
    uint,
    uint row_length,
    bool vectors,
    TensorStep step) {
  uint row_threads = (row_length + kBlockElements - 1) / kBlockElements * kBlockThreads;
  uint row = thread_of_tensor / row_threads;
  uint thread_of_row = thread_of_tensor - row * row_threads;
  uint column = thread_of_row * kLongRun;
  uint count = run_count(column, row_length);
  uint at = row * row_length + column;
  uint block = thread_of_tensor / kBlockThreads;
  bool is_first_of_block = thread_of_row % kBlockThreads == 0;
  if (!step.is_applied) {
    keep_codes(t, at, 1u, at, block, is_first_of_block, count);
    return;
  }
  float parameter[kLongRun], gradient[kLongRun];
  load_parameters_of_codes(t, at, count, vectors, parameter);
  if (vectors && count == kLongRun) {
    load_run<kLongRun>(t.gradient + at, gradient);
  } else {
    for (uint k = 0; k < kLongRun; ++k) {
      gradient[k] = k < count ? float(t.gradient[at + k]) : 0.0f;
    }
  }
  update_codes<Rule>(
      t,
      at,
      block,
      is_first_of_block,
      first_element + at,
      count,
      vectors,
      parameter,
      gradient,
      step);
}

// The part of a tile's line that one thread has: from `column` on, whose gradient begins at `gradient`, `pitch` elements apart.
template <typename Rule, typename P, typename G, typename S>
inline void update_in_tile(
    TensorPointers<P, G, S> t,
    const threadgroup G* gradient,
    uint pitch,
    int64_t at,
    int64_t,
    uint column,
    uint columns,
    bool vectors,
    TensorStep step) {
  constexpr uint length = Run<P, G, S>::length;
  if (vectors && column + length <= columns) {
    float values[length];
    for (uint i = 0; i < length; ++i) {
      values[i] = float(gradient[i * pitch]);
    }
    update_run<Rule>(t, at, uint(at), values, step);
  } else {
    for (uint i = 0; i < length && column + i < columns; ++i) {
      update_element<Rule>(
          t, at + i, uint(at + i), float(gradient[i * pitch]), step);
    }
  }
}
template <typename Rule, typename P, typename G>
inline void update_in_tile(
    TensorPointers<P, G, Codes> t,
    const threadgroup G* gradient,
    uint pitch,
    int64_t at,
    int64_t row_block,
    uint column,
    uint columns,
    bool vectors,
    TensorStep step) {
  uint count = run_count(column, columns);
  int64_t block = row_block + column / kBlockElements;
  bool is_first_of_block = column % kBlockElements == 0;
  if (!step.is_applied) {
    keep_codes(t, at, int64_t(1), at, block, is_first_of_block, count);
    return;
  }
  float parameter[kLongRun], values[kLongRun];
  load_parameters_of_codes(t, at, count, vectors, parameter);
  for (uint k = 0; k < kLongRun; ++k) {
    values[k] = k < count ? float(gradient[k * pitch]) : 0.0f;
  }
  update_codes<Rule>(
      t,
      at,
      block,
      is_first_of_block,
      uint(at),
      count,
      vectors,
      parameter,
      values,
      step);
}

// Where a thread of adam_general is, the pointers being moved there: its place in its row, and the strides of the last axis.
template <typename Index>
struct GeneralPlace {
  Index row;
  uint column;
  uint columns;
  Index parameter_stride;
  Index gradient_stride;
};

template <typename Rule, typename P, typename G, typename S, typename Index>
inline void update_general(
    TensorPointers<P, G, S> t,
    GeneralPlace<Index>,
    uint element,
    TensorStep step) {
  update_element<Rule>(t, 0u, element, float(*t.gradient), step);
}
template <typename Rule, typename P, typename G, typename Index>
inline void update_general(
    TensorPointers<P, G, Codes> t,
    GeneralPlace<Index> place,
    uint element,
    TensorStep step) {
  uint count = run_count(place.column, place.columns);
  Index row_blocks = Index((place.columns + kBlockElements - 1) / kBlockElements);
  Index block = place.row * row_blocks + Index(place.column / kBlockElements);
  bool is_first_of_block = place.column % kBlockElements == 0;
  if (!step.is_applied) {
    keep_codes(
        t, Index(0), place.parameter_stride, Index(0), block, is_first_of_block, count);
    return;
  }
  float parameter[kLongRun], gradient[kLongRun];
  for (uint k = 0; k < kLongRun; ++k) {
    parameter[k] = 0.0f;
    gradient[k] = 0.0f;
    if (k < count) {
      parameter[k] = load_parameter(t, Index(k) * place.parameter_stride, Index(k));
      gradient[k] = float(t.gradient[Index(k) * place.gradient_stride]);
    }
  }
  update_codes<Rule>(
      t,
      Index(0),
      block,
      is_first_of_block,
      element,
      count,
      false,
      parameter,
      gradient,
      step);
}

// One row-major tensor, or a piece of one: the host cuts what exceeds 32-bit indices. One thread per run.
template <typename Rule, typename P, typename G, typename S>
[[kernel]] void adam_linear(
    constant LinearArgs& args [[buffer(kArgs)]],
    const device float* scalars [[buffer(kScalars)]],
    const device typename Format<P>::parameter* parameter [[buffer(kParameter)]],
    const device G* gradient [[buffer(kGradient)]],
    const device typename Format<S>::m* m [[buffer(kM)]],
    const device typename Format<S>::v* v [[buffer(kV)]],
    device typename Format<P>::parameter* new_parameter [[buffer(kNewParameter)]],
    device typename Format<S>::m* new_m [[buffer(kNewM)]],
    device typename Format<S>::v* new_v [[buffer(kNewV)]],
    const device short* remainder [[buffer(kRemainder)]],
    const device ushort* m_scale [[buffer(kMScale)]],
    const device ushort* v_scale [[buffer(kVScale)]],
    device short* new_remainder [[buffer(kNewRemainder)]],
    device ushort* new_m_scale [[buffer(kNewMScale)]],
    device ushort* new_v_scale [[buffer(kNewVScale)]],
    const device uint* step [[buffer(kStep)]],
    uint thread_in_grid [[thread_position_in_grid]]) {
  ExtraPointers extra = {remainder, m_scale, v_scale, new_remainder, new_m_scale, new_v_scale};
  TensorPointers<P, G, S> tensor = {parameter, gradient, m, v, new_parameter, new_m, new_v, extra};
  update_row_major<Rule>(
      tensor,
      thread_in_grid,
      args.first_element,
      args.size,
      args.row_length,
      args.vectors != 0,
      tensor_step(args, args.number, scalars, step, Format<S>::has_codes));
}

// Several small row-major tensors, of formats without extras, in one dispatch; the grid holds the threads of all of them, one after the other.
template <typename Rule, typename P, typename G, typename S>
[[kernel]] void adam_group(
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
  ExtraPointers none = {};
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
  update_row_major<Rule>(
      tensor,
      thread_in_grid - first_thread,
      0u,
      args.sizes[which],
      args.sizes[which],
      args.vectors[which] != 0,
      tensor_step(args, args.numbers[which], scalars, step, false));
}

// A matrix (or a batch of them, along the grid's z) whose gradient is column-major: a tile of it goes through threadgroup
// memory, so that gradient and state are both walked along their unit strides, a run a thread.
template <typename Rule, typename P, typename G, typename S>
[[kernel]] void adam_tiled(
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
    const device short* remainder [[buffer(kRemainder)]],
    const device ushort* m_scale [[buffer(kMScale)]],
    const device ushort* v_scale [[buffer(kVScale)]],
    device short* new_remainder [[buffer(kNewRemainder)]],
    device ushort* new_m_scale [[buffer(kNewMScale)]],
    device ushort* new_v_scale [[buffer(kNewVScale)]],
    const device uint* step [[buffer(kStep)]],
    uint3 tile_in_grid [[threadgroup_position_in_grid]],
    uint3 thread_in_tile [[thread_position_in_threadgroup]]) {
  constexpr uint length = Run<P, G, S>::length;
  constexpr uint side = kTileRuns * length;
  constexpr uint lines_at_once = kThreads / kTileRuns;
  // Indexed by column and row. The pad, one word, keeps a row's elements in different banks.
  threadgroup G tile[side][side + 4 / sizeof(G)];

  // The last two strides are those of the matrix: its rows in the state, its columns in the gradient.
  int64_t row_stride = parameter_strides[args.axes];
  int64_t column_stride = gradient_strides[args.axes];
  int64_t matrix = 0;
  int64_t gradient_matrix = 0;
  // Of codes, the same in blocks: those strides follow the parameter's.
  int64_t row_blocks = 0;
  int64_t first_block = 0;
  if (Format<S>::has_codes) {
    row_blocks = parameter_strides[2 * args.axes + 1];
  }
  uint batch = tile_in_grid.z;
  for (uint axis = args.axes; axis-- > 0;) {
    uint size = uint(shape[axis]);
    int64_t i = batch % size;
    batch /= size;
    matrix += i * parameter_strides[axis];
    gradient_matrix += i * gradient_strides[axis];
    if (Format<S>::has_codes) {
      first_block += i * parameter_strides[args.axes + 1 + axis];
    }
  }
  uint first_row = tile_in_grid.y * side;
  uint first_column = tile_in_grid.x * side;
  uint start = thread_in_tile.x % kTileRuns * length;  // of this thread's runs, within the tile
  uint first_line = thread_in_tile.x / kTileRuns;

  uint row = first_row + start;
  for (uint k = first_line; k < side && first_column + k < args.columns; k += lines_at_once) {
    const device G* from = gradient + (gradient_matrix + (first_column + k) * column_stride + row);
    if (args.vectors && row + length <= args.rows) {
      float values[length];
      load_run<length>(from, values);
      for (uint i = 0; i < length; ++i) {
        tile[k][start + i] = G(values[i]);
      }
    } else {
      for (uint i = 0; i < length && row + i < args.rows; ++i) {
        tile[k][start + i] = from[i];
      }
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  ExtraPointers extra = {remainder, m_scale, v_scale, new_remainder, new_m_scale, new_v_scale};
  TensorPointers<P, G, S> tensor = {parameter, gradient, m, v, new_parameter, new_m, new_v, extra};
  TensorStep of_tensor = tensor_step(args, args.number, scalars, step, Format<S>::has_codes);
  constexpr uint pitch = sizeof(tile[0]) / sizeof(G);
  uint column = first_column + start;
  for (uint k = first_line; k < side && first_row + k < args.rows; k += lines_at_once) {
    int64_t at = matrix + (first_row + k) * row_stride + column;
    int64_t row_block = first_block + (first_row + k) * row_blocks;
    update_in_tile<Rule>(
        tensor,
        &tile[start][k],
        pitch,
        at,
        row_block,
        column,
        args.columns,
        args.vectors != 0,
        of_tensor);
  }
}

// Any strides of any array but codes and extras; the outputs are row-major. The grid's x and y are the last two axes, z all
// those before them; of codes, x is the runs of the last axis.
// Index is 64 bits wide where 32 do not do.
template <typename Rule, typename P, typename G, typename S, typename Index>
[[kernel]] void adam_general(
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
    const device short* remainder [[buffer(kRemainder)]],
    const device ushort* m_scale [[buffer(kMScale)]],
    const device ushort* v_scale [[buffer(kVScale)]],
    device short* new_remainder [[buffer(kNewRemainder)]],
    device ushort* new_m_scale [[buffer(kNewMScale)]],
    device ushort* new_v_scale [[buffer(kNewVScale)]],
    const device uint* step [[buffer(kStep)]],
    uint3 thread_in_grid [[thread_position_in_grid]],
    uint3 grid [[threads_per_grid]]) {
  Index parameter_at = 0;
  Index gradient_at = 0;
  Index m_at = 0;
  Index v_at = 0;
  uint column = Format<S>::has_codes ? thread_in_grid.x * kLongRun : thread_in_grid.x;
  uint columns = Format<S>::has_codes ? uint(shape[args.axes - 1]) : grid.x;
  uint outer = thread_in_grid.z;
  for (uint axis = args.axes; axis-- > 0;) {
    Index i = Index(axis + 1 == args.axes ? column : thread_in_grid.y);
    if (axis + 2 < args.axes) {
      uint size = uint(shape[axis]);
      i = Index(outer % size);
      outer /= size;
    }
    parameter_at += i * Index(parameter_strides[axis]);
    gradient_at += i * Index(gradient_strides[axis]);
    m_at += i * Index(m_strides[axis]);
    v_at += i * Index(v_strides[axis]);
  }
  Index row = Index(thread_in_grid.z) * Index(grid.y) + Index(thread_in_grid.y);
  Index at = row * Index(columns) + Index(column);
  ExtraPointers extra = {
      remainder + at, m_scale, v_scale, new_remainder + at, new_m_scale, new_v_scale};
  TensorPointers<P, G, S> tensor = {
      parameter + parameter_at,
      gradient + gradient_at,
      m + m_at,
      v + v_at,
      new_parameter + at,
      new_m + at,
      new_v + at,
      extra};
  GeneralPlace<Index> place = {
      row,
      column,
      columns,
      Index(parameter_strides[args.axes - 1]),
      Index(gradient_strides[args.axes - 1])};
  update_general<Rule>(
      tensor,
      place,
      args.first_element + uint(at),
      tensor_step(args, args.number, scalars, step, Format<S>::has_codes));
}
