// Compiled once for each instruction set, with REFT_ISA and the compiler flags set by build.py.
#include "kernels.h"

#include "edit_kernels.h"
#include "orthonormal_kernels.h"
#include "red_kernels.h"

namespace reft {
namespace REFT_ISA {

#define REFT_STRING(name) REFT_STRING_OF(name)
#define REFT_STRING_OF(name) #name
#define REFT_BY_DTYPE(kernel) {kernel<float>, kernel<double>, kernel<bf16>, kernel<fp16>}
#define REFT_BUILD(T) {householder<T>, householder_backward<T>, cayley<T>, cayley_backward<T>}

const Kernels kernels = {
    REFT_STRING(REFT_ISA), REFT_BY_DTYPE(edit),         REFT_BY_DTYPE(edit_backward),
    REFT_BY_DTYPE(red),    REFT_BY_DTYPE(red_backward), REFT_BUILD(float),
    REFT_BUILD(double),
};

}  // namespace REFT_ISA
}  // namespace reft
