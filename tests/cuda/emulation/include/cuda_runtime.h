// Emulation of the parts of CUDA C++ that csrc/cuda uses. Implemented in machine.cpp.
#pragma once

#include <string.h>

#include <tuple>
#include <type_traits>
#include <utility>

#include "../machine.h"
#include "cuda_runtime_api.h"

#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)
// weak, so that `extern __shared__` compiles and a static __shared__ array, which would be private
// to a thread, does not
#define __shared__ __attribute__((weak))
// `extern __shared__ T dynamic_arena[]` declares a pointer to an array, and the name expands to the
// array
#define dynamic_arena (*dynamic_arena)

namespace reft_cuda {
// dynamic shared memory of the running block, set by machine.cpp
extern unsigned char dynamic_arena[];
}

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;

template <class T>
inline std::enable_if_t<std::is_integral_v<T>, T> min(T a, T b) {
  return b < a ? b : a;
}

inline int __ffs(int bits) { return __builtin_ffs(bits); }

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  emulation::barrier(emulation::Wait::kBlock, {file, line});
}

inline void __syncwarp(unsigned mask = 0xffffffffu, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  emulation::sync_warp(mask, {file, line});
}

inline float __shfl_xor_sync(unsigned mask, float value, int lane_mask,
                             const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  bits = emulation::shuffle_xor(mask, bits, lane_mask, {file, line});
  memcpy(&value, &bits, sizeof bits);
  return value;
}

inline int __shfl_sync(unsigned mask, int value, int lane, const char* file = __builtin_FILE(),
                       int line = __builtin_LINE()) {
  return int(emulation::shuffle(mask, uint32_t(value), lane, {file, line}));
}

template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel* kernel) {
  return cudaFuncGetAttributes(attributes, reinterpret_cast<const void*>(kernel));
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute attribute, int value) {
  return cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

// A multiprocessor holds one block.
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, Kernel*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel*,
                                           const cudaLaunchConfig_t* config) {
  *clusters = emulation::kProcessors / int(config->attrs[0].val.clusterDim.x);
  return cudaSuccess;
}

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Actual&&... actual) {
  static_assert((sizeof(Expected) + ... + 0) <= 4096, "a kernel's parameters take at most 4 KiB");
  using Arguments = std::tuple<void (*)(Expected...), std::remove_cv_t<Expected>...>;
  const Arguments arguments(kernel, std::forward<Actual>(actual)...);
  const auto body = [](const void* given) {
    std::apply([](auto function, const auto&... each) { function(each...); },
               *static_cast<const Arguments*>(given));
  };
  return emulation::launch(*config, reinterpret_cast<const void*>(kernel), body, &arguments);
}
