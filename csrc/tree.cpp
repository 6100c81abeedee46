// See tree.h.
#include "tree.h"

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
    for (auto [key, item] : nb::borrow<nb::dict>(tree)) visit(nb::borrow(key), nb::borrow(item));
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

nb::object rebuilt(nb::handle tree, const nb::list& leaves, size_t& next) {
  Recursion recursion;
  if (nb::isinstance<nb::dict>(tree)) {
    nb::dict items;
    for_each(tree, [&](nb::object key, nb::object item) { items[key] = rebuilt(item, leaves, next); });
    return items;
  }
  if (is_sequence(tree)) {
    nb::list items;
    for_each(tree, [&](nb::object, nb::object item) { items.append(rebuilt(item, leaves, next)); });
    nb::handle kind = tree.type();
    if (kind.is(&PyList_Type)) return items;
    return nb::hasattr(kind, "_fields") ? kind(*nb::tuple(items)) : kind(items);
  }
  if (next >= leaves.size()) throw nb::index_error("[adam_update] gradients must stay as they are during the update");
  return nb::object(leaves[next++]);
}

}  // namespace

Walk::Walk(nb::object gradients, nb::handle parameters, nb::handle states) : tree_(gradients) {
  add(gradients, parameters, states);
}

void Walk::add(nb::handle gradient, nb::handle parameter, nb::handle state) {
  Recursion recursion;
  if (nb::isinstance<nb::dict>(gradient) || is_sequence(gradient)) {
    for_each(gradient,
             [&](nb::object key, nb::object item) { add(item, item_of(parameter, key), item_of(state, key)); });
    return;
  }
  const mx::array* array = nullptr;
  is_fused = is_fused && nb::try_cast(parameter, array) && array && is_plain(array->dtype());
  gradients.append(gradient);
  parameters.append(parameter);
  states.append(state);
}

nb::object Walk::result(const nb::list& leaves) const {
  size_t next = 0;
  return rebuilt(tree_, leaves, next);
}

Changes::Changes(nb::list states, nb::list changed) : states_(std::move(states)), changed_(std::move(changed)) {
  if (states_.size() != changed_.size()) throw nb::value_error("[adam_update] states must be as many as their changes");
}

void Changes::apply() {
  if (!is_applied_) exchange();
}

void Changes::undo() {
  if (is_applied_) exchange();
}

void Changes::exchange() {
  is_applied_ = !is_applied_;
  for (size_t i = 0; i < states_.size(); ++i) {
    nb::object state = states_[i], changed = changed_[i];
    for (auto [key, value] : nb::cast<nb::dict>(changed)) {
      nb::object other = nb::borrow(value), old = item_of(state, key);
      bool has_failed = PyDict_SetItem(state.ptr(), key.ptr(), other.ptr()) < 0 ||
                        PyDict_SetItem(changed.ptr(), key.ptr(), old.ptr()) < 0;
      if (has_failed) nb::raise_python_error();
    }
  }
}

}  // namespace fused_adam
