// Conditions under which a call needs no part of PyTorch's dispatcher, and small tensor helpers.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <c10/core/Allocator.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/Storage.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <atomic>
#include <cstdint>
#include <utility>

namespace reft::host {

using at::Tensor;

// Dispatch keys of tensors that are neither subclasses nor wrapped by a function transform.
inline const uint64_t kPlainKeys =
    (c10::DispatchKeySet(c10::DispatchKey::CPU) | c10::DispatchKeySet(c10::DispatchKey::CUDA) |
     c10::DispatchKeySet(c10::DispatchKey::ADInplaceOrView) |
     c10::DispatchKeySet(c10::DispatchKey::AutogradCPU) |
     c10::DispatchKeySet(c10::DispatchKey::AutogradCUDA) | c10::autocast_dispatch_keyset)
        .raw_repr();

inline bool is_plain(const Tensor& tensor) {
  return (tensor.key_set().raw_repr() & ~kPlainKeys) == 0;
}

// Whether no mode, function transform, tracer, profiler or other observer is active in this thread.
inline bool is_thread_plain() {
  const c10::impl::LocalDispatchKeySet keys = c10::impl::tls_local_dispatch_key_set();
  if ((keys.included_.raw_repr() & ~c10::default_included_set.raw_repr()) != 0) return false;
  const uint64_t excluded = keys.excluded_.raw_repr() & ~c10::autocast_dispatch_keyset.raw_repr();
  if (excluded != 0 && !c10::InferenceMode::is_enabled()) return false;
  return !at::impl::torch_function_mode_enabled() &&
         !at::getStepCallbacksUnlessEmpty(at::RecordScope::FUNCTION).has_value();
}

inline bool is_floating(at::ScalarType dtype) {
  return dtype == at::kFloat || dtype == at::kBFloat16 || dtype == at::kHalf ||
         dtype == at::kDouble;
}

inline at::ScalarType accumulation_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

inline std::atomic<bool> poison_outputs{false};  // for tests: fill new memory with 0xff, a NaN

// A tensor of part of some memory, without the cost of a view; a device and keys as those of like.
inline Tensor part_of(const c10::Storage& memory, int64_t byte_offset, at::IntArrayRef sizes,
                      at::ScalarType dtype, const Tensor& like) {
  auto part = c10::make_intrusive<c10::TensorImpl>(c10::Storage(memory), like.key_set(),
                                                   c10::scalarTypeToTypeMeta(dtype));
  if (byte_offset) part->set_storage_offset(byte_offset / int64_t(c10::elementSize(dtype)));
  part->set_sizes_contiguous(sizes);
  return Tensor(std::move(part));
}

// New memory on the device of like, which must be the current one.
inline c10::Storage new_memory(int64_t bytes, const Tensor& like) {
  c10::Storage memory = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), bytes, c10::GetAllocator(like.device().type()), true);
  if (poison_outputs) part_of(memory, 0, {bytes}, at::kByte, like).fill_(0xff);
  return memory;
}

inline int64_t bytes_of(at::IntArrayRef sizes, at::ScalarType dtype) {
  int64_t bytes = int64_t(c10::elementSize(dtype));
  for (const int64_t size : sizes) bytes *= size;
  return bytes;
}

// at::empty without the dispatcher, on the device of like, which must be the current one.
inline Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype, const Tensor& like) {
  return part_of(new_memory(bytes_of(sizes, dtype), like), 0, sizes, dtype, like);
}

// A contiguous [..., d] as [M, d]; must run below autograd.
inline Tensor as_rows(const Tensor& tensor) {
  return tensor.dim() == 2 ? tensor : tensor.reshape({-1, tensor.size(-1)});
}

}  // namespace reft::host
