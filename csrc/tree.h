// Python's containers of gradients, parameters and states: flattened in one walk, and rebuilt from the results; and
// changes of states that can be taken back. With hundreds of small tensors, both took Python as long as the update.
#pragma once

#include <nanobind/nanobind.h>

namespace fused_adam {

// Parallel lists with one item per leaf of the gradients, in the order of mlx.utils.tree_flatten.
class Walk {
 public:
  // Throws Python's error of the missing item where parameters or states lack what the gradients have.
  Walk(nanobind::object gradients, nanobind::handle parameters, nanobind::handle states);

  nanobind::list gradients, parameters, states;
  // Whether all parameters are arrays, of dtypes that kernels store.
  bool is_fused = true;

  // The tree of the leaves' results, in containers of the gradients' types.
  nanobind::object result(const nanobind::list& leaves) const;

 private:
  void add(nanobind::handle gradient, nanobind::handle parameter, nanobind::handle state);

  nanobind::object tree_;
};

// New values of keys that states have. No signal is handled between the first change and the last.
class Changes {
 public:
  Changes(nanobind::list states, nanobind::list changed);
  void apply();
  void undo();

 private:
  void exchange();

  nanobind::list states_;
  nanobind::list changed_;  // the old values, once applied
  bool is_applied_ = false;
};

}  // namespace fused_adam
