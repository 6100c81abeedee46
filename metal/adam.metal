// The Metal kernels of the fused update: load -> rule -> store, one pass over each buffer. The rule is adam_rule.h.
// Compiled on the user's machine from the string that the build embeds; csrc/eval_metal.cpp adds the instantiations
// for the dtypes it meets (P: parameter, G: gradient, S: m and v) and chooses kernel, buffers and grid.
//
// An element costs 4 loads and 3 stores, 28 bytes in float32 and 14 in 16 bits, and 8 products, 4 sums, a division and a
// root: far less than a GPU computes while it moves them. docs/metal.md has the bandwidth to expect of each kernel.
#include <metal_stdlib>

#include "adam_args.h"
#include "adam_rule.h"
#include "storage_formats.h"

using namespace metal;
using namespace fused_adam;

template <typename P, typename G, typename S>
struct TensorPointers {
  const device P* parameter;
  const device G* gradient;
  const device S* m;
  const device S* v;
  device P* new_parameter;
  device S* new_m;
  device S* new_v;
};

inline AdamScalars<float> load_scalars(const device float* scalars, uint count) {
  if (count == 1) {
    return {scalars[0], 1.0f, 1.0f};
  }
  return {scalars[0], scalars[1], scalars[2]};
}

// How the results of a tensor are rounded in one step, and those of one element.
struct TensorRounding {
  uint flags;
  RoundingKey key;
};

struct ElementRounding {
  Rounding parameter;
  Rounding m;
  Rounding v;
};

inline TensorRounding tensor_rounding(RoundingArgs args, uint number, const device uint* step) {
  TensorRounding rounding = {args.flags, {0u, 0u}};
  if (args.flags != 0u) {
    rounding.key = rounding_key(args.seed_low, args.seed_high, step[0], number);
  }
  return rounding;
}

inline ElementRounding element_rounding(TensorRounding tensor, uint element) {
  uint of_state = 0u;
  uint of_parameter = 0u;
  if ((tensor.flags & (kRoundM | kRoundV)) != 0u) {
    of_state = random_bits(tensor.key, element);
  }
  if ((tensor.flags & kRoundParameter) != 0u) {
    of_parameter = more_random_bits(tensor.key, element);
  }
  return {
      {(tensor.flags & kRoundParameter) != 0u, of_parameter & 0xFFFFu},
      {(tensor.flags & kRoundM) != 0u, of_state >> 16},
      {(tensor.flags & kRoundV) != 0u, of_state & 0xFFFFu}};
}

// A result as it is stored; T without a name is bfloat, which not every GPU has.
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

// Elements of a run.
template <typename P, typename G, typename S>
struct Run {
  enum { length = kRunBytes / (sizeof(P) == 2 || sizeof(G) == 2 || sizeof(S) == 2 ? 2 : 4) };
};

// Element k of 16 bytes, and back: names for bits, no arithmetic. For 16-bit types, and for float.
template <typename T>
inline float get_element(uint4 words, uint k, T) {
  return float(as_type<T>(ushort(words[k / 2] >> (16 * (k % 2)))));
}
inline float get_element(uint4 words, uint k, float) {
  return as_type<float>(words[k]);
}
template <typename T>
inline void set_element(thread uint4& words, uint k, T value) {
  words[k / 2] |= uint(as_type<ushort>(value)) << (16 * (k % 2));
}
inline void set_element(thread uint4& words, uint k, float value) {
  words[k] = as_type<uint>(value);
}

template <uint N, typename T>
inline void load_run(const device T* from, thread float* values) {
  constexpr uint count = kRunBytes / sizeof(T);
  for (uint start = 0; start < N; start += count) {
    uint4 words = *(const device uint4*)(from + start);
    for (uint k = 0; k < count; ++k) {
      values[start + k] = get_element(words, k, T(0));
    }
  }
}

template <uint N, typename T>
inline void store_run(device T* to, const thread float* values) {
  constexpr uint count = kRunBytes / sizeof(T);
  for (uint start = 0; start < N; start += count) {
    uint4 words = uint4(0);
    for (uint k = 0; k < count; ++k) {
      set_element(words, k, T(values[start + k]));
    }
    *(device uint4*)(to + start) = words;
  }
}

