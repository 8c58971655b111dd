// Calls between this library and the Python module reft_kernels.host.
#pragma once

#include <torch/csrc/python_headers.h>

#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <utility>

#include "tensors.h"

namespace reft::host {

// Owns a reference to a Python object. Must be used with the GIL held.
class Object {
 public:
  Object() = default;
  explicit Object(PyObject* owned) : object_(owned) {}
  Object(Object&& other) noexcept : object_(std::exchange(other.object_, nullptr)) {}
  Object& operator=(Object&& other) noexcept {
    std::swap(object_, other.object_);
    return *this;
  }
  Object(const Object&) = delete;
  Object& operator=(const Object&) = delete;
  ~Object() { Py_XDECREF(object_); }
  PyObject* get() const { return object_; }
  explicit operator bool() const { return object_ != nullptr; }

 private:
  PyObject* object_ = nullptr;
};

class WithGil {
 public:
  WithGil() : state_(PyGILState_Ensure()) {}
  ~WithGil() { PyGILState_Release(state_); }
  WithGil(const WithGil&) = delete;
  WithGil& operator=(const WithGil&) = delete;

 private:
  PyGILState_STATE state_;
};

class WithoutGil {
 public:
  WithoutGil() : state_(PyEval_SaveThread()) {}
  ~WithoutGil() { PyEval_RestoreThread(state_); }
  WithoutGil(const WithoutGil&) = delete;
  WithoutGil& operator=(const WithoutGil&) = delete;

 private:
  PyThreadState* state_;
};

// Throws the current Python exception as a C++ exception, which PyTorch restores.
[[noreturn]] inline void throw_python_error() {
  python_error error;
  error.persist();
  throw error;
}

inline PyObject* checked(PyObject* object) {
  if (!object) throw_python_error();
  return object;
}

inline PyObject* wrapped(const Tensor& tensor) {
  return tensor.defined() ? checked(THPVariable_Wrap(tensor)) : Py_NewRef(Py_None);
}

inline Tensor unwrapped(PyObject* object) {
  return object == Py_None ? Tensor() : THPVariable_Unpack(object);
}

// Functions of reft_kernels.host, set when it loads this library.
struct Callbacks {
  PyObject *route = nullptr, *edit = nullptr, *edit_backward = nullptr;
  PyObject* launch_module = nullptr;  // dict of reft_kernels.triton.launch, once it is imported
};
inline Callbacks callbacks;

}  // namespace reft::host
