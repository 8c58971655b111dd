#include "compute.h"

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/_unsafe_view.h>
#include <c10/core/DeviceGuard.h>

#include <mutex>
#include <string>
#include <utility>

#include "cpu.h"
#include "layout.h"
#include "plans.h"

namespace reft::host {
namespace {

// ---- routes

std::atomic<Route> routes[2][4];  // by device type and dtype
std::atomic<uint64_t> resets{0};

std::atomic<Route>* route_entry(const Tensor& tensor) {
  int dtype = 0;
  switch (tensor.scalar_type()) {
    case at::kFloat: dtype = 0; break;
    case at::kBFloat16: dtype = 1; break;
    case at::kHalf: dtype = 2; break;
    case at::kDouble: dtype = 3; break;
    default: return nullptr;
  }
  if (tensor.is_cpu()) return &routes[0][dtype];
  return tensor.is_cuda() ? &routes[1][dtype] : nullptr;
}

// ---- the native CPU library's operators

c10::OperatorHandle operator_of(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "");
}

c10::IValue optional(const Tensor& tensor) {
  return tensor.defined() ? c10::IValue(tensor) : c10::IValue();
}

const c10::IValue& activation_value(uint8_t index) {
  static const std::vector<c10::IValue> values(std::begin(kActivations), std::end(kActivations));
  return values[index];
}


const Tensor& nothing(at::ScalarType dtype) {
  static const Tensor single = at::empty({0}, at::kFloat), twice = at::empty({0}, at::kDouble);
  return dtype == at::kDouble ? twice : single;
}

Tensor shaped(Tensor out, const Tensor& like) {
  return out.dim() == like.dim() ? std::move(out) : at::_unsafe_view(out, like.sizes());
}

Edited edit_on_cpu(const Edit& e) {
  static const c10::OperatorHandle copying = operator_of("reft_kernels::edit"),
                                   writing = operator_of("reft_kernels::edit_");
  torch::jit::Stack stack;
  stack.reserve(11);
  stack.emplace_back(as_rows(e.hidden));
  for (const Tensor* tensor : {&e.rows, &e.weight_ids, &e.read, &e.read_bias})
    stack.push_back(optional(*tensor));
  stack.emplace_back(e.write);
  stack.push_back(optional(e.subtract_bias));
  stack.push_back(optional(e.coeff));
  stack.emplace_back(e.settings.subtract_projection);
  stack.push_back(activation_value(e.settings.activation));
  stack.emplace_back(e.save);
  (e.in_place ? writing : copying).redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                   &stack);
  Edited result;
  size_t next = 0;
  result.out = e.in_place ? e.hidden : shaped(stack[next++].toTensor(), e.hidden);
  if (e.save) {
    result.saved_input = e.rows.defined() ? stack[next].toTensor() : Tensor();
    result.u = stack[next + 1].toTensor();
    result.z = e.settings.activation ? stack[next + 2].toTensor() : Tensor();
  }
  return result;
}

Gradients backward_on_cpu(const Backward& b) {
  static const c10::OperatorHandle copying = operator_of("reft_kernels::edit_backward"),
                                   writing = operator_of("reft_kernels::edit_backward_");
  torch::jit::Stack stack;
  stack.reserve(13);
  stack.emplace_back(as_rows(b.grad));
  stack.emplace_back(b.saved_input);
  stack.emplace_back(b.u);
  stack.emplace_back(b.z.defined() ? b.z : nothing(b.u.scalar_type()));
  for (const Tensor* tensor : {&b.rows, &b.weight_ids, &b.read})
    stack.push_back(optional(*tensor));
  stack.emplace_back(b.write);
  stack.push_back(optional(b.coeff));
  stack.emplace_back(b.settings.subtract_projection);
  stack.push_back(activation_value(b.settings.activation));
  if (!b.in_place) stack.emplace_back(b.need_hidden);
  stack.emplace_back(b.need_weights);
  (b.in_place ? writing : copying).redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU),
                                                   &stack);
  Gradients result;
  size_t next = 0;
  if (b.in_place) {
    result.hidden = b.grad;
  } else {
    Tensor hidden = stack[next++].toTensor();
    if (b.need_hidden) result.hidden = shaped(std::move(hidden), b.grad);
  }
  if (b.need_weights) {
    if (b.read.defined()) result.read = stack[next].toTensor();
    result.read_bias = stack[next + 1].toTensor();
    result.write = stack[next + 2].toTensor();
    if (b.settings.subtract_projection) result.subtract_bias = stack[next + 3].toTensor();
  }
  if (b.coeff.defined()) result.coeff = stack[next + 4].toTensor();
  return result;
}

