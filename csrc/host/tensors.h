// Conditions under which a call needs no part of PyTorch's dispatcher, and small tensor helpers.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/record_function.h>
#include <c10/core/InferenceMode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>

#include <atomic>
#include <cstdint>

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

inline Tensor empty(at::IntArrayRef sizes, at::ScalarType dtype, const Tensor& like) {
  const auto options = at::TensorOptions().dtype(dtype).device(like.device());
  if (!poison_outputs) return at::empty(sizes, options);
  int64_t count = int64_t(c10::elementSize(dtype));
  for (const int64_t size : sizes) count *= size;
  const Tensor bytes = at::empty({count}, options.dtype(at::kByte)).fill_(0xff);
  return bytes.view(dtype).view(sizes);
}

// A contiguous [..., d] as [M, d]; must run below autograd.
inline Tensor as_rows(const Tensor& tensor) {
  return tensor.dim() == 2 ? tensor : tensor.reshape({-1, tensor.size(-1)});
}

}  // namespace reft::host
