// The sum of squares on the CPU: cut into units whose sums are added up in order, so that threads change no bit.
#include "op/grad_norm.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "cpu/gather.h"
#include "cpu/kernels.h"
#include "cpu/threads.h"
#include "mlx/backend/cpu/encoder.h"
#include "op/allocate.h"
#include "op/formats.h"
#include "op/layout.h"

namespace fused_adam {

namespace mx = mlx::core;

namespace {

// Elements of a unit, and pieces of one where the gradient's elements do not follow each other in memory.
constexpr size_t kRun = 1 << 16;
constexpr size_t kPiecesPerUnit = 32;
// As for updates: below, waking another thread costs more than it saves. A sum reads a quarter of what an update moves.
constexpr size_t kWorthThreads = 1 << 17;

class GradientSum {
 public:
  explicit GradientSum(const mx::array& gradient)
      : values_(gradient.data<char>()),
        size_(gradient.size()),
        bytes_(gradient.itemsize()),
        format_(format_of(gradient.dtype())) {
    auto layout = layout_of_one(gradient);
    is_linear_ = layout.kind == LayoutKind::linear;
    if (is_linear_) {
      units_ = divide_up(size_, kRun);
      return;
    }
    bool gathered[cpu::kArrays] = {true};
    pieces_ = cpu::GatherPieces(layout, gathered, 1);
    units_ = divide_up(pieces_.count(), kPiecesPerUnit);
  }

  size_t size() const { return size_; }
  size_t units() const { return units_; }

  double run(size_t unit) const {
    auto& kernels = cpu::kernels();
    if (is_linear_) {
      size_t start = unit * kRun;
      return kernels.sum_of_squares({values_ + start * bytes_}, format_, std::min(kRun, size_ - start));
    }
    alignas(64) char gathered[cpu::GatherPieces::kMost * sizeof(float)];
    auto gather = bytes_ == sizeof(float) ? kernels.gather_4_bytes : kernels.gather_2_bytes;
    size_t end = std::min((unit + 1) * kPiecesPerUnit, pieces_.count());
    double sum = 0.0;
    for (size_t i = unit * kPiecesPerUnit; i < end; ++i) {
      auto piece = pieces_[i];
      gather(values_ + piece.offsets[0] * int64_t(bytes_), pieces_.table(0), piece.size, gathered);
      sum += kernels.sum_of_squares({gathered}, format_, piece.size);
    }
    return sum;
  }

 private:
  const char* values_;
  size_t size_;
  size_t bytes_;
  Format format_;
  bool is_linear_;
  cpu::GatherPieces pieces_;
  size_t units_;
};

float as_float(double sum) {
  return sum > std::numeric_limits<float>::max() ? std::numeric_limits<float>::infinity() : float(sum);
}

}  // namespace

void SumOfSquares::eval_cpu(const std::vector<mx::array>& inputs, std::vector<mx::array>& outputs) {
  allocate(outputs[0]);
  auto& encoder = mx::cpu::get_command_encoder(stream());
  std::vector<GradientSum> gradients;
  std::vector<size_t> first_units;
  size_t units = 0, size = 0;
  for (auto& input : inputs) {
    if (input.size() == 0) continue;
    encoder.set_input_array(input);
    first_units.push_back(units);
    gradients.emplace_back(input);
    units += gradients.back().units();
    size += input.size();
  }
  encoder.set_output_array(outputs[0]);
  encoder.dispatch([gradients = std::move(gradients), first_units = std::move(first_units),
                    sums = std::vector<double>(units), size, result = outputs[0].data<float>()]() mutable {
    // From the last to the first: the update that follows begins with what was read last.
    auto run = [&](size_t i_from_end) {
      size_t unit = sums.size() - 1 - i_from_end;
      size_t i = std::upper_bound(first_units.begin(), first_units.end(), unit) - first_units.begin() - 1;
      sums[unit] = gradients[i].run(unit - first_units[i]);
    };
    if (size < kWorthThreads) {
      for (size_t i = 0; i < sums.size(); ++i) run(i);
    } else {
      parallel_for(sums.size(), run);
    }
    double total = 0.0;
    for (double sum : sums) total += sum;
    *result = as_float(total);
  });
}

}  // namespace fused_adam