// ---- Python

PyObject* activation_name(uint8_t index) {
  static PyObject* names[std::size(kActivations)];
  if (!names[index]) names[index] = checked(PyUnicode_InternFromString(kActivations[index]));
  return names[index];
}

Object key_bytes(const Key* key) {
  if (!key) return Object(Py_NewRef(Py_None));
  const auto* bytes = reinterpret_cast<const char*>(key->words.data());
  return Object(checked(PyBytes_FromStringAndSize(bytes, sizeof(key->words))));
}

// Calls a function with a key, tensors and settings; returns a tuple of tensors or None.
Object call_python(PyObject* function, const Key* key, std::initializer_list<const Tensor*> tensors,
                   const Settings& settings, std::initializer_list<bool> flags) {
  std::vector<Object> owned;
  owned.push_back(key_bytes(key));
  for (const Tensor* tensor : tensors) owned.emplace_back(wrapped(*tensor));
  owned.emplace_back(PyBool_FromLong(settings.subtract_projection));
  owned.emplace_back(Py_NewRef(activation_name(settings.activation)));
  for (const bool flag : flags) owned.emplace_back(PyBool_FromLong(flag));
  std::vector<PyObject*> arguments;
  for (const Object& object : owned) arguments.push_back(object.get());
  return Object(
      checked(PyObject_Vectorcall(function, arguments.data(), arguments.size(), nullptr)));
}

Edited edit_in_python(const Edit& e, const Key* key) {
  const Tensor hidden = as_rows(e.hidden);
  const Object result = call_python(
      callbacks.edit, key,
      {&hidden, &e.rows, &e.weight_ids, &e.read, &e.read_bias, &e.write, &e.subtract_bias,
       &e.coeff},
      e.settings, {e.save, e.in_place});
  const auto entry = [&](Py_ssize_t i) { return unwrapped(PyTuple_GET_ITEM(result.get(), i)); };
  return {e.in_place ? e.hidden : shaped(entry(0), e.hidden), entry(1), entry(2), entry(3)};
}

Gradients backward_in_python(const Backward& b, const Key* key) {
  const WithGil gil;
  const Tensor grad = as_rows(b.grad);
  const Object result =
      call_python(callbacks.edit_backward, key,
                  {&grad, &b.saved_input, &b.u, &b.z, &b.rows, &b.weight_ids, &b.read, &b.write,
                   &b.coeff},
                  b.settings, {b.in_place, b.need_hidden, b.need_weights});
  const auto entry = [&](Py_ssize_t i) { return unwrapped(PyTuple_GET_ITEM(result.get(), i)); };
  Gradients grads{entry(0), entry(1), entry(2), entry(3), entry(4), entry(5)};
  if (b.in_place)
    grads.hidden = b.grad;
  else if (b.need_hidden)
    grads.hidden = shaped(grads.hidden, b.grad);
  return grads;
}

// ---- Triton kernels

constexpr int64_t kLargeMemory = int64_t(1) << 31;

