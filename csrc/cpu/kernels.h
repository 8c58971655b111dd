// The kernels of one instruction set, as a table; the library holds one for each and picks once.
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
  // by the dtype of the hidden state, in the order of Dtype
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

// The kernels for this machine: the widest it has, or the one that the environment variable
// REFT_KERNELS_CPU_ISA names.
const Kernels& kernels();

// Why a named set cannot serve here; null when it can.
const char* unsupported_reason(const char* isa);

}  // namespace reft
