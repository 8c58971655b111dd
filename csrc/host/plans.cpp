#include "plans.h"

#include <c10/core/impl/DeviceGuardImplInterface.h>

#include <cstring>
#include <mutex>
#include <stdexcept>
#include <unordered_map>

#include "driver.h"

namespace reft::host {
namespace {

struct Hash {
  size_t operator()(const Key& key) const {
    uint64_t hash = 0xcbf29ce484222325;
    for (const int64_t word : key.words) {
      hash = (hash ^ uint64_t(word)) * 0x9e3779b97f4a7c15;
      hash ^= hash >> 29;
    }
    return size_t(hash);
  }
};

// More classes than a training run has; each holds a few hundred bytes.
constexpr size_t kMaxPlans = 4096;

std::mutex lock;
std::unordered_map<Key, std::shared_ptr<const Plan>, Hash> plans;

// Interned names of the attributes that are read for each launch.
struct Names {
  PyObject* launch = PyUnicode_InternFromString("launch");
  PyObject* original = PyUnicode_InternFromString("_original_launch");
  PyObject* stream = PyUnicode_InternFromString("_current_stream");
  PyObject* knobs = PyUnicode_InternFromString("_knobs");
  PyObject* enter = PyUnicode_InternFromString("launch_enter_hook");
  PyObject* exit = PyUnicode_InternFromString("launch_exit_hook");
  PyObject* calls = PyUnicode_InternFromString("calls");
  PyObject* before_runs = PyUnicode_InternFromString("pre_run_hooks");
};

const Names& names() {
  static const Names made;
  return made;
}

bool is_true(PyObject* object) {
  const int value = PyObject_IsTrue(object);
  if (value < 0) throw_python_error();
  return value != 0;
}

// Whether a launch hook of Triton is set: a function, or a HookChain with calls.
bool is_hook_set(PyObject* knobs, PyObject* name) {
  const Object hook(checked(PyObject_GetAttr(knobs, name)));
  if (hook.get() == Py_None) return false;
  const Object calls(PyObject_GetAttr(hook.get(), names().calls));
  if (calls) return is_true(calls.get());
  PyErr_Clear();
  return true;
}

bool has_hooks(const Plan& plan, PyObject* knobs) {
  if (is_hook_set(knobs, names().enter) || is_hook_set(knobs, names().exit)) return true;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(plan.kernels); ++i) {
    const Object hooks(
        checked(PyObject_GetAttr(PyTuple_GET_ITEM(plan.kernels, i), names().before_runs)));
    if (is_true(hooks.get())) return true;
  }
  return false;
}

int64_t integer(PyObject* object) {
  const int64_t value = PyLong_AsLongLong(object);
  if (value == -1 && PyErr_Occurred()) throw_python_error();
  return value;
}

PyObject* item(PyObject* tuple, Py_ssize_t index) {
  PyObject* found = PyTuple_GetItem(tuple, index);
  if (!found) throw_python_error();
  return found;
}

Launch launch_of(PyObject* described) {
  Launch launch{};
  launch.function = reinterpret_cast<void*>(integer(item(described, 0)));
  for (int i = 0; i < 3; ++i) launch.grid[i] = uint32_t(integer(item(described, 1 + i)));
  launch.threads = uint32_t(integer(item(described, 4)));
  launch.shared = uint32_t(integer(item(described, 5)));
  PyObject* parameters = item(described, 6);
  const Py_ssize_t count = PyTuple_Size(parameters);
  if (count < 0) throw_python_error();
  if (size_t(count) > kMaxParameters) throw std::invalid_argument("too many kernel parameters");
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* parameter = item(parameters, i);
    launch.parameters.push_back(
        {Parameter::Kind(integer(item(parameter, 0))), integer(item(parameter, 1))});
  }
  return launch;
}

}  // namespace

Plan::~Plan() {
  if (!Py_IsInitialized()) return;
  const WithGil gil;
  Py_XDECREF(kernels);
  Py_XDECREF(compiled);
}

std::shared_ptr<const Plan> find_plan(const Key& key) {
  const std::lock_guard<std::mutex> guard(lock);
  const auto found = plans.find(key);
  return found == plans.end() ? nullptr : found->second;
}

void forget_plans() {
  decltype(plans) old;  // destroyed without the lock, because that takes the GIL
  const std::lock_guard<std::mutex> guard(lock);
  old.swap(plans);
}

