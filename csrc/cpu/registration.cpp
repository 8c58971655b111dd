// The CPU kernels as private PyTorch operators (reft_kernels_cpu::*), through the stable ABI: one
// build serves many releases. Outputs are allocated by the caller. Every operator checks
// (argument_checks.h) what its kernel presumes of shapes, dtypes, strides, row numbers and set
// numbers, so that a wrong call throws and touches no memory that is not its own; the values that
// callers give names to are checked by reft_kernels before, with errors in its words.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <exception>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "argument_checks.h"
#include "host_pool.h"
#include "kernels.h"
#include "parallel.h"

namespace reft {

void parallel_for(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t),
                  void* context) {
  std::exception_ptr first;  // nothing is thrown across the thread pool
  std::mutex lock;
  torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
    try {
      body(context, begin, end);
    } catch (...) {
      const std::lock_guard<std::mutex> guard(lock);
      if (!first) first = std::current_exception();
    }
  });
  if (first) std::rethrow_exception(first);
}

void out_of_memory() { throw std::bad_alloc(); }

namespace {

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::float32;
    case ScalarType::Double:
      return Dtype::float64;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Half:
      return Dtype::float16;
    default:
      STD_TORCH_CHECK(
          false, "reft_kernels_cpu: got a dtype that is not float32, float64, bfloat16 or float16");
  }
}

Typed typed(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), "reft_kernels_cpu: weights must be contiguous");
  return {tensor.data_ptr(), dtype_of(tensor)};
}
Typed typed(const Optional& tensor) { return tensor ? typed(*tensor) : Typed{}; }

Rows rows_of(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 2 && has_rows(tensor),
                  "reft_kernels_cpu: hidden states must be [M, d] with consecutive channels");
  return {tensor.data_ptr(), tensor.stride(0)};
}
Rows rows_of(const Optional& tensor) { return tensor ? rows_of(*tensor) : Rows{}; }

template <class T = void>
T* pointer(const Optional& tensor) {
  return tensor ? static_cast<T*>(tensor->data_ptr()) : nullptr;
}

Selection selection_of(int64_t all_rows, const Optional& rows, const Optional& weight_ids,
                       int64_t sets) {
  Selection s;
  s.entries = rows ? rows->numel() : all_rows;
  s.rows = pointer<const int32_t>(rows);
  s.weight_ids = pointer<const int32_t>(weight_ids);
  s.sets = weight_ids ? sets : 1;
  return s;
}

EditWeights edit_weights(const Optional& read, const Optional& read_bias, const Tensor& write,
                         const Optional& subtract_bias, const Optional& coeff,
                         bool subtract_projection, int64_t activation) {
  EditWeights w;
  int64_t dims = write.dim();
  w.d = write.sizes()[dims - 1];
  w.r = write.sizes()[dims - 2];
  w.read = typed(read);
  w.read_bias = typed(read_bias);
  w.write = typed(write);
  w.subtract_bias = typed(subtract_bias);
  w.coeff = typed(coeff);
  w.subtract_projection = subtract_projection;
  w.activation = static_cast<Activation>(activation);
  return w;
}

void edit(Tensor source, Tensor out, Optional rows, Optional weight_ids, Optional read,
          Optional read_bias, Tensor write, Optional subtract_bias, Optional coeff,
          bool subtract_projection, int64_t activation, Optional saved_input, Optional u,
          Optional z) {
  check_edit(source, out, rows, weight_ids, read, read_bias, write, subtract_bias, coeff,
             activation, saved_input, u, z);
  EditForward e;
  e.selection = selection_of(source.sizes()[0], rows, weight_ids, write.sizes()[0]);
  e.weights =
      edit_weights(read, read_bias, write, subtract_bias, coeff, subtract_projection, activation);
  e.source = rows_of(source);
  e.out = rows_of(out);
  e.saved_input = rows_of(saved_input);
  e.u = pointer(u);
  e.z = pointer(z);
  kernels().edit[int(dtype_of(source))](e);
}

void edit_backward(Tensor grad, Optional out, Tensor saved_input, Tensor u, Optional z,
                   Optional rows, Optional weight_ids, Optional read, Tensor write, Optional coeff,
                   bool subtract_projection, int64_t activation, Optional grad_read,
                   Optional grad_read_bias, Optional grad_write, Optional grad_subtract_bias,
                   Optional grad_coeff) {
  check_edit_backward(grad, out, saved_input, u, z, rows, weight_ids, read, write, coeff,
                      subtract_projection, activation, grad_read, grad_read_bias, grad_write,
                      grad_subtract_bias, grad_coeff);
  EditBackward e;
  e.selection = selection_of(grad.sizes()[0], rows, weight_ids, write.sizes()[0]);
  e.weights =
      edit_weights(read, std::nullopt, write, std::nullopt, coeff, subtract_projection, activation);
  e.grad = rows_of(grad);
  e.out = rows_of(out);
  if (grad_write) e.saved_input = rows_of(saved_input);
  e.u = u.data_ptr();
  e.z = pointer(z);
  e.grad_read = pointer(grad_read);
  e.grad_read_bias = pointer(grad_read_bias);
  e.grad_write = pointer(grad_write);
  e.grad_subtract_bias = pointer(grad_subtract_bias);
  e.grad_coeff = pointer(grad_coeff);
  kernels().edit_backward[int(dtype_of(grad))](e);
}

