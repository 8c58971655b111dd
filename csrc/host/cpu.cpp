#include "cpu.h"

#include <atomic>

#include "../cpu/direct.h"
#include "layout.h"

namespace reft::host {
namespace {

std::atomic<const reft::Kernels*> table{nullptr};

// Larger outputs may come from the pool of the operators.
constexpr size_t kMaxOutputBytes = 1 << 20;

reft::Dtype dtype_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kFloat: return reft::Dtype::float32;
    case at::kBFloat16: return reft::Dtype::bfloat16;
    case at::kHalf: return reft::Dtype::float16;
    default: return reft::Dtype::float64;
  }
}

reft::Typed typed(const Tensor& tensor) {
  if (!tensor.defined()) return {};
  return {tensor.const_data_ptr(), dtype_of(tensor.scalar_type())};
}

// The kernels do not write their inputs.
void* pointer(const Tensor& tensor) {
  return tensor.defined() ? const_cast<void*>(tensor.const_data_ptr()) : nullptr;
}

// Whether rows are -1 or ascending numbers below num_rows, and so distinct.
bool are_ascending(const Tensor& rows, int64_t num_rows) {
  const auto* values = static_cast<const int32_t*>(rows.const_data_ptr());
  int64_t last = -1;
  bool valid = true;
  for (int64_t n = 0; n < rows.numel(); ++n) {
    if (values[n] == -1) continue;
    valid &= values[n] > last && values[n] < num_rows;
    last = values[n];
  }
  return valid;
}

reft::Selection selection_of(const Tensor& rows, int64_t entries) {
  reft::Selection selection;
  selection.entries = entries;
  selection.rows = static_cast<const int32_t*>(pointer(rows));
  return selection;
}

}  // namespace

void set_cpu_kernels(const void* function) {
  using Entry = const reft::Kernels* (*)(uint64_t);
  const auto entry = reinterpret_cast<Entry>(const_cast<void*>(function));
  table = entry ? entry(reft::kDirectLayout) : nullptr;
}

std::optional<Edited> edit_directly(const Edit& e) {
  const reft::Kernels* kernels = table.load(std::memory_order_acquire);
  if (!kernels || !has_valid_layout(e)) return std::nullopt;
  const Sizes sizes = sizes_of(e.hidden, e.rows, e.write);
  if (e.rows.defined() && !are_ascending(e.rows, sizes.num_rows)) return std::nullopt;
  if (!e.in_place && e.hidden.nbytes() > kMaxOutputBytes) return std::nullopt;
  Edited result = new_results(e, sizes);
  reft::EditForward call;
  call.selection = selection_of(e.rows, sizes.entries);
  call.weights.d = sizes.d, call.weights.r = sizes.rank;
  call.weights.read = typed(e.read), call.weights.read_bias = typed(e.read_bias);
  call.weights.write = typed(e.write), call.weights.subtract_bias = typed(e.subtract_bias);
  call.weights.coeff = typed(e.coeff);
  call.weights.subtract_projection = e.settings.subtract_projection;
  call.weights.activation = reft::Activation(e.settings.activation);
  call.source = {pointer(e.hidden), sizes.d}, call.out = {pointer(result.out), sizes.d};
  call.saved_input = {pointer(result.saved_input), sizes.d};
  call.u = pointer(result.u), call.z = pointer(result.z);
  kernels->edit[int(dtype_of(e.hidden.scalar_type()))](call);
  return result;
}

std::optional<Gradients> backward_directly(const Backward& b) {
  const reft::Kernels* kernels = table.load(std::memory_order_acquire);
  if (!kernels || !has_valid_layout(b)) return std::nullopt;
  const Sizes sizes = sizes_of(b.grad, b.rows, b.write);
  if (b.rows.defined() && !are_ascending(b.rows, sizes.num_rows)) return std::nullopt;
  if (b.need_hidden && !b.in_place && b.grad.nbytes() > kMaxOutputBytes) return std::nullopt;
  Gradients grads = new_gradients(b, sizes);
  reft::EditBackward call;
  call.selection = selection_of(b.rows, sizes.entries);
  call.weights.d = sizes.d, call.weights.r = sizes.rank;
  call.weights.read = typed(b.read), call.weights.write = typed(b.write);
  call.weights.coeff = typed(b.coeff);
  call.weights.subtract_projection = b.settings.subtract_projection;
  call.weights.activation = reft::Activation(b.settings.activation);
  call.grad = {pointer(b.grad), sizes.d}, call.out = {pointer(grads.hidden), sizes.d};
  if (b.need_weights) call.saved_input = {pointer(b.saved_input), sizes.d};
  call.u = pointer(b.u), call.z = pointer(b.z);
  call.grad_read = pointer(grads.read), call.grad_read_bias = pointer(grads.read_bias);
  call.grad_write = pointer(grads.write), call.grad_subtract_bias = pointer(grads.subtract_bias);
  call.grad_coeff = pointer(grads.coeff);
  kernels->edit_backward[int(dtype_of(b.grad.scalar_type()))](call);
  return grads;
}

}  // namespace reft::host
