// See tree.h.
#include "tree.h"

#include <algorithm>
#include <utility>

#include "mlx/array.h"
#include "op/formats.h"

namespace nb = nanobind;
namespace mx = mlx::core;

namespace fused_adam {

namespace {

// Makes a tree that holds itself Python's RecursionError.
struct Recursion {
  Recursion() {
    if (Py_EnterRecursiveCall(" in a tree of gradients")) nb::raise_python_error();
  }
  ~Recursion() { Py_LeaveRecursiveCall(); }
};

bool is_sequence(nb::handle tree) { return nb::isinstance<nb::list>(tree) || nb::isinstance<nb::tuple>(tree); }

// Calls visit(key, item) for all of a dict, list or tuple.
template <typename Visit>
void for_each(nb::handle tree, Visit visit) {
  if (PyDict_CheckExact(tree.ptr())) {
    Py_ssize_t size = PyDict_Size(tree.ptr());
    for (auto [key, item] : nb::borrow<nb::dict>(tree)) {
      visit(nb::borrow(key), nb::borrow(item));
      if (PyDict_Size(tree.ptr()) != size) {
        PyErr_SetString(PyExc_RuntimeError, "dictionary changed size during iteration");
        nb::raise_python_error();
      }
    }
  } else if (nb::isinstance<nb::dict>(tree)) {
    for (nb::handle pair : tree.attr("items")()) visit(nb::object(pair[0]), nb::object(pair[1]));
  } else {
    size_t index = 0;
    for (nb::handle item : tree) visit(nb::int_(index++), nb::borrow(item));
  }
}

nb::object item_of(nb::handle tree, nb::handle key) {
  PyObject* item = PyObject_GetItem(tree.ptr(), key.ptr());
  if (!item) nb::raise_python_error();
  return nb::steal(item);
}

}  // namespace

Walk::Walk(nb::object gradients, nb::handle parameters, nb::handle states) {
  add(nb::none(), gradients, parameters, states);
}

void Walk::add(nb::object key, nb::handle gradient, nb::handle parameter, nb::handle state) {
  Recursion recursion;
  size_t place = nodes_.size();
  nodes_.push_back({std::move(key), {}, 0});
  bool is_dict = nb::isinstance<nb::dict>(gradient);
  if (is_dict || is_sequence(gradient)) {
    size_t count = 0;
    for_each(gradient, [&](nb::object inner, nb::object item) {
      nb::object parameters_of_it = item_of(parameter, inner), states_of_it = item_of(state, inner);
      add(std::move(inner), item, parameters_of_it, states_of_it);
      ++count;
    });
    nodes_[place].kind = nb::borrow(is_dict ? nb::handle((PyObject*)&PyDict_Type) : gradient.type());
    nodes_[place].count = count;
    return;
  }
  const mx::array* array = nullptr;
  is_fused = is_fused && nb::try_cast(parameter, array) && array && is_plain(array->dtype());
  gradients.append(gradient);
  parameters.append(parameter);
  states.append(state);
}

nb::object Walk::result(const nb::list& leaves) const {
  if (leaves.size() != gradients.size()) throw nb::value_error("[adam_update] results must be as many as the leaves");
  const Node* node = nodes_.data();
  size_t leaf = 0;
  return rebuilt(node, leaves, leaf);
}

// Moves `node` behind the container, or leaf, that it returns.
nb::object Walk::rebuilt(const Node*& node, const nb::list& leaves, size_t& leaf) const {
  const Node& here = *node++;
  if (!here.kind) return nb::object(leaves[leaf++]);
  if (here.kind.is(&PyDict_Type)) {
    nb::dict items;
    for (size_t i = 0; i < here.count; ++i) {
      nb::object key = node->key;
      items[key] = rebuilt(node, leaves, leaf);
    }
    return items;
  }
  nb::list items;
  for (size_t i = 0; i < here.count; ++i) items.append(rebuilt(node, leaves, leaf));
  if (here.kind.is(&PyList_Type)) return items;
  return nb::hasattr(here.kind, "_fields") ? here.kind(*nb::tuple(items)) : here.kind(items);
}

Changes::Changes(nb::list states, nb::list changed) : states_(std::move(states)), changed_(std::move(changed)) {
  if (states_.size() != changed_.size()) throw nb::value_error("[adam_update] states must be as many as their changes");
}

void Changes::apply() {
  if (is_applied_) return;
  exchange_all(false);
  is_applied_ = true;
}

// In reverse, as two of the states may be one dict.
void Changes::undo() {
  if (!is_applied_) return;
  exchange_all(true);
  is_applied_ = false;
}

// NotImplemented stands for a value that is not there.
void Changes::exchange(size_t state, nb::handle key) {
  nb::handle absent(Py_NotImplemented);
  nb::object values = states_[state], others = changed_[state], other = item_of(others, key);
  PyObject* found = PyObject_GetItem(values.ptr(), key.ptr());
  if (!found && !PyErr_ExceptionMatches(PyExc_KeyError)) nb::raise_python_error();
  PyErr_Clear();
  nb::object old = found ? nb::steal(found) : nb::borrow(absent);
  bool has_failed = other.is(absent) ? PyObject_DelItem(values.ptr(), key.ptr()) < 0
                                     : PyObject_SetItem(values.ptr(), key.ptr(), other.ptr()) < 0;
  if (has_failed || PyDict_SetItem(others.ptr(), key.ptr(), old.ptr()) < 0) nb::raise_python_error();
}

void Changes::exchange_all(bool in_reverse) {
  std::vector<std::pair<size_t, nb::object>> places;
  for (size_t i = 0; i < states_.size(); ++i) {
    for (auto [key, value] : nb::cast<nb::dict>(changed_[i])) places.emplace_back(i, nb::borrow(key));
  }
  if (in_reverse) std::reverse(places.begin(), places.end());
  size_t done = 0;
  try {
    for (; done < places.size(); ++done) exchange(places[done].first, places[done].second);
  } catch (...) {
    while (done-- > 0) {
      try {
        exchange(places[done].first, places[done].second);
      } catch (...) {
        // The first error is the one to tell; the other states are restored nevertheless.
      }
    }
    throw;
  }
}

}  // namespace fused_adam
