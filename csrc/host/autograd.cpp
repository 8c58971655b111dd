#include "autograd.h"

#include <ATen/SavedTensorHooks.h>
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
enum Input { kHidden, kRead, kReadBias, kWrite, kSubtractBias, kCoeff, kInputs };

// Counts of the references to a tensor and to its Python object.
struct References {
  size_t tensor;
  Py_ssize_t object;
  bool operator==(const References& other) const {
    return tensor == other.tensor && object == other.object;
  }
};

References unshared;  // of a tensor with a Python object to which only C++ refers

// Whether nothing but the caller's variable refers to a tensor.
bool is_unshared(const Tensor& tensor) {
  PyObject* object = tensor.unsafeGetTensorImpl()->pyobj_slot()->load_pyobj();
  if (!object) return tensor.use_count() == 1;
  const WithGil gil;
  return References{tensor.use_count(), Py_REFCNT(object)} == unshared;
}

// Whether only the caller holds the gradient and its memory, so that it may be overwritten.
bool is_sole_owner(const Tensor& grad) {
  return grad.storage().use_count() == 1 && !grad.requires_grad() && !grad.is_view() &&
         grad.is_contiguous() && is_unshared(grad);
}

// A tensor that the forward pass made and to which only the node refers. It is kept without
// PyTorch's SavedVariable, unless hooks must see the saved tensors.
class Kept {
 public:
  void set(const Tensor& tensor) {
    if (!tensor.defined()) return;
    if (at::SavedTensorDefaultHooks::get_tls_state().stack.empty())
      tensor_ = tensor;
    else
      variable_ = SavedVariable(tensor, false);
  }
  Tensor get() const { return tensor_.defined() ? tensor_ : variable_.unpack(); }
  void reset() {
    tensor_.reset();
    variable_.reset_data();
  }

 private:
  Tensor tensor_;
  SavedVariable variable_;
};

class EditBackward : public Node {
 public:
  std::string name() const override { return "EditBackward"; }

  void save(const Edit& edit, const Edited& edited) {
    settings_ = edit.settings;
    read_bias_dtype_ = dtype_of(edit.read_bias);
    subtract_bias_dtype_ = dtype_of(edit.subtract_bias);
    // without rows the backward recomputes the input from the output, which saves memory
    if (!edit.rows.defined()) out_ = SavedVariable(edited.out, true);
    saved_input_.set(edited.saved_input);
    u_.set(edited.u);
    z_.set(edited.z);
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

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs&) const override {
    TORCH_CHECK_NOT_IMPLEMENTED(false,
                                "compiled autograd does not support edits by the host library of "
                                "reft_kernels; set REFT_KERNELS_HOST_LIBRARY=0 to use Python");
  }

  void release_variables() override {
    const std::lock_guard<std::mutex> guard(mutex_);
    for (Kept* kept : {&saved_input_, &u_, &z_}) kept->reset();
    for (SavedVariable* saved : {&out_, &rows_, &weight_ids_, &read_, &write_, &coeff_})
      saved->reset_data();
  }

 private:
  static at::ScalarType dtype_of(const Tensor& tensor) {
    return tensor.defined() ? tensor.scalar_type() : at::ScalarType::Undefined;
  }

  bool needs(size_t input) const {
    return input < num_outputs() && task_should_compute_output(input);
  }

  variable_list gradients(Tensor grad, bool may_overwrite) {
    Backward b = unpacked();
    bool needed[kInputs];
    for (size_t i = 0; i < kInputs; ++i) needed[i] = needs(i);
    b.need_hidden = needed[kHidden];
    b.need_weights =
        needed[kRead] || needed[kReadBias] || needed[kWrite] || needed[kSubtractBias];
    b.in_place = b.need_hidden && may_overwrite && is_sole_owner(grad);
    b.grad = std::move(grad);
    Gradients found = computed(b);
    variable_list result(num_outputs());
    result[kHidden] = std::move(found.hidden);
    const auto add = [&](Input input, Tensor& gradient, at::ScalarType dtype) {
      if (needed[input] && gradient.defined())
        result[input] =
            gradient.scalar_type() == dtype ? std::move(gradient) : gradient.to(dtype);
    };
    add(kRead, found.read, dtype_of(b.read));
    add(kReadBias, found.read_bias, read_bias_dtype_);
    add(kWrite, found.write, dtype_of(b.write));
    add(kSubtractBias, found.subtract_bias, subtract_bias_dtype_);
    add(kCoeff, found.coeff, dtype_of(b.coeff));
    return result;
  }

  Backward unpacked() {
    const std::lock_guard<std::mutex> guard(mutex_);
    Backward b;
    b.write = write_.unpack();  // raises if the graph was freed
    b.rows = rows_.unpack();
    b.saved_input = b.rows.defined() ? saved_input_.get() : out_.unpack(getptr());
    b.u = u_.get(), b.z = z_.get(), b.weight_ids = weight_ids_.unpack();
    b.read = read_.unpack(), b.coeff = coeff_.unpack();
    b.settings = settings_;
    b.task = torch::autograd::get_current_graph_task_id();
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
  at::ScalarType read_bias_dtype_{}, subtract_bias_dtype_{};
  Kept saved_input_, u_, z_;
  SavedVariable out_, rows_, weight_ids_, read_, write_, coeff_;  // out_ if there are no rows
};

bool requires_grad(const Tensor& tensor) { return tensor.defined() && tensor.requires_grad(); }

bool has_tangent(const Tensor& tensor) {
  return tensor.defined() && torch::autograd::isFwGradDefined(tensor);
}

// The edges of a node, without those of absent tensors at the end, which cost the engine time.
torch::autograd::edge_list edges_of(const Tensor* const (&inputs)[kInputs]) {
  size_t count = kInputs;
  while (!inputs[count - 1]->defined()) --count;
  torch::autograd::edge_list edges;
  edges.reserve(count);
  for (size_t i = 0; i < count; ++i)
    edges.push_back(inputs[i]->defined() ? torch::autograd::impl::gradient_edge(*inputs[i])
                                         : torch::autograd::Edge());
  return edges;
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

void measure_reference_counts() {
  const Tensor tensor = at::empty({0});
  PyObject* object = wrapped(tensor);
  Py_DECREF(object);  // the tensor keeps it
  unshared = {tensor.use_count(), Py_REFCNT(object)};
}

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
  node->set_next_edges(edges_of(inputs));
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