// Updates the element that lies at `at` in all arrays but the gradient, whose element is given, and is the tensor's `element`.
template <typename Rule, typename Index, typename P, typename G, typename S>
inline void update_element(
    TensorPointers<P, G, S> t,
    Index at,
    uint element,
    float gradient,
    AdamScalars<float> scalars,
    AdamConstants constants,
    TensorRounding rounding) {
  AdamState<float> old = {float(t.parameter[at]), float(t.m[at]), float(t.v[at])};
  AdamState<float> next = Rule::step(old, gradient, scalars, constants);
  ElementRounding how = element_rounding(rounding, element);
  P new_parameter = stored(next.parameter, how.parameter, P(0));
  S new_m = stored(next.m, how.m, S(0));
  S new_v = stored(next.v, how.v, S(0));
  t.new_parameter[at] = new_parameter;
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
    AdamScalars<float> scalars,
    AdamConstants constants,
    TensorRounding rounding) {
  constexpr uint length = Run<P, G, S>::length;
  float parameter[length], m[length], v[length];
  load_run<length>(t.parameter + at, parameter);
  load_run<length>(t.m + at, m);
  load_run<length>(t.v + at, v);
  for (uint k = 0; k < length; ++k) {
    AdamState<float> old = {parameter[k], m[k], v[k]};
    AdamState<float> next = Rule::step(old, gradient[k], scalars, constants);
    ElementRounding how = element_rounding(rounding, element + k);
    parameter[k] = float(stored(next.parameter, how.parameter, P(0)));
    m[k] = float(stored(next.m, how.m, S(0)));
    v[k] = float(stored(next.v, how.v, S(0)));
  }
  store_run<length>(t.new_parameter + at, parameter);
  store_run<length>(t.new_m + at, m);
  store_run<length>(t.new_v + at, v);
}

// The run of one thread of a row-major tensor; at its end, the elements that are left.
template <typename Rule, typename P, typename G, typename S>
inline void update_row_major(
    TensorPointers<P, G, S> t,
    uint thread_of_tensor,
    uint first_element,
    uint size,
    bool vectors,
    AdamScalars<float> scalars,
    AdamConstants constants,
    TensorRounding rounding) {
  constexpr uint length = Run<P, G, S>::length;
  uint start = thread_of_tensor * length;
  if (vectors && size - start >= length) {
    float gradient[length];
    load_run<length>(t.gradient + start, gradient);
    update_run<Rule>(t, start, first_element + start, gradient, scalars, constants, rounding);
    return;
  }
  uint end = min(size, start + length);
  for (uint i = start; i < end; ++i) {
    update_element<Rule>(
        t, i, first_element + i, float(t.gradient[i]), scalars, constants, rounding);
  }
}

// One row-major tensor, or a piece of one: the host cuts what exceeds 32-bit indices. One thread per run.
template <typename Rule, typename P, typename G, typename S>
[[kernel]] void adam_linear(
    constant LinearArgs& args [[buffer(kArgs)]],
    const device float* scalars [[buffer(kScalars)]],
    const device P* parameter [[buffer(kParameter)]],
    const device G* gradient [[buffer(kGradient)]],
    const device S* m [[buffer(kM)]],
    const device S* v [[buffer(kV)]],
    device P* new_parameter [[buffer(kNewParameter)]],
    device S* new_m [[buffer(kNewM)]],
    device S* new_v [[buffer(kNewV)]],
    const device uint* step [[buffer(kStep)]],
    uint thread_in_grid [[thread_position_in_grid]]) {
  TensorPointers<P, G, S> tensor = {parameter, gradient, m, v, new_parameter, new_m, new_v};
  update_row_major<Rule>(
      tensor,
      thread_in_grid,
      args.first_element,
      args.size,
      args.vectors != 0,
      load_scalars(scalars, args.scalar_count),
      args.constants,
      tensor_rounding(args.rounding, args.number, step));
}

// Several small row-major tensors in one dispatch; the grid holds the threads of all of them, one after the other.
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
  TensorPointers<P, G, S> tensor = {
      parameter_0, gradient_0, m_0, v_0, new_parameter_0, new_m_0, new_v_0};
  uint which = 0;
  if (thread_in_grid >= args.thread_ends[2]) {
    which = 3;
    tensor = {parameter_3, gradient_3, m_3, v_3, new_parameter_3, new_m_3, new_v_3};
  } else if (thread_in_grid >= args.thread_ends[1]) {
    which = 2;
    tensor = {parameter_2, gradient_2, m_2, v_2, new_parameter_2, new_m_2, new_v_2};
  } else if (thread_in_grid >= args.thread_ends[0]) {
    which = 1;
    tensor = {parameter_1, gradient_1, m_1, v_1, new_parameter_1, new_m_1, new_v_1};
  }
  uint first_thread = which == 0 ? 0 : args.thread_ends[which - 1];
  update_row_major<Rule>(
      tensor,
      thread_in_grid - first_thread,
      0u,
      args.sizes[which],
      args.vectors[which] != 0,
      load_scalars(scalars, args.scalar_count),
      args.constants,
      tensor_rounding(args.rounding, args.numbers[which], step));
}

