#include "python_modules.h"

#include <array>
#include <cstdint>
#include <vector>

namespace py = pybind11;

namespace spkfast {
namespace {

PyObject* checked(PyObject* object) {
  if (object == nullptr) throw py::error_already_set();
  return object;
}

// A borrowed item of a tuple.
PyObject* item(const py::handle& tuple, Py_ssize_t index) {
  return checked(PyTuple_GetItem(tuple.ptr(), index));
}

// A borrowed value, null where there is none.
PyObject* found(PyObject* dict, PyObject* key) {
  if (!PyDict_Check(dict)) throw py::type_error("a dictionary was expected");
  PyObject* const value = PyDict_GetItemWithError(dict, key);
  if (value == nullptr && PyErr_Occurred()) throw py::error_already_set();
  return value;
}

bool is_true(PyObject* object) {
  const int truth = PyObject_IsTrue(object);
  if (truth < 0) throw py::error_already_set();
  return truth != 0;
}

// A name, made once.
template <size_t kSize>
PyObject* name(const char (&text)[kSize]) {
  return checked(PyUnicode_InternFromString(text));
}

bool is_changed(const py::list& entries, const py::list& sizes, const py::list& classes) {
  for (const py::handle pair : classes) {
    if (reinterpret_cast<PyObject*>(Py_TYPE(item(pair, 0))) != item(pair, 1)) return true;
  }
  for (const py::handle pair : sizes) {
    if (PyObject_Size(item(pair, 0)) != PyLong_AsSsize_t(item(pair, 1))) return true;
  }
  for (const py::handle entry : entries) {
    PyObject* const value = found(item(entry, 0), item(entry, 1));
    if ((value == nullptr ? Py_None : value) != item(entry, 2)) return true;
  }
  return false;
}

bool is_watched(const py::list& modules, bool evaluating) {
  static const std::array hooks = {name("_forward_hooks"), name("_forward_pre_hooks"),
                                   name("_backward_hooks"), name("_backward_pre_hooks")};
  static PyObject* const training = name("training");
  static PyObject* const forward = name("forward");
  static PyObject* const compiled = name("_compiled_call_impl");
  for (const py::handle of_module : modules) {
    for (PyObject* const kind : hooks) {
      PyObject* const values = found(of_module.ptr(), kind);
      if (values != nullptr && is_true(values)) return true;
    }
    if (evaluating) {
      PyObject* const trains = found(of_module.ptr(), training);
      if (trains != nullptr && is_true(trains)) return true;
    }
    if (found(of_module.ptr(), forward) != nullptr) return true;
    PyObject* const call = found(of_module.ptr(), compiled);
    if (call != nullptr && call != Py_None) return true;
  }
  return false;
}

py::bytes states_of(const py::list& tensors) {
  static PyObject* const version = name("_version");
  static PyObject* const data_ptr = name("data_ptr");
  std::vector<uint64_t> states;
  states.reserve(3 * tensors.size());
  for (const py::handle tensor : tensors) {
    const auto count =
        py::reinterpret_steal<py::object>(checked(PyObject_GetAttr(tensor.ptr(), version)));
    const auto place = py::reinterpret_steal<py::object>(
        checked(PyObject_CallMethodNoArgs(tensor.ptr(), data_ptr)));
    states.push_back(reinterpret_cast<uint64_t>(tensor.ptr()));
    states.push_back(PyLong_AsUnsignedLongLong(count.ptr()));
    states.push_back(PyLong_AsUnsignedLongLong(place.ptr()));
    if (PyErr_Occurred()) throw py::error_already_set();
  }
  return {reinterpret_cast<const char*>(states.data()), states.size() * sizeof(uint64_t)};
}

py::list in_training(const py::object& module) {
  static PyObject* const training = name("training");
  static PyObject* const modules = name("_modules");
  py::list trained;
  std::vector<py::object> parts = {module};
  for (size_t i = 0; i < parts.size(); ++i) {
    const py::object part = parts[i];
    const auto trains =
        py::reinterpret_steal<py::object>(checked(PyObject_GetAttr(part.ptr(), training)));
    if (is_true(trains.ptr())) trained.append(part);
    const auto inside =
        py::reinterpret_steal<py::object>(checked(PyObject_GetAttr(part.ptr(), modules)));
    for (const py::handle child : inside.attr("values")()) {
      if (!child.is_none()) parts.push_back(py::reinterpret_borrow<py::object>(child));
    }
  }
  return trained;
}

}  // namespace

void add_module_functions(py::module_& m) {
  m.def("is_changed", &is_changed, "See spkfast.nn._watch.");
  m.def("is_watched", &is_watched, "See spkfast.nn._watch.");
  m.def("states_of", &states_of, "See spkfast.nn._watch.");
  m.def("in_training", &in_training, "See spkfast.nn._watch.");
}

}  // namespace spkfast
