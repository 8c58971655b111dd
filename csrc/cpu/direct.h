// Access to the kernels without PyTorch's dispatcher and argument checks.
#pragma once

#include <stdint.h>

#include "kernels.h"

namespace reft {

// Changes with the layout of the structs that cross the boundary of the library.
constexpr uint64_t kDirectLayout =
    (1ull << 48) | (uint64_t(sizeof(EditForward)) << 32) | (uint64_t(sizeof(EditBackward)) << 16) |
    uint64_t(sizeof(Kernels));

}  // namespace reft

// Returns the kernels for this machine; null if the caller was built for another layout.
extern "C" const reft::Kernels* reft_kernels_cpu_direct(uint64_t layout);
