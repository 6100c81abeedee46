// Python's containers of gradients, parameters and states: flattened in one walk, and rebuilt from the results; and
// changes of states that can be taken back. With hundreds of small tensors, both took Python as long as the update.
#pragma once

#include <nanobind/nanobind.h>

#include <vector>

namespace fused_adam {

// Parallel lists with one item per leaf of the gradients, in the order of mlx.utils.tree_flatten.
class Walk {
 public:
  // Throws Python's error of the missing item where parameters or states lack what the gradients have.
  Walk(nanobind::object gradients, nanobind::handle parameters, nanobind::handle states);

  nanobind::list gradients, parameters, states;
  // Whether all parameters are arrays, of dtypes that kernels store.
  bool is_fused = true;

  // The tree of the leaves' results, in containers of the gradients' types as they were found.
  nanobind::object result(const nanobind::list& leaves) const;

 private:
  // A container or leaf, in the order of the walk.
  struct Node {
    nanobind::object key;   // in the container around it
    nanobind::object kind;  // the type of the container; null for a leaf
    size_t count;           // of its items
  };

  void add(nanobind::object key, nanobind::handle gradient, nanobind::handle parameter, nanobind::handle state);
  nanobind::object rebuilt(const Node*& node, const nanobind::list& leaves, size_t& leaf) const;

  std::vector<Node> nodes_;
};

// New values in states, which are mappings. No signal is handled between the first change of dicts and the last.
class Changes {
 public:
  Changes(nanobind::list states, nanobind::list changed);
  // Both change all states or, where one raises an error, none.
  void apply();
  void undo();

 private:
  void exchange(size_t state, nanobind::handle key);
  void exchange_all(bool in_reverse);

  nanobind::list states_;
  nanobind::list changed_;  // the old values, once applied
  bool is_applied_ = false;
};

}  // namespace fused_adam
