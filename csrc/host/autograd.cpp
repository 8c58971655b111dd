#include "autograd.h"

#include <ATen/core/LegacyTypeDispatch.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <memory>
#include <mutex>
#include <string>
#include <type_traits>
#include <utility>

#include "compute.h"

namespace reft::host {
namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

// Makes a node. PyTorch 2.13 counts references to nodes in the nodes, earlier releases beside them.
template <class T, class Base = Node, class... Arguments>
auto make_node(Arguments&&... arguments) {
  if constexpr (std::is_base_of_v<c10::intrusive_ptr_target, Base>)
    return c10::make_intrusive<T>(std::forward<Arguments>(arguments)...);
  else  // deleteNode is found by the type of its argument
    return std::shared_ptr<T>(new T(std::forward<Arguments>(arguments)...),
                              [](Base* node) { deleteNode(node); });
}

// Edges of the node, in the order of its gradients.
enum Input { kHidden, kRead, kReadBias, kWrite, kSubtractBias, kCoeff };

// Counts of the references to a tensor and to its Python object.
struct References {
  size_t tensor;
  Py_ssize_t object;
  bool operator==(const References& other) const {
    return tensor == other.tensor && object == other.object;
  }
};

// The counts of a tensor with a Python object to which only C++ refers. They depend on the release.
References unshared() {
  const Tensor tensor = at::empty({0});
  PyObject* object = wrapped(tensor);
  Py_DECREF(object);  // the tensor keeps it
  return {tensor.use_count(), Py_REFCNT(object)};
}

// Whether nothing but the caller's variable refers to a tensor.
bool is_unshared(const Tensor& tensor) {
  PyObject* object = tensor.unsafeGetTensorImpl()->pyobj_slot()->load_pyobj();
  if (!object) return tensor.use_count() == 1;
  const WithGil gil;
  static const References expected = unshared();
  return References{tensor.use_count(), Py_REFCNT(object)} == expected;
}

// Whether only the caller holds the gradient and its memory, so that it may be overwritten.
bool is_sole_owner(const Tensor& grad) {
  return grad.storage().use_count() == 1 && !grad.requires_grad() && !grad.is_view() &&
         grad.is_contiguous() && is_unshared(grad);
}

Tensor converted(const Tensor& grad, bool wanted, at::ScalarType dtype) {
  if (!wanted || !grad.defined()) return Tensor();
  return grad.scalar_type() == dtype ? grad : grad.to(dtype);
}

class EditBackward : public Node {
 public:
  std::string name() const override { return "EditBackward"; }

  void save(const Edit& edit, const Edited& edited) {
    settings_ = edit.settings;
    read_bias_dtype_ = dtype_of(edit.read_bias);
    subtract_bias_dtype_ = dtype_of(edit.subtract_bias);
    // without rows the backward recomputes the input from the output, which saves memory
    is_output_saved_ = !edit.rows.defined();
    saved_input_ = SavedVariable(is_output_saved_ ? edited.out : edited.saved_input,
                                 is_output_saved_);
    u_ = SavedVariable(edited.u, false);
    if (edited.z.defined()) z_ = SavedVariable(edited.z, false);
    if (edit.rows.defined()) rows_ = SavedVariable(edit.rows, false);
    if (edit.weight_ids.defined()) weight_ids_ = SavedVariable(edit.weight_ids, false);
    if (edit.read.defined()) read_ = SavedVariable(edit.read, false);
    write_ = SavedVariable(edit.write, false);
    if (edit.coeff.defined()) coeff_ = SavedVariable(edit.coeff, false);
  }

  variable_list apply(variable_list&& grads) override {
    Tensor grad = std::move(grads[0]);
    if (!grad.defined()) grad = input_metadata(0).zeros_like();
    if (!at::GradMode::is_enabled()) return gradients(std::move(grad), true);
    const bool requires_grad = grad.requires_grad();
    variable_list result;
    {
      const at::AutoGradMode no_grad(false);
      result = gradients(std::move(grad), false);
    }
    return requires_grad ? differentiable_once(std::move(result)) : result;
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> guard(mutex_);
    for (SavedVariable* saved :
         {&saved_input_, &u_, &z_, &rows_, &weight_ids_, &read_, &write_, &coeff_})
      saved->reset_data();
  }

 private:
  static at::ScalarType dtype_of(const Tensor& tensor) {
    return tensor.defined() ? tensor.scalar_type() : at::ScalarType::Undefined;
  }

  bool needs(Input input) const { return task_should_compute_output(size_t(input)); }