// Builds a key; tensors are given in one fixed order for each kind of call.
class KeyBuilder {
 public:
  KeyBuilder(bool backward, const Tensor& like, std::initializer_list<bool> flags,
             const Settings& settings) {
    int64_t bits = settings.activation;
    for (const bool flag : flags) bits = bits << 1 | int64_t(flag);
    key_.words[0] = bits << 2 | int64_t(settings.subtract_projection) << 1 | int64_t(backward);
    key_.words[3] = int64_t(like.device().type()) << 16 | int64_t(uint8_t(like.device().index()));
  }
  // dtype, alignment and, for AMD GPUs, whether the storage is smaller than 2 GiB
  void add(const Tensor& tensor) {
    int64_t dtype = 0, state = 0;
    if (tensor.defined()) {
      dtype = int64_t(tensor.scalar_type()) + 1;
      const bool aligned = (reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) & 15) == 0;
      state = int64_t(aligned) << 1 | int64_t(tensor.storage().nbytes() < (size_t(1) << 31));
    }
    key_.words[1] = key_.words[1] << 8 | dtype;
    key_.words[2] = key_.words[2] << 2 | state;
  }
  Key with_sizes(const Sizes& sizes) {
    key_.words[4] = sizes.num_rows, key_.words[5] = sizes.d;
    key_.words[6] = sizes.entries, key_.words[7] = sizes.rank;
    return key_;
  }

 private:
  Key key_;
};

const void* address(const Tensor& tensor) {
  return tensor.defined() ? tensor.const_data_ptr() : nullptr;
}

Edited edit_on_gpu(const Edit& e) {
  const Sizes sizes = sizes_of(e.hidden, e.rows, e.write);
  KeyBuilder builder(false, e.hidden, {e.in_place, e.save, e.rows.defined()}, e.settings);
  for (const Tensor* tensor :
       {&e.hidden, &e.rows, &e.read, &e.read_bias, &e.write, &e.subtract_bias, &e.coeff})
    builder.add(*tensor);
  const Key key = builder.with_sizes(sizes);
  const std::shared_ptr<const Plan> plan = find_plan(key);
  const c10::OptionalDeviceGuard guard(e.hidden.is_cuda() ? std::optional(e.hidden.device())
                                                          : std::nullopt);
  const std::optional<void*> stream =
      plan ? stream_for(*plan, e.hidden.device(), -1) : std::nullopt;
  // larger memory is another class of arguments for Triton on AMD GPUs
  if (!stream || saved_bytes(e, sizes) >= kLargeMemory)
    return edit_in_python(e, plan ? nullptr : &key);
  Edited result = new_results(e, sizes);
  c10::Storage workspace;  // partial sums between two launches
  if (plan->workspace_bytes) workspace = new_memory(plan->workspace_bytes, e.hidden);
  const void* tensors[] = {address(e.hidden),        address(result.out), address(e.rows),
                           address(e.read),          address(e.read_bias), address(e.write),
                           address(e.subtract_bias), address(e.coeff),
                           address(result.saved_input),
                           address(result.u),        address(result.z),
                           workspace ? workspace.data() : nullptr};
  const WithoutGil released;  // the driver waits if its queue is full
  run(*plan, *stream, tensors);
  return result;
}

Gradients backward_on_gpu(const Backward& b) {
  const Sizes sizes = sizes_of(b.grad, b.rows, b.write);
  KeyBuilder builder(true, b.grad,
                     {b.in_place, b.need_hidden, b.need_weights, b.rows.defined()}, b.settings);
  for (const Tensor* tensor :
       {&b.grad, &b.saved_input, &b.u, &b.z, &b.rows, &b.read, &b.write, &b.coeff})
    builder.add(*tensor);
  const Key key = builder.with_sizes(sizes);
  const std::shared_ptr<const Plan> plan = find_plan(key);
  const c10::OptionalDeviceGuard guard(b.grad.is_cuda() ? std::optional(b.grad.device())
                                                        : std::nullopt);
  std::optional<void*> stream;
  if (plan) {
    std::optional<WithGil> gil;
    if (b.task < 0) gil.emplace();
    stream = stream_for(*plan, b.grad.device(), b.task);
  }
  if (!stream || gradient_bytes(b, sizes) >= kLargeMemory)
    return backward_in_python(b, plan ? nullptr : &key);
  Gradients grads = new_gradients(b, sizes);
  const c10::Storage workspace = new_memory(plan->workspace_bytes, b.grad);
  const void* tensors[] = {address(b.grad),         address(grads.hidden),
                           address(b.saved_input),  address(b.u),
                           address(b.z),            address(b.rows),
                           address(b.read),         address(b.write),
                           address(b.coeff),        workspace.data(),
                           address(grads.read),     address(grads.read_bias),
                           address(grads.write),    address(grads.subtract_bias),
                           address(grads.coeff)};
  run(*plan, *stream, tensors);
  return grads;
}

