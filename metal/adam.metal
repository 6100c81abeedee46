// The Metal kernels of the fused update: load -> rule -> store, one pass over each buffer. The rule is adam_rule.h.
// Compiled on the user's machine from the string that the build embeds; csrc/eval_metal.cpp adds the instantiations
// for the dtypes it meets (P: parameter, G: gradient, S: m and v) and chooses kernel, buffers and grid.
#include <metal_stdlib>

#include "adam_args.h"
#include "adam_rule.h"

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

// Updates the element that lies at `at` in the three outputs. The inputs may lie elsewhere, each at its own offset.
template <typename Rule, typename P, typename S>
inline void update_element(
    P parameter,
    float gradient,
    S m,
    S v,
    device P* new_parameter,
    device S* new_m,
    device S* new_v,
    AdamScalars<float> scalars,
    AdamConstants constants) {
  AdamState<float> old = {float(parameter), float(m), float(v)};
  AdamState<float> next = Rule::step(old, gradient, scalars, constants);
  *new_parameter = P(next.parameter);
  *new_m = S(next.m);
  *new_v = S(next.v);
}

template <typename Rule, typename P, typename G, typename S>
inline void update_vector(
    TensorPointers<P, G, S> t,
    uint at,
    AdamScalars<float> scalars,
    AdamConstants constants) {
  vec<P, kElementsPerThread> parameter =
      *(const device vec<P, kElementsPerThread>*)(t.parameter + at);
  vec<G, kElementsPerThread> gradient =
      *(const device vec<G, kElementsPerThread>*)(t.gradient + at);
  vec<S, kElementsPerThread> m = *(const device vec<S, kElementsPerThread>*)(t.m + at);
  vec<S, kElementsPerThread> v = *(const device vec<S, kElementsPerThread>*)(t.v + at);
  for (int k = 0; k < kElementsPerThread; ++k) {
    AdamState<float> old = {float(parameter[k]), float(m[k]), float(v[k])};
    AdamState<float> next = Rule::step(old, float(gradient[k]), scalars, constants);
    parameter[k] = P(next.parameter);
    m[k] = S(next.m);
    v[k] = S(next.v);
  }
  *(device vec<P, kElementsPerThread>*)(t.new_parameter + at) = parameter;
  *(device vec<S, kElementsPerThread>*)(t.new_m + at) = m;
  *(device vec<S, kElementsPerThread>*)(t.new_v + at) = v;
}

// The kElementsPerThread elements of one thread; at the end of the tensor, those that are left.
template <typename Rule, typename P, typename G, typename S>
inline void update_run(
    TensorPointers<P, G, S> t,
    uint thread_of_tensor,
    uint size,
    bool vectors,
    AdamScalars<float> scalars,
    AdamConstants constants) {
  uint start = thread_of_tensor * kElementsPerThread;
  if (vectors && size - start >= kElementsPerThread) {
    update_vector<Rule>(t, start, scalars, constants);
    return;
  }
  uint end = min(size, start + kElementsPerThread);
  for (uint i = start; i < end; ++i) {
    update_element<Rule>(
        t.parameter[i],
        float(t.gradient[i]),
        t.m[i],
        t.v[i],
        t.new_parameter + i,
        t.new_m + i,
        t.new_v + i,
        scalars,
        constants);
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
    uint thread_in_grid [[thread_position_in_grid]]) {
  TensorPointers<P, G, S> tensor = {parameter, gradient, m, v, new_parameter, new_m, new_v};
  update_run<Rule>(
      tensor, thread_in_grid, args.size, args.vectors != 0, load_scalars(scalars, args.scalar_count), args.constants);
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
  update_run<Rule>(
      tensor,
      thread_in_grid - first_thread,
      args.sizes[which],
      args.vectors[which] != 0,
      load_scalars(scalars, args.scalar_count),
      args.constants);
}

// Where row-major element `index` of an array with these axes lies.
template <typename Index>
inline Index offset_of(
    Index index, constant const int64_t* shape, constant const int64_t* strides, uint axes) {
  Index offset = 0;
  for (uint axis = axes; axis-- > 0;) {
    Index size = Index(shape[axis]);
    offset += (index % size) * Index(strides[axis]);
    index /= size;
  }
  return offset;
}

// A matrix (or a batch of them, along the grid's z) whose gradient is column-major: a tile of it goes through threadgroup
// memory, so that gradient and state are both walked along their unit strides.
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
    uint3 tile_in_grid [[threadgroup_position_in_grid]],
    uint3 thread_in_tile [[thread_position_in_threadgroup]]) {
  // The pad keeps a column's elements in different banks.
  threadgroup float tile[kTile][kTile + 1];

  // The last two strides are those of the matrix: its rows in the state, its columns in the gradient.
  int64_t row_stride = parameter_strides[args.axes];
  int64_t column_stride = gradient_strides[args.axes];
  int64_t batch = int64_t(tile_in_grid.z);
  const device G* matrix_gradient =
      gradient + offset_of(batch, shape, gradient_strides, args.axes);
  int64_t matrix = offset_of(batch, shape, parameter_strides, args.axes);
  uint first_row = tile_in_grid.y * kTile;
  uint first_column = tile_in_grid.x * kTile;

  uint row = first_row + thread_in_tile.x;
  for (uint k = thread_in_tile.y; k < kTile; k += kTileThreadRows) {
    uint column = first_column + k;
    if (row < args.rows && column < args.columns) {
      tile[k][thread_in_tile.x] = float(matrix_gradient[row + column * column_stride]);
    }
  }
  threadgroup_barrier(mem_flags::mem_threadgroup);

  AdamScalars<float> step_scalars = load_scalars(scalars, args.scalar_count);
  uint column = first_column + thread_in_tile.x;
  for (uint k = thread_in_tile.y; k < kTile; k += kTileThreadRows) {
    row = first_row + k;
    if (row < args.rows && column < args.columns) {
      int64_t at = matrix + row * row_stride + column;
      update_element<Rule>(
          parameter[at],
          tile[thread_in_tile.x][k],
          m[at],
          v[at],
          new_parameter + at,
          new_m + at,
          new_v + at,
          step_scalars,
          args.constants);
    }
  }
}

// Any strides of any array; the outputs are row-major. Index is 64 bits wide where 32 do not do.
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
    uint2 thread_in_grid [[thread_position_in_grid]]) {
  Index at = Index(thread_in_grid.y) * kGeneralWidth + thread_in_grid.x;
  Index size = 1;
  for (uint axis = 0; axis < args.axes; ++axis) {
    size *= Index(shape[axis]);
  }
  if (at >= size) {
    return;
  }
  update_element<Rule>(
      parameter[offset_of(at, shape, parameter_strides, args.axes)],
      float(gradient[offset_of(at, shape, gradient_strides, args.axes)]),
      m[offset_of(at, shape, m_strides, args.axes)],
      v[offset_of(at, shape, v_strides, args.axes)],
      new_parameter + at,
      new_m + at,
      new_v + at,
      load_scalars(scalars, args.scalar_count),
      args.constants);
}
