// The CPU back end: cuts each tensor into units of work, and hands contiguous runs to the vectorised kernels.
// A gradient that is not row-major is brought into a small buffer tile by tile, so it is read from memory once.
#include <algorithm>
#include <stdexcept>
#include <vector>

#include "adam_update.h"
#include "cpu_kernels.h"
#include "in_place.h"
#include "layout.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/device.h"
#include "mlx/stream.h"
#include "threads.h"

namespace fused_adam {

namespace mx = mlx::core;

namespace {

// Elements of a unit of linear work: small enough to balance, large enough that claiming it costs nothing.
constexpr size_t kRun = 1 << 15;
// Elements gathered at a time: four float32 buffers of this many stay in the first-level cache.
constexpr size_t kGather = 1 << 10;
// Sides of the transposed tile: whole cache lines of the gradient, runs of the state that prefetchers follow.
constexpr size_t kTileRows = 64;
constexpr size_t kTileColumns = 128;
// Below this many elements in a node, waking another thread costs more than it saves.
constexpr size_t kWorthThreads = 1 << 15;

cpu::Storage storage_of(mx::Dtype dtype) {
  switch (dtype.val()) {
    case mx::Dtype::Val::float32:
      return cpu::kFloat32;
    case mx::Dtype::Val::bfloat16:
      return cpu::kBfloat16;
    case mx::Dtype::Val::float16:
      return cpu::kFloat16;
    default:
      throw std::logic_error("[AdamUpdate] dtype was not validated");
  }
}

size_t divide_up(size_t n, size_t by) { return (n + by - 1) / by; }

// Where row-major element `index` of an array with these axes lies, in elements.
int64_t offset_of(int64_t index, const std::vector<int64_t>& shape,
                  const std::vector<int64_t>& strides) {
  int64_t offset = 0;
  for (size_t axis = shape.size(); axis-- > 0;) {
    offset += index % shape[axis] * strides[axis];
    index /= shape[axis];
  }
  return offset;
}

template <typename Element>
void gather(const char* from_bytes, const std::vector<int64_t>& shape,
            const std::vector<int64_t>& strides, int64_t start, size_t n, char* to_bytes) {
  auto from = reinterpret_cast<const Element*>(from_bytes);
  auto to = reinterpret_cast<Element*>(to_bytes);
  int64_t inner = shape.back();
  int64_t stride = strides.back();
  for (size_t done = 0; done < n;) {
    int64_t at = start + int64_t(done);
    auto row = from + offset_of(at, shape, strides);
    size_t count = std::min<size_t>(n - done, inner - at % inner);
    for (size_t i = 0; i < count; ++i) to[done + i] = row[int64_t(i) * stride];
    done += count;
  }
}

// One tensor of the node, ready to be run in `units` independent pieces.
struct Tensor {
  cpu::Run base;
  size_t size;
  Layout layout;
  size_t parameter_bytes, gradient_bytes, state_bytes;  // of an element
  cpu::Update update;
  cpu::Transpose transpose;
  size_t units;

  void run(size_t unit, AdamScalars<float> scalars, AdamConstants constants) const {
    switch (layout.kind) {
      case LayoutKind::linear:
        return run_linear(unit, scalars, constants);
      case LayoutKind::tiled:
        return run_tiled(unit, scalars, constants);
      case LayoutKind::general:
        return run_general(unit, scalars, constants);
    }
  }

  size_t row_blocks() const { return divide_up(layout.rows, kTileRows); }

 private:
  cpu::Run at(int64_t offset) const {
    return {base.parameter + offset * int64_t(parameter_bytes),
            base.gradient + offset * int64_t(gradient_bytes),
            base.m + offset * int64_t(state_bytes),
            base.v + offset * int64_t(state_bytes),
            base.new_parameter + offset * int64_t(parameter_bytes),
            base.new_m + offset * int64_t(state_bytes),
            base.new_v + offset * int64_t(state_bytes)};
  }

  void run_linear(size_t unit, AdamScalars<float> scalars, AdamConstants constants) const {
    size_t start = unit * kRun;
    update(at(int64_t(start)), std::min(kRun, size - start), scalars, constants);
  }

  void run_tiled(size_t unit, AdamScalars<float> scalars, AdamConstants constants) const {
    alignas(64) char tile[kTileRows * kTileColumns * sizeof(float)];
    size_t batch = unit / row_blocks();
    size_t row = unit % row_blocks() * kTileRows;
    size_t rows = std::min<size_t>(kTileRows, layout.rows - row);
    int64_t state_start = offset_of(int64_t(batch), layout.shape, layout.strides[0]) +
                          int64_t(row) * layout.row_stride;
    int64_t gradient_start =
        offset_of(int64_t(batch), layout.shape, layout.strides[1]) + int64_t(row);
    for (size_t column = 0; column < size_t(layout.columns); column += kTileColumns) {
      size_t columns = std::min<size_t>(kTileColumns, layout.columns - column);
      int64_t from = gradient_start + int64_t(column) * layout.gradient_column_stride;
      transpose(base.gradient + from * int64_t(gradient_bytes), layout.gradient_column_stride, rows,
                columns, tile);
      for (size_t i = 0; i < rows; ++i) {
        auto run = at(state_start + int64_t(i) * layout.row_stride + int64_t(column));
        run.gradient = tile + i * columns * gradient_bytes;
        update(run, columns, scalars, constants);
      }
    }
  }