// Whether the values of rows were checked for [0, num_rows): reft_kernels.checks.are_rows_known.
bool are_rows_known(const Tensor& rows, PyObject* object, int64_t num_rows) {
  static PyObject* const checked_name = PyUnicode_InternFromString("_reft_checked");
  static PyObject* const asserted_name = PyUnicode_InternFromString("_reft_asserted");
  if (rows.is_inference()) return false;
  const auto entry = [](const Object& mark, Py_ssize_t i) {
    return PyLong_AsLongLong(PyTuple_GET_ITEM(mark.get(), i));
  };
  const Object mark(PyObject_GetAttr(object, checked_name));
  if (!mark) PyErr_Clear();
  if (mark && PyTuple_Check(mark.get()) && PyTuple_GET_SIZE(mark.get()) == 2 &&
      entry(mark, 0) <= num_rows)
    return entry(mark, 1) == int64_t(rows._version());
  if (!rows.is_cuda()) return false;
  const Object asserted(PyObject_GetAttr(object, asserted_name));
  if (!asserted) PyErr_Clear();
  return asserted && PyTuple_Check(asserted.get()) && PyTuple_GET_SIZE(asserted.get()) == 3 &&
         entry(asserted, 0) == -1 && entry(asserted, 1) == num_rows &&
         entry(asserted, 2) == int64_t(rows._version());
}

}  // namespace

Route route_of(const Tensor& tensor) {
  std::atomic<Route>* entry = route_entry(tensor);
  if (!entry) return Route::python;
  const Route known = entry->load(std::memory_order_acquire);
  if (known != Route::unknown) return known;
  const WithGil gil;
  const uint64_t before = resets;
  const Object object(wrapped(tensor));
  const Object result(checked(PyObject_CallOneArg(callbacks.route, object.get())));
  const Route route = Route(PyLong_AsLong(result.get()));
  if (route == Route::triton) {
    const Object module(checked(PyImport_ImportModule("reft_kernels.triton.launch")));
    if (!callbacks.launch_module)
      callbacks.launch_module = Py_NewRef(PyModule_GetDict(module.get()));
  }
  // another thread may have changed the backend
  if (resets == before) entry->store(route, std::memory_order_release);
  return route;
}

void reset_routes() {
  ++resets;
  for (auto& by_dtype : routes)
    for (std::atomic<Route>& entry : by_dtype) entry = Route::unknown;
}

bool is_valid_on_gpu(const Edit& e, PyObject* rows) {
  if (!has_valid_layout(e)) return false;
  return !e.rows.defined() ||
         are_rows_known(e.rows, rows, sizes_of(e.hidden, e.rows, e.write).num_rows);
}

Edited compute(const Edit& edit, Route route) {
  if (route != Route::cpu) return edit_on_gpu(edit);
  const WithoutGil released;
  if (std::optional<Edited> edited = edit_directly(edit)) return *std::move(edited);
  return edit_on_cpu(edit);
}

Gradients compute(const Backward& backward, Route route) {
  if (route == Route::cpu) {
    if (std::optional<Gradients> found = backward_directly(backward)) return *std::move(found);
    return backward_on_cpu(backward);
  }
  if (route == Route::triton && has_valid_layout(backward)) return backward_on_gpu(backward);
  return backward_in_python(backward, nullptr);
}

}  // namespace reft::host