PyObject* add_plan(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(count == 5, "add_plan: got ", count, " arguments, expected 5");
  Key key;
  char* bytes = nullptr;
  Py_ssize_t size = 0;
  if (PyBytes_AsStringAndSize(arguments[0], &bytes, &size) != 0) throw_python_error();
  TORCH_CHECK_VALUE(size == Py_ssize_t(sizeof(key.words)), "key: got ", size, " bytes, expected ",
                    sizeof(key.words));
  std::memcpy(key.words.data(), bytes, sizeof(key.words));
  auto plan = std::make_shared<Plan>();
  plan->workspace_bytes = integer(arguments[3]);
  const Py_ssize_t launches = PyTuple_Size(arguments[4]);
  if (launches < 0) throw_python_error();
  for (Py_ssize_t i = 0; i < launches; ++i)
    plan->launches.push_back(launch_of(item(arguments[4], i)));
  TORCH_CHECK_TYPE(PyTuple_Check(arguments[1]), "kernels: expected a tuple");
  plan->kernels = Py_NewRef(arguments[1]);
  plan->compiled = Py_NewRef(arguments[2]);
  bool full = false;
  {
    const std::lock_guard<std::mutex> guard(lock);
    full = plans.size() >= kMaxPlans;
  }
  if (full) forget_plans();
  const std::lock_guard<std::mutex> guard(lock);
  plans.emplace(key, std::move(plan));
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

namespace {

// Whether Python's launchers would launch the plan as it is. Must be called with the GIL held.
bool is_repeatable(const Plan& plan) {
  PyObject* module = callbacks.launch_module;
  if (!module) return false;
  const Names& name = names();
  PyObject* launch = PyDict_GetItemWithError(module, name.launch);
  PyObject* original = PyDict_GetItemWithError(module, name.original);
  PyObject* knobs = PyDict_GetItemWithError(module, name.knobs);
  return launch && launch == original && knobs && !has_hooks(plan, knobs);
}

std::optional<void*> stream_in_python(c10::Device device) {
  const WithGil gil;
  PyObject* current_stream = PyDict_GetItemWithError(callbacks.launch_module, names().stream);
  if (!current_stream || current_stream == Py_None) return std::nullopt;
  const Object index(checked(PyLong_FromLongLong(device.index())));
  const Object stream(checked(PyObject_CallOneArg(current_stream, index.get())));
  return reinterpret_cast<void*>(PyLong_AsUnsignedLongLongMask(stream.get()));
}

void* native_stream(c10::Device device) {
  const auto* guard = c10::impl::getDeviceGuardImpl(device.type());
  return guard->getStreamNativeHandle(guard->getStream(device));
}

// Whether native_stream returns what Triton's Python code uses, which is not so where a build of
// PyTorch does not tell the handle.
bool is_native_stream_known(c10::Device device) {
  try {
    return stream_in_python(device) == native_stream(device);
  } catch (const c10::Error&) {
    return false;
  }
}

std::optional<void*> current_stream(c10::Device device) {
  if (const CurrentStream replaced = replaced_stream()) return replaced(device.index());
  if (!device.is_cuda()) return stream_in_python(device);
  // no static constant: its lock and the GIL would be taken in both orders
  static std::atomic<int> is_native{-1};
  if (is_native < 0) is_native = is_native_stream_known(device);
  return is_native ? native_stream(device) : stream_in_python(device);
}

}  // namespace

std::optional<void*> stream_for(const Plan& plan, c10::Device device, int task) {
  if (!is_driver_ready()) return std::nullopt;
  if (task < 0) {
    if (!is_repeatable(plan)) return std::nullopt;
  } else if (plan.checked_task.load(std::memory_order_relaxed) != task) {
    const WithGil gil;
    if (!is_repeatable(plan)) return std::nullopt;
    plan.checked_task.store(task, std::memory_order_relaxed);
  }
  return current_stream(device);
}

void run(const Plan& plan, void* stream, const void* const* tensors) {
  for (const Launch& one : plan.launches) {
    uint64_t values[kMaxParameters + 2];
    void* addresses[kMaxParameters + 2];
    size_t count = 0;
    for (const Parameter& parameter : one.parameters) {
      // an int32 is the first four bytes of a little-endian word
      values[count] = parameter.kind == Parameter::Kind::pointer
                          ? reinterpret_cast<uint64_t>(tensors[parameter.value])
                          : uint64_t(parameter.value);
      addresses[count] = &values[count];
      ++count;
    }
    for (int i = 0; i < 2; ++i) {  // Triton's global and profile scratch memory, unused
      values[count] = 0;
      addresses[count] = &values[count];
      ++count;
    }
    launch(one.function, one.grid, one.threads, one.shared, stream, addresses);
  }
}

}  // namespace reft::host
