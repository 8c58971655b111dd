// Plans: the kernel launches of one class of calls, as the Python launchers made them once.
//
// The first call of a class runs in Python (reft_kernels/triton), which chooses and compiles the
// kernels. It is recorded: the compiled kernels, their grids and integers, and for each pointer the
// tensor that it belongs to. Later calls of the class repeat the launches with their own tensors.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <optional>
#include <string_view>
#include <vector>

#include "python.h"

namespace reft::host {

// Everything that the Python launchers and Triton's specialization depend on.
struct Key {
  std::array<int64_t, 8> words{};
  bool operator==(const Key& other) const { return words == other.words; }
};

struct Parameter {
  enum class Kind : uint8_t { pointer, int32, int64 } kind;
  int64_t value;  // of an integer; the index of a pointer's tensor
};

struct Launch {
  void* function;
  uint32_t grid[3], threads, shared;
  std::vector<Parameter> parameters;
};

constexpr size_t kMaxParameters = 40;

struct Plan {
  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan();
  std::vector<Launch> launches;
  int64_t workspace_bytes = 0;
  PyObject* kernels = nullptr;  // tuple of Triton's JIT functions
  PyObject* compiled = nullptr;  // keeps the compiled kernels loaded
  mutable std::atomic<int> checked_task{-1};  // the last backward pass that found no hooks
};

std::shared_ptr<const Plan> find_plan(const Key& key);
void forget_plans();

// add_plan(key, kernels, compiled, workspace_bytes, launches) of the Python module; a launch is
// (function, x, y, z, threads, shared, parameters), a parameter (kind, value).
PyObject* add_plan(PyObject*, PyObject* const* arguments, Py_ssize_t count);

// The current stream of a device. Nothing if the launches must run in Python: because a launch hook
// of Triton is installed, Python's launch function is replaced, or no driver is ready. This is
// looked up once in each backward pass, of which task is the number, and in each call without one,
// where task is -1. The GIL must be held if task is -1.
std::optional<void*> stream_for(const Plan& plan, c10::Device device, int task);

// Runs the launches; tensors holds the addresses of the plan's tensors.
void run(const Plan& plan, void* stream, const void* const* tensors);

}  // namespace reft::host
