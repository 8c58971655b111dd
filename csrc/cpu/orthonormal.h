// Householder and Cayley maps on the CPU: arguments of the kernels, as reft_kernels/orthonormal.py
// defines the mathematics.
#pragma once

#include <stdint.h>

namespace reft {

// All tensors contiguous, T = float or double. Optional ones are null.
template <class T>
struct BuildForward {
  int64_t layers, d, r;  // 1 <= r <= min(d, 256)
  const T* X;            // [layers, d, r]
  const T* signs;        // [layers, r] of +-1, or null: all 1
  const T* base;         // [layers, d, r] packed V0 and T0, or null: no base point
  const T* base_point;   // [layers, r, d], with base
  const T* W;            // [layers, r, d], or null: no D is wanted
  T* R;                  // [layers, r, d]
  T* D;                  // [layers, r, d] = W - R, with W
  T* aux;                // [layers, 1, r, r], or [layers, 2, r, r] with base: T or C, then V0^T V
};

template <class T>
struct BuildBackward {
  int64_t layers, d, r;
  const T* grad_R;  // [layers, r, d], or null: zero
  const T* grad_D;  // [layers, r, d], or null: zero; counts against R, for D = W - R
  const T* X;
  const T* signs;
  const T* base;
  const T* aux;  // as the forward wrote it
  T* grad_X;     // [layers, d, r], zero where X is not read
};

}  // namespace reft
