// The update of one tensor on the CPU, cut into units that threads may take in any order: which run of elements or tile
// goes to which kernel.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#include "cpu/gather.h"
#include "cpu/kernels.h"
#include "mlx/array.h"
#include "op/adam_update.h"
#include "op/layout.h"

namespace fused_adam::cpu {

class TensorUpdate {
 public:
  // Allocates the outputs, in place where nobody else holds the input.
  TensorUpdate(const NodeTensor& tensor, const TensorFormats& formats);

  // Sets how the results of one step are rounded; to nearest without.
  void round(const RoundingRequest& request, uint32_t step, uint32_t number);

  // Lets `update_unit` leave parameter, m and v as they are.
  void keep() { update_ = kernels().keep; }

  // Cost, as the number of row-major elements that cost as much.
  size_t cost() const;
  size_t units() const { return units_; }
  void update_unit(size_t unit, AdamScalars<float> scalars, AdamConstants constants) const;

 private:
  // A matrix is cut by a grid that begins before it by the shifts. `matrices` of them lie in a tile beside each other,
  // where they make up whole rows.
  struct Tiles {
    size_t rows, columns, down, across, row_shift, column_shift, matrices;
  };

  void update_linear(size_t unit, AdamScalars<float>, AdamConstants) const;
  void update_tile(size_t unit, AdamScalars<float>, AdamConstants) const;
  void update_general(size_t unit, AdamScalars<float>, AdamConstants) const;
  // Updates n elements from the tensor's `first` on, row by row where rows matter.
  void update(RunPointers run, size_t first, size_t n, AdamScalars<float>, AdamConstants) const;
  size_t linear_unit() const;
  void cut_into_tiles();
  // The pointers moved on, those of the gradient by another number of elements than those of the state.
  RunPointers at(int64_t state_offset, int64_t gradient_offset) const;

  std::shared_ptr<mlx::core::array::Data> held_[Role::kCount];  // what the task reads
  Layout layout_;
  Tiles tiles_;                                 // of a tiled layout
  std::unique_ptr<const GatherPieces> pieces_;  // of a general layout
  RunPointers base_;
  size_t size_;
  // Elements after which blocks of quantized state begin anew; the whole tensor where nothing does.
  size_t row_;
  size_t parameter_bytes_, gradient_bytes_, state_bytes_;  // of an element
  Update update_;
  TensorFormats formats_;
  TensorRounding rounding_{};
  Transpose transpose_;
  Gather gather_[kArrays];
  size_t units_;
};

}  // namespace fused_adam::cpu
