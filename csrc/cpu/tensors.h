// Tensors as arguments of the kernels, and the tensors that a call returns.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <atomic>
#include <cstring>
#include <vector>

#include "argument_checks.h"
#include "arguments.h"
#include "edit.h"
#include "host_pool.h"

namespace reft {

// ---- conversion of tensors to kernel arguments

inline Dtype dtype_of(const Tensor& tensor) {
  const int32_t code = code_of(tensor);
  if (code == kCodes.float32) return Dtype::float32;
  if (code == kCodes.bfloat16) return Dtype::bfloat16;
  if (code == kCodes.float16) return Dtype::float16;
  STD_TORCH_CHECK(
      code == kCodes.float64,
      "reft_kernels_cpu: got a dtype that is not float32, float64, bfloat16 or float16");
  return Dtype::float64;
}

inline Tensor dense(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline void make_dense(Tensor& tensor) {
  if (!tensor.is_contiguous()) tensor = torch::stable::contiguous(tensor);
}
inline void make_dense(Optional& tensor) {
  if (tensor) make_dense(*tensor);
}

// Returns [M, d] with channel stride 1, copying only if needed.
inline Tensor with_rows(const Tensor& tensor) {
  return tensor.stride(1) == 1 || tensor.sizes()[1] <= 1 ? tensor
                                                         : torch::stable::contiguous(tensor);
}

inline Typed typed(const Tensor& tensor) { return {tensor.data_ptr(), dtype_of(tensor)}; }
inline Typed typed(const Optional& tensor) { return tensor ? typed(*tensor) : Typed{}; }

inline Rows rows_of(const Tensor& tensor) { return {tensor.data_ptr(), tensor.stride(0)}; }

// Data pointer of a tensor. Empty tensors have a null pointer, which the kernels treat as an output
// that is not needed.
template <class T = void>
T* pointer(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}
template <class T = void>
T* pointer(const Optional& tensor) {
  return tensor ? pointer<T>(*tensor) : nullptr;
}

inline Selection selection_of(int64_t entries, const Optional& rows, const Optional& weight_ids,
                              int64_t sets) {
  Selection s;
  s.entries = entries;
  s.rows = pointer<const int32_t>(rows);
  s.weight_ids = pointer<const int32_t>(weight_ids);
  s.sets = weight_ids ? sets : 1;
  return s;
}

// ---- outputs

inline std::atomic<bool> poison_outputs{false};  // for tests: fill new outputs with NaN

inline Tensor empty(Sizes sizes, int32_t code) {
  int64_t strides[4], count = 1;
  for (int64_t i = int64_t(sizes.size()) - 1; i >= 0; --i)
    strides[i] = count, count *= sizes.begin()[i];
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      int64_t(sizes.size()), sizes.begin(), strides, code, aoti_torch_device_type_cpu(), 0, &made));
  const Tensor out(made);
  if (poison_outputs && count)
    memset(out.data_ptr(), 0xff, size_t(count) * aoti_torch_dtype_element_size(code));
  return out;
}

// Returns an uninitialized tensor, or an empty one if the output is not needed.
inline Tensor empty_if(bool wanted, Sizes sizes, int32_t code) {
  return wanted ? empty(sizes, code) : empty({0}, code);
}

// Returns an uninitialized contiguous tensor with like's shape and dtype; its memory belongs to the
// pool.
inline Tensor pooled_like(Tensor like) {
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

// Returns a contiguous output shaped like `like`: a copy if only some rows will be written, else
// uninitialized.
inline Tensor output_like(const Tensor& like, bool some_rows) {
  const int64_t rows = like.sizes()[0], d = like.sizes()[1];
  Tensor out = pool_serves(size_t(rows * d) * like.element_size())
                   ? pooled_like(like)
                   : empty({rows, d}, code_of(like));
  if (some_rows) torch::stable::copy_(out, like);
  return out;
}

// Output of an in-place call: the tensor itself, or a copy with channel stride 1 that copy_back()
// writes to the tensor.
class InPlaceOutput {
 public:
  explicit InPlaceOutput(const Tensor& out) : out_(out), rows_(with_rows(out)) {}
  const Tensor& rows() const { return rows_; }
  void copy_back() {
    if (rows_.get() != out_.get()) torch::stable::copy_(out_, rows_);
  }

 private:
  Tensor out_, rows_;
};

}  // namespace reft