// A matrix (or a batch of them, along the grid's z) whose gradient is column-major: a tile of it goes through threadgroup
// memory, so that gradient and state are both walked along their unit strides, a run a thread.
template <typename Rule, typename P, typename G, typename S>
[[kernel]] void adam_tiled(
    constant TiledArgs& args [[buffer(kArgs)]],
    const device float* scalars [[buffer(kScalars)]],
    const device P* parameter [[buffer(kParameter)]],
    const device G* gradient [[buffer(kGradient)]],
    const device S* m [[buffer(kM)]],
    const device S* v [[buffer(kV)]],
    device P* new_parameter [[buffer(kNewParameter)]],
    device S* new_m [[buffer(kNewM)]],
    device S* new_v [[buffer(kNewV)]],
    constant const int64_t* shape [[buffer(kShape)]],
    constant const int64_t* parameter_strides [[buffer(kParameterStrides)]],
    constant const int64_t* gradient_strides [[buffer(kGradientStrides)]],
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
  uint batch = tile_in_grid.z;
  for (uint axis = args.axes; axis-- > 0;) {
    uint size = uint(shape[axis]);
    int64_t i = batch % size;
    batch /= size;
    matrix += i * parameter_strides[axis];
    gradient_matrix += i * gradient_strides[axis];
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

  TensorPointers<P, G, S> tensor = {parameter, gradient, m, v, new_parameter, new_m, new_v};
  AdamScalars<float> step_scalars = load_scalars(scalars, args.scalar_count);
  TensorRounding rounding = tensor_rounding(args.rounding, args.number, step);
  uint column = first_column + start;
  for (uint k = first_line; k < side && first_row + k < args.rows; k += lines_at_once) {
    int64_t at = matrix + (first_row + k) * row_stride + column;
    if (args.vectors && column + length <= args.columns) {
      float values[length];
      for (uint i = 0; i < length; ++i) {
        values[i] = float(tile[start + i][k]);
      }
      update_run<Rule>(tensor, at, uint(at), values, step_scalars, args.constants, rounding);
    } else {
      for (uint i = 0; i < length && column + i < args.columns; ++i) {
        update_element<Rule>(
            tensor,
            at + i,
            uint(at + i),
            float(tile[start + i][k]),
            step_scalars,
            args.constants,
            rounding);
      }
    }
  }
}

// Any strides of any array; the outputs are row-major. The grid's x and y are the last two axes, z all those before them.
// Index is 64 bits wide where 32 do not do.
template <typename Rule, typename P, typename G, typename S, typename Index>
[[kernel]] void adam_general(
    constant GeneralArgs& args [[buffer(kArgs)]],
    const device float* scalars [[buffer(kScalars)]],
    const device P* parameter [[buffer(kParameter)]],
    const device G* gradient [[buffer(kGradient)]],
    const device S* m [[buffer(kM)]],
    const device S* v [[buffer(kV)]],
    device P* new_parameter [[buffer(kNewParameter)]],
    device S* new_m [[buffer(kNewM)]],
    device S* new_v [[buffer(kNewV)]],
    constant const int64_t* shape [[buffer(kShape)]],
    constant const int64_t* parameter_strides [[buffer(kParameterStrides)]],
    constant const int64_t* gradient_strides [[buffer(kGradientStrides)]],
    constant const int64_t* m_strides [[buffer(kMStrides)]],
    constant const int64_t* v_strides [[buffer(kVStrides)]],
    const device uint* step [[buffer(kStep)]],
    uint3 thread_in_grid [[thread_position_in_grid]],
    uint3 grid [[threads_per_grid]]) {
  Index parameter_at = 0;
  Index gradient_at = 0;
  Index m_at = 0;
  Index v_at = 0;
  uint outer = thread_in_grid.z;
  for (uint axis = args.axes; axis-- > 0;) {
    Index i = Index(axis + 1 == args.axes ? thread_in_grid.x : thread_in_grid.y);
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
  Index at = (Index(thread_in_grid.z) * Index(grid.y) + Index(thread_in_grid.y)) * Index(grid.x) +
      Index(thread_in_grid.x);
  TensorPointers<P, G, S> element = {
      parameter + parameter_at, gradient + gradient_at, m + m_at, v + v_at, new_parameter + at, new_m + at, new_v + at};
  update_element<Rule>(
      element,
      0u,
      args.first_element + uint(at),
      float(*element.gradient),
      load_scalars(scalars, args.scalar_count),
      args.constants,
      tensor_rounding(args.rounding, args.number, step));
}
