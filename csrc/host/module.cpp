// The Python module: functions for reft_kernels/host.py.
#include <cstring>
#include <string>

#include "autograd.h"
#include "compute.h"
#include "cpu.h"
#include "driver.h"
#include "plans.h"
#include "python.h"

namespace reft::host {
namespace {

// Reads a tensor argument. Returns false for anything but None and a tensor that is no subclass.
bool read_tensor(PyObject* object, Tensor& tensor) {
  if (object == Py_None) return true;
  if (!THPVariable_CheckExact(object)) return false;
  tensor = THPVariable_Unpack(object);
  return true;
}

bool read_activation(PyObject* object, uint8_t& index) {
  static PyObject* names[std::size(kActivations)];
  if (!names[0])
    for (size_t i = 0; i < std::size(kActivations); ++i)
      names[i] = PyUnicode_InternFromString(kActivations[i]);
  for (size_t i = 0; i < std::size(kActivations); ++i)
    if (object == names[i]) return index = uint8_t(i), true;
  const char* text = PyUnicode_Check(object) ? PyUnicode_AsUTF8(object) : nullptr;
  for (size_t i = 0; text && i < std::size(kActivations); ++i)
    if (std::strcmp(text, kActivations[i]) == 0) return index = uint8_t(i), true;
  PyErr_Clear();
  return false;
}

// apply_edit(hidden, weights, chosen, activation, inplace, forward): as the function of the same
// name in reft_kernels.autograd, or None if that must serve the call. forward is None or the read
// and write matrices of the forward pass.
PyObject* py_apply_edit(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 6, "apply_edit: got ", count, " arguments, expected 6");
  PyObject *weights = arguments[1], *chosen = arguments[2];
  if (!PyTuple_Check(weights) || PyTuple_GET_SIZE(weights) != 5 || !PyTuple_Check(chosen) ||
      PyTuple_GET_SIZE(chosen) != 3)
    Py_RETURN_NONE;
  Edit edit;
  if (!read_tensor(arguments[0], edit.hidden) || !edit.hidden.defined() ||
      !read_tensor(PyTuple_GET_ITEM(weights, 0), edit.read) ||
      !read_tensor(PyTuple_GET_ITEM(weights, 1), edit.read_bias) ||
      !read_tensor(PyTuple_GET_ITEM(weights, 2), edit.write) || !edit.write.defined() ||
      !read_tensor(PyTuple_GET_ITEM(weights, 3), edit.subtract_bias) ||
      !read_tensor(PyTuple_GET_ITEM(chosen, 0), edit.rows) ||
      !read_tensor(PyTuple_GET_ITEM(chosen, 1), edit.weight_ids) ||
      !read_tensor(PyTuple_GET_ITEM(chosen, 2), edit.coeff) ||
      !read_activation(arguments[3], edit.settings.activation))
    Py_RETURN_NONE;
  PyObject* forward = arguments[5];
  if (forward != Py_None && (!read_tensor(PyTuple_GET_ITEM(forward, 0), edit.forward_read) ||
                             !read_tensor(PyTuple_GET_ITEM(forward, 1), edit.forward_write)))
    Py_RETURN_NONE;
  edit.settings.subtract_projection = PyTuple_GET_ITEM(weights, 4) == Py_True;
  edit.in_place = arguments[4] == Py_True;
  try {
    const Tensor out = apply_edit(edit, PyTuple_GET_ITEM(chosen, 0));
    if (!out.defined()) Py_RETURN_NONE;
    return edit.in_place ? Py_NewRef(arguments[0]) : THPVariable_Wrap(out);
  } catch (const std::invalid_argument& error) {  // from the native CPU library
    PyErr_SetString(PyExc_ValueError, error.what());
    return nullptr;
  }
  END_HANDLE_TH_ERRORS
}

// set_callbacks(route, edit, edit_backward)
PyObject* set_callbacks(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 3, "set_callbacks: got ", count, " arguments, expected 3");
  callbacks.route = Py_NewRef(arguments[0]);
  callbacks.edit = Py_NewRef(arguments[1]);
  callbacks.edit_backward = Py_NewRef(arguments[2]);
  measure_reference_counts();
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// set_cpu_kernels(address): of the CPU library's function reft_kernels_cpu_direct; 0: none.
PyObject* py_set_cpu_kernels(PyObject*, PyObject* address) {
  HANDLE_TH_ERRORS
  const unsigned long long value = PyLong_AsUnsignedLongLong(address);
  if (PyErr_Occurred()) throw_python_error();
  set_cpu_kernels(reinterpret_cast<const void*>(value));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// reset(): forgets the routes and plans, because the backend may have changed.
PyObject* reset(PyObject*, PyObject*) {
  HANDLE_TH_ERRORS
  reset_routes();
  forget_plans();
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// replace_driver(launch, stream): addresses of a function with the signature of cuLaunchKernel and
// of one that returns the current stream of a device; 0: the driver's own.
PyObject* py_replace_driver(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 2, "replace_driver: got ", count, " arguments, expected 2");
  const unsigned long long function = PyLong_AsUnsignedLongLong(arguments[0]);
  if (PyErr_Occurred()) throw_python_error();
  const unsigned long long stream = PyLong_AsUnsignedLongLong(arguments[1]);
  if (PyErr_Occurred()) throw_python_error();
  replace_driver(reinterpret_cast<LaunchKernel>(function),
                 reinterpret_cast<CurrentStream>(stream));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

// launch_nothing(): the arguments of replace_driver that launch nothing.
PyObject* py_launch_nothing(PyObject*, PyObject*) {
  return Py_BuildValue("KK", (unsigned long long)reinterpret_cast<uintptr_t>(launch_nothing()),
                       (unsigned long long)reinterpret_cast<uintptr_t>(default_stream()));
}

PyObject* poison_memory(PyObject*, PyObject* wanted) {
  poison_outputs = wanted == Py_True;
  Py_RETURN_NONE;
}

template <class Function>
PyCFunction function(Function* pointer) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(pointer));
}

PyMethodDef methods[] = {
    {"apply_edit", function(py_apply_edit), METH_FASTCALL, nullptr},
    {"set_callbacks", function(set_callbacks), METH_FASTCALL, nullptr},
    {"add_plan", function(add_plan), METH_FASTCALL, nullptr},
    {"set_cpu_kernels", function(py_set_cpu_kernels), METH_O, nullptr},
    {"reset", function(reset), METH_NOARGS, nullptr},
    {"replace_driver", function(py_replace_driver), METH_FASTCALL, nullptr},
    {"launch_nothing", function(py_launch_nothing), METH_NOARGS, nullptr},
    {"poison_memory", function(poison_memory), METH_O, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native_host", nullptr, -1, methods,
                          nullptr,               nullptr,        nullptr, nullptr};

}  // namespace
}  // namespace reft::host

extern "C" __attribute__((visibility("default"))) PyObject* PyInit__native_host() {
  return PyModule_Create(&reft::host::definition);
}
