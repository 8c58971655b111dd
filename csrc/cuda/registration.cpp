// Registers the kernels as operators of the private namespace `reft_kernels_cuda`, using PyTorch's
// stable ABI. The caller (reft_kernels/cuda.py) checks shapes and allocates outputs; an output
// without elements is not computed.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "arguments.h"
#include "device.h"

namespace {

using namespace reft_cuda;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

// Makes the tensor's device current for a launch, and provides its current stream.
class Launch {
 public:
  Launch(const char* name, const Tensor& tensor) : name_(name), device_(name, tensor) {}

  cudaStream_t stream() const { return device_.stream(); }

  void check(cudaError_t error) const { check_launch(name_, error); }

 private:
  const char* name_;
  Device device_;
};

Dtype dtype_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      fail(name, "a tensor is not fp32, bf16 or fp16");
  }
}

template <class T>
const T* input(const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <class T>
const T* input(const Optional& tensor) {
  return tensor.has_value() ? input<T>(*tensor) : nullptr;
}

template <class T>
T* output(const Tensor& tensor) {
  return tensor.numel() == 0 ? nullptr : static_cast<T*>(tensor.mutable_data_ptr());
}

AnyDtype any(const char* name, const Optional& tensor) {
  if (!tensor.has_value()) return {nullptr, Dtype::kFloat32};
  return {input<void>(*tensor), dtype_of(name, *tensor)};
}

Selection selection_of(const Tensor& hidden, const Optional& rows, const Optional& weight_ids,
                       const Tensor& write) {
  const bool has_sets = weight_ids.has_value();
  Selection selection = {};
  selection.rows = input<int32_t>(rows);
  selection.weight_ids = input<int32_t>(weight_ids);
  selection.num_rows = rows.has_value() ? rows->size(0) : hidden.size(0);
  selection.d = int(write.size(write.dim() - 1));
  selection.rank = int(write.size(write.dim() - 2));
  selection.sets = has_sets ? int(write.size(0)) : 1;
  return selection;
}

// Returns whether a kernel serves the call. Without rows, not all do.
bool edit_forward_op(Tensor source, Tensor out, Optional rows, Optional weight_ids, Optional read,
                     Optional read_bias, Tensor write, Optional subtract_bias, Optional coeff,
                     bool subtract_projection, int64_t activation, Tensor saved_input, Tensor u,
                     Tensor z) {
  const char* name = "edit_forward";
  Launch launch(name, source);
  EditForward p = {};
  p.selection = selection_of(source, rows, weight_ids, write);
  p.dtype = dtype_of(name, source);
  p.weight_dtype = dtype_of(name, write);
  p.source = input<void>(source);
  p.out = output<void>(out);
  p.source_stride = source.stride(0);
  p.out_stride = out.stride(0);
  p.read = input<void>(read);
  p.write = input<void>(write);
  p.read_bias = any(name, read_bias);
  p.subtract_bias = any(name, subtract_bias);
  p.coeff = any(name, coeff);
  p.saved_input = output<void>(saved_input);
  p.u = output<float>(u);
  p.z = output<float>(z);
  p.subtract_projection = subtract_projection;
  p.activation = Activation(activation);
  if (!rows.has_value() && !edit_tiles_serves(p)) return false;
  launch.check(edit_forward(p, launch.stream()));
  return true;
}

void edit_delta_op(Tensor grad, Tensor rows, Optional weight_ids, Tensor write, Optional coeff,
                   Tensor u, Tensor z, int64_t activation, Tensor small, Tensor grad_coeff) {
  const char* name = "edit_delta";
  Launch launch(name, grad);
  EditDelta p = {};
  p.selection = selection_of(grad, rows, weight_ids, write);
  p.dtype = dtype_of(name, grad);
  p.weight_dtype = dtype_of(name, write);
  p.grad = input<void>(grad);
  p.grad_stride = grad.stride(0);
  p.write = input<void>(write);
  p.coeff = any(name, coeff);
  p.u = input<float>(u);
  p.activation = Activation(activation);
  p.z = p.activation == Activation::kLinear ? nullptr : input<float>(z);
  p.small = output<float>(small);
  p.grad_coeff = output<float>(grad_coeff);
  launch.check(edit_delta(p, int(small.size(1)), launch.stream()));
}

void edit_gradient_op(Tensor grad, Optional out, Tensor saved_input, Tensor rows,
                      Optional weight_ids, Optional read, Tensor write, Tensor small,
                      bool subtract_projection, int64_t activation, Tensor grad_read,
                      Tensor grad_read_bias, Tensor grad_write, Tensor grad_subtract_bias) {
  const char* name = "edit_gradient";
  Launch launch(name, grad);
  EditGradient p = {};
  p.selection = selection_of(grad, rows, weight_ids, write);
  p.dtype = dtype_of(name, grad);
  p.grad = input<void>(grad);
  p.grad_stride = grad.stride(0);
  if (out.has_value()) {
    p.out = output<void>(*out);
    p.out_stride = out->stride(0);
  }
  p.saved_input = input<void>(saved_input);
  p.kept_stride = saved_input.dim() == 2 ? saved_input.stride(0) : 0;
  p.read = any(name, read);
  p.write = any(name, write);
  p.small = input<float>(small);
  p.grad_read = output<float>(grad_read);
  p.grad_read_bias = output<float>(grad_read_bias);
  p.grad_write = output<float>(grad_write);
  p.grad_subtract_bias = output<float>(grad_subtract_bias);
  p.subtract_projection = subtract_projection;
  p.linear = Activation(activation) == Activation::kLinear;
  launch.check(edit_gradient(p, launch.stream()));
}

// Scratch memory from PyTorch's allocator. It may be freed when the launch is queued, because the
// memory is reused in stream order.
Tensor scratch_of(const Tensor& like, const BuildPlan& plan) {
  return torch::stable::new_empty(like, {plan.scratch_bytes / int64_t(sizeof(double))},
                                  ScalarType::Double);
}

void build_forward_op(Tensor X, Optional signs, Optional base, Optional point, Optional W,
                      bool cayley, Tensor R, Tensor D, Tensor aux) {
  Launch launch("build_forward", X);
  BuildForward p = {};
  p.layers = int(X.size(0));
  p.d = int(X.size(1));
  p.rank = int(X.size(2));
  p.cayley = cayley;
  p.X = input<float>(X);
  p.signs = input<float>(signs);
  p.base = input<float>(base);
  p.point = input<float>(point);
  p.W = input<float>(W);
  p.R = output<float>(R);
  p.D = output<float>(D);
  p.aux = output<float>(aux);
  BuildPlan plan = {};
  launch.check(build_forward_plan(p.layers, p.d, p.rank, &plan));
  Tensor scratch = scratch_of(X, plan);
  launch.check(build_forward(p, plan, output<void>(scratch), launch.stream()));
}

void build_backward_op(Optional grad_R, Optional grad_D, Tensor X, Optional signs, Optional base,
                       Tensor aux, bool cayley, Tensor grad_X) {
  Launch launch("build_backward", X);
  BuildBackward p = {};
  p.layers = int(X.size(0));
  p.d = int(X.size(1));
  p.rank = int(X.size(2));
  p.cayley = cayley;
  p.grad_R = input<float>(grad_R);
  p.grad_D = input<float>(grad_D);
  p.X = input<float>(X);
  p.signs = input<float>(signs);
  p.base = input<float>(base);
  p.aux = input<float>(aux);
  p.grad_X = output<float>(grad_X);
  BuildPlan plan = {};
  launch.check(build_backward_plan(p.layers, p.d, p.rank, &plan));
  Tensor scratch = scratch_of(X, plan);
  launch.check(build_backward(p, plan, output<void>(scratch), launch.stream()));
}

}  // namespace