void red(Tensor source, Tensor out, Optional rows, Optional weight_ids, Tensor scale, Tensor bias,
         Optional saved_input) {
  check_red(source, out, rows, weight_ids, scale, bias, saved_input);
  RedForward e;
  e.selection = selection_of(source.sizes()[0], rows, weight_ids, scale.sizes()[0]);
  e.d = source.sizes()[1];
  e.scale = typed(scale);
  e.bias = typed(bias);
  e.source = rows_of(source);
  e.out = rows_of(out);
  e.saved_input = rows_of(saved_input);
  kernels().red[int(dtype_of(source))](e);
}

void red_backward(Tensor grad, Optional out, Tensor saved_input, Optional rows, Optional weight_ids,
                  Tensor scale, Optional grad_scale, Optional grad_bias) {
  check_red_backward(grad, out, saved_input, rows, weight_ids, scale, grad_scale, grad_bias);
  RedBackward e;
  e.selection = selection_of(grad.sizes()[0], rows, weight_ids, scale.sizes()[0]);
  e.d = grad.sizes()[1];
  e.scale = typed(scale);
  e.grad = rows_of(grad);
  e.out = rows_of(out);
  if (grad_scale) e.saved_input = rows_of(saved_input);
  e.grad_scale = pointer(grad_scale);
  e.grad_bias = pointer(grad_bias);
  kernels().red_backward[int(dtype_of(grad))](e);
}

template <class T>
BuildForward<T> build_forward(const Tensor& X, const Optional& signs, const Optional& base,
                              const Optional& base_point, const Optional& W, const Tensor& R,
                              const Optional& D, const Tensor& aux) {
  return {X.sizes()[0],
          X.sizes()[1],
          X.sizes()[2],
          static_cast<const T*>(X.data_ptr()),
          pointer<const T>(signs),
          pointer<const T>(base),
          pointer<const T>(base_point),
          pointer<const T>(W),
          static_cast<T*>(R.data_ptr()),
          pointer<T>(D),
          static_cast<T*>(aux.data_ptr())};
}

template <class T>
BuildBackward<T> build_backward(const Optional& grad_R, const Optional& grad_D, const Tensor& X,
                                const Optional& signs, const Optional& base, const Tensor& aux,
                                const Tensor& grad_X) {
  return {X.sizes()[0],
          X.sizes()[1],
          X.sizes()[2],
          pointer<const T>(grad_R),
          pointer<const T>(grad_D),
          static_cast<const T*>(X.data_ptr()),
          pointer<const T>(signs),
          pointer<const T>(base),
          static_cast<const T*>(aux.data_ptr()),
          static_cast<T*>(grad_X.data_ptr())};
}

// One operator of the R build in both dtypes; the name is the kernels' member of the table.
#define REFT_BUILD_OPERATOR(name)                                                                 \
  void name(Tensor X, Optional signs, Optional base, Optional base_point, Optional W, Tensor R,   \
            Optional D, Tensor aux) {                                                             \
    check_build(X, signs, base, base_point, W, R, D, aux);                                        \
    if (dtype_of(X) == Dtype::float64)                                                            \
      kernels().build_double.name(                                                                \
          build_forward<double>(X, signs, base, base_point, W, R, D, aux));                       \
    else                                                                                          \
      kernels().build_float.name(build_forward<float>(X, signs, base, base_point, W, R, D, aux)); \
  }                                                                                               \
  void name##_backward(Optional grad_R, Optional grad_D, Tensor X, Optional signs, Optional base, \
                       Tensor aux, Tensor grad_X) {                                               \
    check_build_backward(grad_R, grad_D, X, signs, base, aux, grad_X);                            \
    if (dtype_of(X) == Dtype::float64)                                                            \
      kernels().build_double.name##_backward(                                                     \
          build_backward<double>(grad_R, grad_D, X, signs, base, aux, grad_X));                   \
    else                                                                                          \
      kernels().build_float.name##_backward(                                                      \
          build_backward<float>(grad_R, grad_D, X, signs, base, aux, grad_X));                    \
  }

REFT_BUILD_OPERATOR(householder)
REFT_BUILD_OPERATOR(cayley)
#undef REFT_BUILD_OPERATOR

