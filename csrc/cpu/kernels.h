// Table of the kernels of one instruction set. The library has one table for each and selects one.
#pragma once

#include "edit.h"
#include "orthonormal.h"

namespace reft {

template <class T>
struct BuildKernels {
  void (*householder)(const BuildForward<T>&);
  void (*householder_backward)(const BuildBackward<T>&);
  void (*cayley)(const BuildForward<T>&);
  void (*cayley_backward)(const BuildBackward<T>&);
};

struct Kernels {
  const char* name;
  // indexed by the Dtype of the hidden states
  void (*edit[kDtypes])(const EditForward&);
  void (*edit_backward[kDtypes])(const EditBackward&);
  void (*red[kDtypes])(const RedForward&);
  void (*red_backward[kDtypes])(const RedBackward&);
  BuildKernels<float> build_float;
  BuildKernels<double> build_double;
};

#define REFT_DECLARE_KERNELS(isa) \
  namespace isa {                 \
  extern const Kernels kernels;   \
  }
#if defined(__x86_64__)
REFT_DECLARE_KERNELS(avx512bf16)
REFT_DECLARE_KERNELS(avx512)
REFT_DECLARE_KERNELS(avx2)
#endif
REFT_DECLARE_KERNELS(portable)

// Kernels for this machine: the widest supported instruction set, or the one named by the
// environment variable REFT_KERNELS_CPU_ISA.
const Kernels& kernels();

// Reason why an instruction set cannot be used on this machine; null if it can.
const char* unsupported_reason(const char* isa);

}  // namespace reft