  void run_general(size_t unit, AdamScalars<float> scalars, AdamConstants constants) const {
    alignas(64) char buffers[4][kGather * sizeof(float)];
    size_t end = std::min((unit + 1) * kRun, size);
    for (size_t start = unit * kRun; start < end; start += kGather) {
      size_t n = std::min(kGather, end - start);
      auto run = at(int64_t(start));  // the outputs are row-major whatever the inputs are
      auto bring = [&](int array, const char* from, size_t bytes) -> const char* {
        auto gather_elements = bytes == 4 ? gather<uint32_t> : gather<uint16_t>;
        gather_elements(from, layout.shape, layout.strides[array], int64_t(start), n,
                        buffers[array]);
        return buffers[array];
      };
      run.parameter = bring(0, base.parameter, parameter_bytes);
      run.gradient = bring(1, base.gradient, gradient_bytes);
      run.m = bring(2, base.m, state_bytes);
      run.v = bring(3, base.v, state_bytes);
      update(run, n, scalars, constants);
    }
  }
};

// A parameter that the forward pass has just read stays referenced until the stream's thread is past that read, and could
// not be updated in place. Waiting costs a moment of a thread that only queues work. With a GPU in the process the
// stream might itself be waiting for work that is not committed yet, so there a fresh buffer is the price.
void await_pending_readers(const std::vector<mx::array>& inputs, mx::Stream stream) {
  auto has_other_reader = [](const mx::array& x) { return x.data_shared_ptr().use_count() > 1; };
  for (size_t i = 1; i < inputs.size(); i += AdamUpdate::kInputsPerTensor) {
    if (has_other_reader(inputs[i]) && !mx::is_available(mx::Device::gpu)) {
      mx::synchronize(stream);
      return;
    }
  }
}

Tensor make_tensor(const mx::array* in, mx::array* out, cpu::Rule rule) {
  auto &parameter = in[0], &gradient = in[1], &m = in[2], &v = in[3];
  Tensor t;
  // Before the outputs are allocated: taking over a buffer does not change the input's layout.
  t.layout = layout_of(parameter, gradient, m, v);
  allocate_in_place(parameter, out[0]);
  allocate_in_place(m, out[1]);
  allocate_in_place(v, out[2]);
  t.base = {parameter.data<char>(), gradient.data<char>(), m.data<char>(), v.data<char>(),
            out[0].data<char>(),    out[1].data<char>(),   out[2].data<char>()};
  t.size = parameter.size();
  t.parameter_bytes = parameter.itemsize();
  t.gradient_bytes = gradient.itemsize();
  t.state_bytes = m.itemsize();
  auto& kernels = cpu::kernels();
  t.update = kernels.update[rule][storage_of(parameter.dtype())][storage_of(gradient.dtype())]
                           [storage_of(m.dtype())];
  t.transpose = gradient.itemsize() == 4 ? kernels.transpose_4_bytes : kernels.transpose_2_bytes;
  t.units = t.layout.kind == LayoutKind::tiled ? size_t(t.layout.batches()) * t.row_blocks()
                                               : divide_up(t.size, kRun);
  return t;
}

// Runs unit `index` of all the tensors' units taken together.
void run_unit(const std::vector<Tensor>& tensors, size_t index, AdamScalars<float> scalars,
              AdamConstants constants) {
  for (auto& tensor : tensors) {
    if (index < tensor.units) return tensor.run(index, scalars, constants);
    index -= tensor.units;
  }
}

}  // namespace

void AdamUpdate::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  release_sibling_inputs(inputs, outputs);
  await_pending_readers(inputs, stream());
  auto& encoder = mx::cpu::get_command_encoder(stream());
  auto rule = rule_ == UpdateRule::adam ? cpu::kAdam : cpu::kTraffic;
  std::vector<Tensor> tensors;
  size_t units = 0, elements = 0;
  for (size_t i = 0; i < outputs.size() / kOutputsPerTensor; ++i) {
    tensors.push_back(make_tensor(&inputs[1 + i * kInputsPerTensor],
                                  &outputs[i * kOutputsPerTensor], rule));
    units += tensors.back().units;
    elements += tensors.back().size;
  }
  for (auto& input : inputs) encoder.set_input_array(input);
  for (auto& output : outputs) encoder.set_output_array(output);
  encoder.dispatch([tensors = std::move(tensors), units, elements,
                    packed = inputs[0].data<float>(), constants = constants_] {
    AdamScalars<float> scalars{packed[0], packed[1], packed[2]};
    if (elements < kWorthThreads) {
      for (size_t i = 0; i < units; ++i) run_unit(tensors, i, scalars, constants);
    } else {
      parallel_for(units, [&](size_t i) { run_unit(tensors, i, scalars, constants); });
    }
  });
}

// Each node costs MLX a task, and each of its tensors costs time for every other: two is where the sum is least.
Backend cpu_backend() { return {"cpu", nullptr, 2}; }

}  // namespace fused_adam