  variable_list gradients(Tensor grad, bool may_overwrite) {
    Backward b = unpacked();
    b.need_hidden = needs(kHidden);
    b.need_weights = needs(kRead) || needs(kReadBias) || needs(kWrite) || needs(kSubtractBias);
    b.in_place = b.need_hidden && may_overwrite && is_sole_owner(grad);
    b.grad = std::move(grad);
    Gradients found = computed(b);
    variable_list result(6);
    result[kHidden] = std::move(found.hidden);
    result[kRead] = converted(found.read, needs(kRead), dtype_of(b.read));
    result[kReadBias] = converted(found.read_bias, needs(kReadBias), read_bias_dtype_);
    result[kWrite] = converted(found.write, needs(kWrite), dtype_of(b.write));
    result[kSubtractBias] =
        converted(found.subtract_bias, needs(kSubtractBias), subtract_bias_dtype_);
    result[kCoeff] = converted(found.coeff, needs(kCoeff), dtype_of(b.coeff));
    return result;
  }

  Backward unpacked() {
    const std::lock_guard<std::mutex> guard(mutex_);
    Backward b;
    b.saved_input = saved_input_.unpack(is_output_saved_ ? getptr() : nullptr);
    b.u = u_.unpack(), b.z = z_.unpack();
    b.rows = rows_.unpack(), b.weight_ids = weight_ids_.unpack();
    b.read = read_.unpack(), b.write = write_.unpack(), b.coeff = coeff_.unpack();
    b.settings = settings_;
    return b;
  }

  static Gradients computed(Backward& b) {
    if (!is_thread_plain() || !is_plain(b.grad)) {  // the operators must be seen
      b.saved_input = as_rows(b.saved_input);
      return compute(b, Route::python);
    }
    const at::AutoDispatchBelowADInplaceOrView below;
    b.saved_input = as_rows(b.saved_input);
    return compute(b, route_of(b.grad));
  }

  // As torch's once_differentiable: the gradients raise when they are differentiated.
  static variable_list differentiable_once(variable_list result) {
    const auto error = make_node<torch::autograd::DelayedError>(
        "trying to differentiate twice a function that was marked with @once_differentiable",
        int64_t(result.size()));
    for (Tensor& gradient : result)
      if (gradient.defined()) gradient = gradient.detach().set_requires_grad(true);
    return (*error)(std::move(result));
  }

  Settings settings_;
  bool is_output_saved_ = false;
  at::ScalarType read_bias_dtype_{}, subtract_bias_dtype_{};
  SavedVariable saved_input_, u_, z_, rows_, weight_ids_, read_, write_, coeff_;
};

bool requires_grad(const Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }

bool has_tangent(const Tensor& tensor) {
  return tensor.defined() && torch::autograd::isFwGradDefined(tensor);
}

// Runs the edit without a graph, with the matrices of its forward pass.
Edited forward(const Edit& edit, Route route) {
  const at::AutoDispatchBelowADInplaceOrView below;
  if (!edit.forward_write.defined()) return compute(edit, route);
  Edit used = edit;
  used.read = edit.forward_read, used.write = edit.forward_write;
  return compute(used, route);
}

}  // namespace

Tensor apply_edit(Edit& edit, PyObject* rows) {
  if (!is_thread_plain() || edit.hidden.dim() < 1 || edit.hidden.size(-1) < 1) return Tensor();
  const Tensor* const inputs[] = {&edit.hidden, &edit.read,          &edit.read_bias,
                                  &edit.write,  &edit.subtract_bias, &edit.coeff};
  for (const Tensor* tensor : inputs)
    if (tensor->defined() && (!is_plain(*tensor) || has_tangent(*tensor))) return Tensor();
  for (const Tensor* tensor :
       {&edit.rows, &edit.weight_ids, &edit.forward_read, &edit.forward_write})
    if (tensor->defined() && !is_plain(*tensor)) return Tensor();
  if (!edit.hidden.is_contiguous()) return Tensor();
  const Route route = route_of(edit.hidden);
  if (route == Route::python || (route == Route::triton && !is_valid_on_gpu(edit, rows)))
    return Tensor();
  edit.save = false;
  if (at::GradMode::is_enabled())
    for (const Tensor* tensor : inputs) edit.save |= requires_grad(*tensor);
  if (!edit.save) {
    Edited edited = forward(edit, route);
    if (edit.in_place && !edit.hidden.is_inference())
      edit.hidden.unsafeGetTensorImpl()->bump_version();
    return std::move(edited.out);
  }
  // Python decides whether these may be edited in place, and explains why not
  if (edit.in_place && (edit.hidden.is_inference() || edit.hidden.is_view() ||
                        (edit.hidden.requires_grad() && edit.hidden.is_leaf())))
    return Tensor();
  auto node = make_node<EditBackward>();
  node->set_next_edges(torch::autograd::collect_next_edges(
      edit.hidden, edit.read, edit.read_bias, edit.write, edit.subtract_bias, edit.coeff));
  const Edited edited = forward(edit, route);
  if (edit.in_place) {
    edit.hidden.unsafeGetTensorImpl()->bump_version();
    node->add_input_metadata(edit.hidden);
    torch::autograd::impl::rebase_history(edit.hidden, {node, 0});
  } else {
    torch::autograd::set_history(edited.out, node);
  }
  node->save(edit, edited);
  return edited.out;
}

}  // namespace reft::host
