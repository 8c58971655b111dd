// Shared parts of the edit's kernels: element types, vector accesses, activations, warp sums.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "arguments.h"
#include "instructions.cuh"

namespace reft_cuda {

constexpr int kWarp = 32;

__host__ __device__ inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Returns the block's dynamic shared memory.
template <class T>
__device__ inline T* dynamic_shared() {
  extern __shared__ __align__(16) unsigned char dynamic_arena[];
  return reinterpret_cast<T*>(dynamic_arena);
}

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(__half v) { return __half2float(v); }

template <class T>
__device__ inline T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16(v);
}
template <>
__device__ inline __half from_float<__half>(float v) {
  return __float2half(v);
}

// V elements, aligned such that they are loaded and stored by accesses of up to 128 bits.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
  T value[V];
};

template <int BYTES>
struct Word;
template <>
struct Word<2> {
  using Type = uint16_t;
};
template <>
struct Word<4> {
  using Type = uint32_t;
};
template <>
struct Word<8> {
  using Type = uint2;
};
template <>
struct Word<16> {
  using Type = uint4;
};

// Loads V consecutive elements. Does not use the read-only cache, because an edit in place writes
// to the memory that it has read.
template <class T, int V>
__device__ inline Pack<T, V> load_pack(const T* from) {
  return *reinterpret_cast<const Pack<T, V>*>(from);
}

template <class Whole>
__device__ inline void store_whole(Whole* to, Whole value) {
  *to = value;
}
// The compiler splits an assignment of 128 bits if it does not also see how they were computed.
__device__ inline void store_whole(uint4* to, uint4 value) { store_global(to, value); }

// Stores V consecutive elements in accesses of up to 128 bits; those of 128 bits must be to global
// memory. The accesses are of integers, because the assignment of a Pack is split into elements.
template <class T, int V>
__device__ inline void store_pack(T* to, const Pack<T, V>& pack) {
  using Whole = typename Word<alignof(Pack<T, V>)>::Type;
  constexpr int kWords = sizeof(pack) / sizeof(Whole);
  Whole words[kWords];
  memcpy(words, &pack, sizeof pack);
#pragma unroll
  for (int k = 0; k < kWords; ++k) store_whole(reinterpret_cast<Whole*>(to) + k, words[k]);
}

template <class T, int V>
__device__ inline void load(const T* from, float (&to)[V]) {
  const Pack<T, V> pack = load_pack<T, V>(from);
#pragma unroll
  for (int v = 0; v < V; ++v) to[v] = to_float(pack.value[v]);
}

template <class T, int V>
__device__ inline void store(T* to, const float (&from)[V]) {
  Pack<T, V> pack;
#pragma unroll
  for (int v = 0; v < V; ++v) pack.value[v] = from_float<T>(from[v]);
  store_pack<T, V>(to, pack);
}

// Loads one element of a tensor whose dtype is not a template parameter.
__device__ inline float load_any(AnyDtype tensor, int64_t at) {
  if (tensor.dtype == Dtype::kFloat32) return static_cast<const float*>(tensor.data)[at];
  if (tensor.dtype == Dtype::kBFloat16)
    return to_float(static_cast<const __nv_bfloat16*>(tensor.data)[at]);
  return to_float(static_cast<const __half*>(tensor.data)[at]);
}

__device__ inline float sigmoid(float z) {
  float t = expf(-fabsf(z));  // does not overflow
  return z >= 0.0f ? 1.0f / (1.0f + t) : t / (1.0f + t);
}

constexpr float kSqrtHalf = 0.70710678118654752f, kSqrtTwoOverPi = 0.79788456080286536f,
                kGeluCubic = 0.044715f;

__device__ inline float activate(float z, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return z <= 0.0f ? 0.0f : z;  // unlike fmaxf, this propagates NaN
    case Activation::kGelu:
      return 0.5f * z * (1.0f + erff(z * kSqrtHalf));
    case Activation::kGeluTanh:
      return 0.5f * z * (1.0f + tanhf(kSqrtTwoOverPi * (z + kGeluCubic * z * z * z)));
    case Activation::kSilu:
      return z * sigmoid(z);
    case Activation::kTanh:
      return tanhf(z);
    case Activation::kSigmoid:
      return sigmoid(z);
    default:
      return z;
  }
}

__device__ inline float activation_derivative(float z, Activation activation) {
  switch (activation) {
    case Activation::kRelu:
      return z > 0.0f ? 1.0f : 0.0f;
    case Activation::kGelu:
      return 0.5f * (1.0f + erff(z * kSqrtHalf)) + z * expf(-0.5f * z * z) * 0.39894228040143268f;
    case Activation::kGeluTanh: {
      float t = tanhf(kSqrtTwoOverPi * (z + kGeluCubic * z * z * z));
      return 0.5f * (1.0f + t) +
             0.5f * z * (1.0f - t * t) * kSqrtTwoOverPi * (1.0f + 3.0f * kGeluCubic * z * z);
    }
    case Activation::kSilu: {
      float s = sigmoid(z);
      return s * (1.0f + z * (1.0f - s));
    }
    case Activation::kTanh: {
      float t = tanhf(z);
      return 1.0f - t * t;
    }
    case Activation::kSigmoid: {
      float s = sigmoid(z);
      return s * (1.0f - s);
    }
    default:
      return 1.0f;
  }
}

// Returns the sum over a warp in every lane. The order of additions is fixed.
__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int lane = kWarp / 2; lane > 0; lane /= 2) v += __shfl_xor_sync(0xffffffffu, v, lane);
  return v;
}

inline bool aligned(const void* pointer, size_t bytes) {
  return reinterpret_cast<uintptr_t>(pointer) % bytes == 0;
}

}  // namespace reft_cuda
