// CPU implementations of the reft_kernels operators (reft_kernels/ops.py) on PyTorch's stable ABI.
// Operators that configure the library are in reft_kernels_cpu.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstring>
#include <exception>
#include <mutex>
#include <new>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "argument_checks.h"
#include "arguments.h"
#include "host_pool.h"
#include "kernels.h"
#include "parallel.h"
#include "python_operators.h"
#include "tensors.h"

namespace reft {

void parallel_for(int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t),
                  void* context) {
  std::exception_ptr first;  // exceptions must not leave the thread pool's callback
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

using torch::headeronly::ScalarType;

// Disables gradient recording in its scope.
class NoGrad {
 public:
  NoGrad() : previous_(aoti_torch_grad_mode_is_enabled()) {
    aoti_torch_grad_mode_set_enabled(false);
  }
  ~NoGrad() { aoti_torch_grad_mode_set_enabled(previous_); }
  NoGrad(const NoGrad&) = delete;
  NoGrad& operator=(const NoGrad&) = delete;

 private:
  bool previous_;
};

// ---- edits

struct EditSaved {
  Tensor saved_input, u, z;
};

EditSaved run(EditCall& call, const EditSizes& sizes, const Tensor& source, const Tensor& out) {
  const int32_t code = code_of(source), sums = sum_code(code);
  EditSaved saved{
      empty_if(call.save && call.rows, {sizes.count, sizes.d}, code),
      empty_if(call.save, {sizes.count, sizes.r}, sums),
      empty_if(call.save && sizes.activation != Activation::linear, {sizes.count, sizes.r}, sums)};
  make_dense(call.read), make_dense(call.read_bias), make_dense(call.write);
  make_dense(call.subtract_bias), make_dense(call.coeff);
  EditForward e;
  e.selection = selection_of(sizes.count, call.rows, call.weight_ids, call.write.sizes()[0]);
  e.weights.d = sizes.d, e.weights.r = sizes.r;
  e.weights.read = typed(call.read), e.weights.read_bias = typed(call.read_bias);
  e.weights.write = typed(call.write), e.weights.subtract_bias = typed(call.subtract_bias);
  e.weights.coeff = typed(call.coeff);
  e.weights.subtract_projection = call.subtract_projection, e.weights.activation = sizes.activation;
  e.source = rows_of(source), e.out = rows_of(out);
  e.saved_input = {pointer(saved.saved_input), sizes.d};
  e.u = pointer(saved.u), e.z = pointer(saved.z);
  kernels().edit[int(dtype_of(source))](e);
  return saved;
}

void edit(StableIValue* stack, uint64_t, uint64_t outputs) {
  if (forward_to_python("edit", stack, outputs)) return;
  EditCall call{Reader(stack)};
  const NoGrad guard;
  const EditSizes sizes = check(ArgumentChecker("edit"), call, false);
  const Tensor source = with_rows(call.hidden), out = output_like(source, call.rows.has_value());
  const EditSaved saved = run(call, sizes, source, out);
  return_values(stack, out, saved.saved_input, saved.u, saved.z);
}

void edit_in_place(StableIValue* stack, uint64_t, uint64_t outputs) {
  if (forward_to_python("edit_", stack, outputs)) return;
  EditCall call{Reader(stack)};
  const NoGrad guard;
  const EditSizes sizes = check(ArgumentChecker("edit_"), call, true);
  InPlaceOutput target(call.hidden);
  const EditSaved saved = run(call, sizes, target.rows(), target.rows());
  target.copy_back();
  return_values(stack, saved.saved_input, saved.u, saved.z);
}

struct EditGradients {
  Tensor read, read_bias, write, subtract_bias, coeff;
};

// The gradient of the hidden states is not computed if out is null.
EditGradients run(EditBackwardCall& call, const EditSizes& sizes, const Tensor& grad,
                  const Tensor* out) {
  const int32_t sums = sum_code(code_of(grad));
  const int64_t sets = call.weight_ids ? call.write.sizes()[0] : 1, r = sizes.r, d = sizes.d;
  const auto matrix = [&](bool wanted) {
    return call.weight_ids ? empty_if(wanted, {sets, r, d}, sums) : empty_if(wanted, {r, d}, sums);
  };
  const auto vector = [&](bool wanted) {
    return call.weight_ids ? empty_if(wanted, {sets, r}, sums) : empty_if(wanted, {r}, sums);
  };
  const bool weights = call.need_weights;
  EditGradients grads{matrix(weights && call.read), vector(weights), matrix(weights),
                      vector(weights && call.subtract_projection),
                      empty_if(call.coeff.has_value(), {sizes.count, r}, sums)};
  make_dense(call.read), make_dense(call.write), make_dense(call.coeff), make_dense(call.u),
      make_dense(call.z);
  const Tensor saved_input = weights ? with_rows(call.saved_input) : call.saved_input;
  EditBackward e;
  e.selection = selection_of(sizes.count, call.rows, call.weight_ids, sets);
  e.weights.d = d, e.weights.r = r;
  e.weights.read = typed(call.read), e.weights.write = typed(call.write),
  e.weights.coeff = typed(call.coeff);
  e.weights.subtract_projection = call.subtract_projection, e.weights.activation = sizes.activation;
  e.grad = rows_of(grad);
  if (out) e.out = rows_of(*out);
  if (weights) e.saved_input = rows_of(saved_input);
  e.u = call.u.data_ptr();
  e.z = sizes.activation == Activation::linear ? nullptr : call.z.data_ptr();
  e.grad_read = pointer(grads.read), e.grad_read_bias = pointer(grads.read_bias);
  e.grad_write = pointer(grads.write), e.grad_subtract_bias = pointer(grads.subtract_bias);
  e.grad_coeff = pointer(grads.coeff);
  kernels().edit_backward[int(dtype_of(grad))](e);
  return grads;
}

void edit_backward(StableIValue* stack, uint64_t, uint64_t outputs) {
  if (forward_to_python("edit_backward", stack, outputs)) return;
  EditBackwardCall call(Reader(stack), false);
  const NoGrad guard;
  const EditSizes sizes = check(ArgumentChecker("edit_backward"), call, false);
  const Tensor grad = with_rows(call.grad);
  const Tensor out =
      call.need_hidden ? output_like(grad, call.rows.has_value()) : empty({0}, code_of(grad));
  const EditGradients grads = run(call, sizes, grad, call.need_hidden ? &out : nullptr);
  return_values(stack, out, grads.read, grads.read_bias, grads.write, grads.subtract_bias,
                grads.coeff);
}

void edit_backward_in_place(StableIValue* stack, uint64_t, uint64_t outputs) {
  if (forward_to_python("edit_backward_", stack, outputs)) return;
  EditBackwardCall call(Reader(stack), true);
  const NoGrad guard;
  const EditSizes sizes = check(ArgumentChecker("edit_backward_"), call, true);
  InPlaceOutput target(call.grad);
  const EditGradients grads = run(call, sizes, target.rows(), &target.rows());
  target.copy_back();
  return_values(stack, grads.read, grads.read_bias, grads.write, grads.subtract_bias, grads.coeff);
}

// ---- RED

Tensor run(RedCall& call, int64_t count, bool save, const Tensor& source, const Tensor& out) {
  const int64_t d = source.sizes()[1];
  const Tensor saved_input = empty_if(save, {count, d}, code_of(source));
  make_dense(call.scale), make_dense(call.bias);
  RedForward e;
  e.selection = selection_of(count, call.rows, call.weight_ids, call.scale.sizes()[0]);
  e.d = d;
  e.scale = typed(call.scale), e.bias = typed(call.bias);
  e.source = rows_of(source), e.out = rows_of(out);
  e.saved_input = {pointer(saved_input), d};
  kernels().red[int(dtype_of(source))](e);
  return saved_input;
}

void red(StableIValue* stack, uint64_t, uint64_t outputs) {
  if (forward_to_python("red", stack, outputs)) return;
  RedCall call{Reader(stack)};
  const NoGrad guard;
  const int64_t count = check(ArgumentChecker("red"), call, false);
  const Tensor source = with_rows(call.hidden), out = output_like(source, call.rows.has_value());
  // without rows, the input is left unmodified by this call, so no copy is saved
  return_values(stack, out, run(call, count, call.save && call.rows, source, out));
}

void red_in_place(StableIValue* stack, uint64_t, uint64_t outputs) {
  if (forward_to_python("red_", stack, outputs)) return;
  RedCall call{Reader(stack)};
  const NoGrad guard;
  const int64_t count = check(ArgumentChecker("red_"), call, true);
  InPlaceOutput target(call.hidden);
  const Tensor saved_input = run(call, count, call.save, target.rows(), target.rows());
  target.copy_back();
  return_values(stack, saved_input);
}

struct RedGradients {
  Tensor scale, bias;
};

RedGradients run(RedBackwardCall& call, int64_t count, const Tensor& grad, const Tensor* out) {
  const int64_t d = grad.sizes()[1], sets = call.weight_ids ? call.scale.sizes()[0] : 1;
  const int32_t sums = sum_code(code_of(grad));
  const auto like_scale = [&] {
    return call.weight_ids ? empty_if(call.need_weights, {sets, d}, sums)
                           : empty_if(call.need_weights, {d}, sums);
  };
  RedGradients grads{like_scale(), like_scale()};
  make_dense(call.scale);
  const Tensor saved_input = call.need_weights ? with_rows(call.saved_input) : call.saved_input;
  RedBackward e;
  e.selection = selection_of(count, call.rows, call.weight_ids, sets);
  e.d = d;
  e.scale = typed(call.scale);
  e.grad = rows_of(grad);
  if (out) e.out = rows_of(*out);
  if (call.need_weights) e.saved_input = rows_of(saved_input);
  e.grad_scale = pointer(grads.scale), e.grad_bias = pointer(grads.bias);
  kernels().red_backward[int(dtype_of(grad))](e);
  return grads;
}

void red_backward(StableIValue* stack, uint64_t, uint64_t outputs) {
  if (forward_to_python("red_backward", stack, outputs)) return;
  RedBackwardCall call(Reader(stack), false);
  const NoGrad guard;
  const int64_t count = check(ArgumentChecker("red_backward"), call, false);
  const Tensor grad = with_rows(call.grad);
  const Tensor out =
      call.need_hidden ? output_like(grad, call.rows.has_value()) : empty({0}, code_of(grad));
  const RedGradients grads = run(call, count, grad, call.need_hidden ? &out : nullptr);
  return_values(stack, out, grads.scale, grads.bias);
}

void red_backward_in_place(StableIValue* stack, uint64_t, uint64_t outputs) {
  if (forward_to_python("red_backward_", stack, outputs)) return;
  RedBackwardCall call(Reader(stack), true);
  const NoGrad guard;
  const int64_t count = check(ArgumentChecker("red_backward_"), call, true);
  InPlaceOutput target(call.grad);
  const RedGradients grads = run(call, count, target.rows(), &target.rows());
  target.copy_back();
  return_values(stack, grads.scale, grads.bias);
}

// ---- construction of R

// Returns a contiguous tensor of the given dtype; the tensor itself if it already is one.
Tensor converted(const Tensor& tensor, int32_t code) {
  if (code_of(tensor) == code) return dense(tensor);
  const ScalarType dtype = torch::stable::detail::to<ScalarType>(torch::stable::detail::from(code));
  return dense(torch::stable::to(tensor, dtype));
}
Optional converted(const Optional& tensor, int32_t code) {
  return tensor ? Optional(converted(*tensor, code)) : std::nullopt;
}

template <class T>
void launch(const BuildCall& call, const MapSizes& sizes, void (*kernel)(const BuildForward<T>&),
            const Tensor& R, const Tensor& D, const Tensor& aux) {
  kernel({sizes.layers, sizes.d, sizes.r, pointer<const T>(call.X), pointer<const T>(call.signs),
          pointer<const T>(call.base), pointer<const T>(call.base_point), pointer<const T>(call.W),
          pointer<T>(R), call.W ? pointer<T>(D) : nullptr, pointer<T>(aux)});
}

template <class T>
void launch(const BuildBackwardCall& call, const MapSizes& sizes,
            void (*kernel)(const BuildBackward<T>&), const Tensor& grad_X) {
  kernel({sizes.layers, sizes.d, sizes.r, pointer<const T>(call.grad_R),
          pointer<const T>(call.grad_D), pointer<const T>(call.X), pointer<const T>(call.signs),
          pointer<const T>(call.base), pointer<const T>(call.aux), pointer<T>(grad_X)});
}

// Operator names and kernels of one map, for float and double.
struct Map {
  const char *name, *backward_name;
  void (*BuildKernels<float>::*in_float)(const BuildForward<float>&);
  void (*BuildKernels<double>::*in_double)(const BuildForward<double>&);
  void (*BuildKernels<float>::*backward_in_float)(const BuildBackward<float>&);
  void (*BuildKernels<double>::*backward_in_double)(const BuildBackward<double>&);
};

constexpr Map kHouseholder = {"householder",
                              "householder_backward",
                              &BuildKernels<float>::householder,
                              &BuildKernels<double>::householder,
                              &BuildKernels<float>::householder_backward,
                              &BuildKernels<double>::householder_backward};
constexpr Map kCayley = {"cayley",
                         "cayley_backward",
                         &BuildKernels<float>::cayley,
                         &BuildKernels<double>::cayley,
                         &BuildKernels<float>::cayley_backward,
                         &BuildKernels<double>::cayley_backward};

template <const Map& map>
void build(StableIValue* stack, uint64_t, uint64_t outputs) {
  if (forward_to_python(map.name, stack, outputs)) return;
  BuildCall call{Reader(stack)};
  const NoGrad guard;
  const MapSizes sizes = check(ArgumentChecker(map.name), call);
  const auto [layers, d, r] = sizes;
  const int32_t sums = sum_code(code_of(call.X));
  const Tensor R = empty({layers, r, d}, sums),
               D = empty_if(call.W.has_value(), {layers, r, d}, sums);
  const Tensor aux = empty({layers, call.base ? 2 : 1, r, r}, sums);
  call.X = converted(call.X, sums), call.signs = converted(call.signs, sums),
  call.base = converted(call.base, sums);
  call.base_point = converted(call.base_point, sums), call.W = converted(call.W, sums);
  if (sums == kCodes.float64)
    launch<double>(call, sizes, kernels().build_double.*map.in_double, R, D, aux);
  else
    launch<float>(call, sizes, kernels().build_float.*map.in_float, R, D, aux);
  return_values(stack, R, D, aux);
}

template <const Map& map>
void build_backward(StableIValue* stack, uint64_t, uint64_t outputs) {
  if (forward_to_python(map.backward_name, stack, outputs)) return;
  BuildBackwardCall call{Reader(stack)};
  const NoGrad guard;
  const MapSizes sizes = check(ArgumentChecker(map.backward_name), call);
  const int32_t code = code_of(call.X), sums = sum_code(code);
  const Tensor grad_X = empty({sizes.layers, sizes.d, sizes.r}, sums);
  call.X = converted(call.X, sums), call.signs = converted(call.signs, sums),
  call.base = converted(call.base, sums);
  call.grad_R = converted(call.grad_R, sums), call.grad_D = converted(call.grad_D, sums);
  call.aux = converted(call.aux, sums);
  if (sums == kCodes.float64)
    launch<double>(call, sizes, kernels().build_double.*map.backward_in_double, grad_X);
  else
    launch<float>(call, sizes, kernels().build_float.*map.backward_in_float, grad_X);
  return_values(stack, converted(grad_X, code));
}

// ---- operators that configure the library

void set_enabled(bool wanted) { native_enabled = wanted; }

void refuse(bool of_arguments, std::string text) {
  python_error = {true, of_arguments, std::move(text)};
}

void poison_memory(bool wanted) { poison_outputs = wanted; }

void set_pool_limit(int64_t bytes) { pool_limit(size_t(bytes)); }

std::tuple<int64_t, int64_t> held_by_pool() {
  const PoolBytes bytes = pool_bytes();
  return {int64_t(bytes.used), int64_t(bytes.kept)};
}

std::string isa() { return kernels().name; }

std::string isa_unsupported_reason(std::string name) {
  const char* reason = unsupported_reason(name.c_str());
  return reason ? reason : "";
}

}  // namespace
}  // namespace reft

