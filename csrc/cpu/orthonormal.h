// Arguments of the CPU Householder and Cayley kernels. The mathematics is defined in
// reft_kernels/orthonormal.py.
#pragma once

#include <stdint.h>

namespace reft {

// All tensors are contiguous, T = float or double. Optional tensors are null if absent.
template <class T>
struct BuildForward {
  int64_t layers, d, r;  // 1 <= r <= min(d, 256)
  const T* X;            // [layers, d, r]
  const T* signs;        // [layers, r] of +-1, or null: all 1
  const T* base;         // [layers, d, r], packed V0 and T0; null: no base point
  const T* base_point;   // [layers, r, d]; required with base
  const T* W;            // [layers, r, d]; null: D is not computed
  T* R;                  // [layers, r, d]
  T* D;                  // [layers, r, d], D = W - R; with W only
  // [layers, 1, r, r], or [layers, 2, r, r] with base: T (Householder) or C (Cayley), then V0^T V.
  T* aux;
};

template <class T>
struct BuildBackward {
  int64_t layers, d, r;
  const T* grad_R;  // [layers, r, d], or null: zero
  const T* grad_D;  // [layers, r, d], or null: zero; subtracted from grad_R, as D = W - R
  const T* X;
  const T* signs;
  const T* base;
  const T* aux;  // as computed by the forward
  T* grad_X;     // [layers, d, r]; zero for elements of X that the map ignores
};

}  // namespace reft
