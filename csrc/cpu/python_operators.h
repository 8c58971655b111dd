// Calls of the Python operators, for backends other than this library.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <stdexcept>
#include <string>
#include <utility>

#include "arguments.h"

namespace reft {

inline std::atomic<bool> native_enabled{false};

// Error raised by the Python operators in this thread; the stable ABI has no exception types.
struct PythonError {
  bool is_set = false, is_argument_error = false;
  std::string text;
};
inline thread_local PythonError python_error;

// If the native backend is disabled, calls the operator of reft_kernels_python (same schema), which
// puts its results on the stack, and returns true. Rethrows an error that it reported.
inline bool forward_to_python(const char* op, StableIValue* stack, uint64_t outputs) {
  if (native_enabled.load(std::memory_order_relaxed)) return false;
  python_error = {};
  const std::string name = std::string("reft_kernels_python::") + op;
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name.c_str(), "", stack, TORCH_ABI_VERSION));
  if (!python_error.is_set) return true;
  // beside its error the operator returned empty tensors, which are owned here and dropped
  for (uint64_t i = 0; i < outputs; ++i) torch::stable::detail::to<Tensor>(stack[i]);
  const PythonError error = std::move(python_error);
  python_error = {};
  if (error.is_argument_error) throw std::invalid_argument(error.text);
  throw std::runtime_error(error.text);
}

}  // namespace reft