STABLE_TORCH_LIBRARY_IMPL(reft_kernels, CPU, m) {
  m.impl("edit", reft::edit);
  m.impl("edit_", reft::edit_in_place);
  m.impl("edit_backward", reft::edit_backward);
  m.impl("edit_backward_", reft::edit_backward_in_place);
  m.impl("red", reft::red);
  m.impl("red_", reft::red_in_place);
  m.impl("red_backward", reft::red_backward);
  m.impl("red_backward_", reft::red_backward_in_place);
  m.impl("householder", reft::build<reft::kHouseholder>);
  m.impl("householder_backward", reft::build_backward<reft::kHouseholder>);
  m.impl("cayley", reft::build<reft::kCayley>);
  m.impl("cayley_backward", reft::build_backward<reft::kCayley>);
}

STABLE_TORCH_LIBRARY(reft_kernels_cpu, m) {
  m.def("set_enabled(bool wanted) -> ()");
  m.def("refuse(bool of_arguments, str text) -> ()");
  m.def("poison_memory(bool wanted) -> ()");
  m.def("pooled_like(Tensor like) -> Tensor");
  m.def("set_pool_limit(int bytes) -> ()");
  m.def("held_by_pool() -> (int used, int kept)");
  m.def("isa() -> str");
  m.def("isa_unsupported_reason(str name) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(reft_kernels_cpu, CPU, m) {
  m.impl("pooled_like", TORCH_BOX(&reft::pooled_like));
}

STABLE_TORCH_LIBRARY_IMPL(reft_kernels_cpu, CompositeExplicitAutograd, m) {
  m.impl("set_enabled", TORCH_BOX(&reft::set_enabled));
  m.impl("refuse", TORCH_BOX(&reft::refuse));
  m.impl("poison_memory", TORCH_BOX(&reft::poison_memory));
  m.impl("set_pool_limit", TORCH_BOX(&reft::set_pool_limit));
  m.impl("held_by_pool", TORCH_BOX(&reft::held_by_pool));
  m.impl("isa", TORCH_BOX(&reft::isa));
  m.impl("isa_unsupported_reason", TORCH_BOX(&reft::isa_unsupported_reason));
}