STABLE_TORCH_LIBRARY(reft_kernels_cuda, m) {
  m.def(
      "edit_forward(Tensor source, Tensor(a!) out, Tensor? rows, Tensor? weight_ids, Tensor? read, "
      "Tensor? read_bias, "
      "Tensor write, Tensor? subtract_bias, Tensor? coeff, bool subtract_projection, int "
      "activation, Tensor(b!) saved_input, Tensor(c!) u, "
      "Tensor(d!) z) -> bool");
  m.def(
      "edit_delta(Tensor grad, Tensor rows, Tensor? weight_ids, Tensor write, Tensor? coeff, "
      "Tensor u, Tensor z, "
      "int activation, Tensor(a!) small, Tensor(b!) grad_coeff) -> ()");
  m.def(
      "edit_gradient(Tensor grad, Tensor(a!)? out, Tensor saved_input, Tensor rows, Tensor? "
      "weight_ids, Tensor? read, Tensor write, "
      "Tensor small, bool subtract_projection, int activation, Tensor(b!) grad_read, Tensor(c!) "
      "grad_read_bias, Tensor(d!) grad_write, "
      "Tensor(e!) grad_subtract_bias) -> ()");
  m.def(
      "build_forward(Tensor X, Tensor? signs, Tensor? base, Tensor? point, Tensor? W, bool cayley, "
      "Tensor(a!) R, "
      "Tensor(b!) D, Tensor(c!) aux) -> ()");
  m.def(
      "build_backward(Tensor? grad_R, Tensor? grad_D, Tensor X, Tensor? signs, Tensor? base, "
      "Tensor aux, bool cayley, "
      "Tensor(a!) grad_X) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(reft_kernels_cuda, REFT_DISPATCH_KEY, m) {
  m.impl("edit_forward", TORCH_BOX(&edit_forward_op));
  m.impl("edit_delta", TORCH_BOX(&edit_delta_op));
  m.impl("edit_gradient", TORCH_BOX(&edit_gradient_op));
  m.impl("build_forward", TORCH_BOX(&build_forward_op));
  m.impl("build_backward", TORCH_BOX(&build_backward_op));
}