// An uninitialised contiguous tensor of like's shape and dtype, whose memory goes back to the pool.
Tensor pooled_like(Tensor like) {
  const int64_t dims = like.dim();
  std::vector<int64_t> sizes(dims), strides(dims);
  int64_t count = 1;
  for (int64_t i = dims - 1; i >= 0; --i) {
    sizes[i] = like.sizes()[i];
    strides[i] = count;
    count *= sizes[i];
  }
  void* data = pool_take(size_t(count) * size_t(like.element_size()));
  STD_TORCH_CHECK(data != nullptr, "reft_kernels_cpu: out of memory for an output of ", count,
                  " elements");
  try {
    return torch::stable::from_blob(data, sizes, strides, like.device(), like.scalar_type(),
                                    pool_give);
  } catch (...) {
    pool_give(data);
    throw;
  }
}

void set_pool_limit(int64_t bytes) { pool_limit(size_t(bytes)); }

std::tuple<int64_t, int64_t> held_by_pool() {
  const PoolBytes bytes = pool_bytes();
  return {int64_t(bytes.used), int64_t(bytes.kept)};
}

std::string isa() { return kernels().name; }

std::string isa_refusal(std::string name) {
  const char* reason = unsupported_reason(name.c_str());
  return reason ? reason : "";
}

}  // namespace
}  // namespace reft

STABLE_TORCH_LIBRARY(reft_kernels_cpu, m) {
  m.def(
      "edit(Tensor source, Tensor(a!) out, Tensor? rows, Tensor? weight_ids, Tensor? read, Tensor? "
      "read_bias, Tensor write, "
      "Tensor? subtract_bias, Tensor? coeff, bool subtract_projection, int activation, Tensor(b!)? "
      "saved_input, Tensor(c!)? u, Tensor(d!)? z) "
      "-> ()");
  m.def(
      "edit_backward(Tensor grad, Tensor(a!)? out, Tensor saved_input, Tensor u, Tensor? z, "
      "Tensor? rows, Tensor? weight_ids, "
      "Tensor? read, Tensor write, Tensor? coeff, bool subtract_projection, int activation, "
      "Tensor(b!)? grad_read, "
      "Tensor(c!)? grad_read_bias, Tensor(d!)? grad_write, Tensor(e!)? grad_subtract_bias, "
      "Tensor(f!)? grad_coeff) -> ()");
  m.def(
      "red(Tensor source, Tensor(a!) out, Tensor? rows, Tensor? weight_ids, Tensor scale, Tensor "
      "bias, Tensor(b!)? saved_input) -> ()");
  m.def(
      "red_backward(Tensor grad, Tensor(a!)? out, Tensor saved_input, Tensor? rows, Tensor? "
      "weight_ids, Tensor scale, "
      "Tensor(b!)? grad_scale, Tensor(c!)? grad_bias) -> ()");
  m.def(
      "householder(Tensor X, Tensor? signs, Tensor? base, Tensor? base_point, Tensor? W, "
      "Tensor(a!) R, Tensor(b!)? D, "
      "Tensor(c!) aux) -> ()");
  m.def(
      "householder_backward(Tensor? grad_R, Tensor? grad_D, Tensor X, Tensor? signs, Tensor? base, "
      "Tensor aux, "
      "Tensor(a!) grad_X) -> ()");
  m.def(
      "cayley(Tensor X, Tensor? signs, Tensor? base, Tensor? base_point, Tensor? W, Tensor(a!) R, "
      "Tensor(b!)? D, "
      "Tensor(c!) aux) -> ()");
  m.def(
      "cayley_backward(Tensor? grad_R, Tensor? grad_D, Tensor X, Tensor? signs, Tensor? base, "
      "Tensor aux, Tensor(a!) grad_X) "
      "-> ()");
  m.def("pooled_like(Tensor like) -> Tensor");
  m.def("set_pool_limit(int bytes) -> ()");
  m.def("held_by_pool() -> (int used, int saved_input)");
  m.def("isa() -> str");
  m.def("isa_refusal(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(reft_kernels_cpu, CPU, m) {
  m.impl("pooled_like", TORCH_BOX(&reft::pooled_like));
  m.impl("edit", TORCH_BOX(&reft::edit));
  m.impl("edit_backward", TORCH_BOX(&reft::edit_backward));
  m.impl("red", TORCH_BOX(&reft::red));
  m.impl("red_backward", TORCH_BOX(&reft::red_backward));
  m.impl("householder", TORCH_BOX(&reft::householder));
  m.impl("householder_backward", TORCH_BOX(&reft::householder_backward));
  m.impl("cayley", TORCH_BOX(&reft::cayley));
  m.impl("cayley_backward", TORCH_BOX(&reft::cayley_backward));
}

STABLE_TORCH_LIBRARY_IMPL(reft_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("set_pool_limit", TORCH_BOX(&reft::set_pool_limit));
  m.impl("held_by_pool", TORCH_BOX(&reft::held_by_pool));
  m.impl("isa", TORCH_BOX(&reft::isa));
  m.impl("isa_refusal", TORCH_BOX(&reft::isa_refusal));
}
