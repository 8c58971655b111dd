// Edits on the CPU by the kernels of the native CPU library, without its operators.
#pragma once

#include <optional>

#include "call.h"

namespace reft::host {

// Hands over the address of the CPU library's function reft_kernels_cpu_direct; null: none.
void set_cpu_kernels(const void* function);

// Run an edit or a backward pass. Nothing, and then nothing was done, if the operators must serve
// the call: they check all arguments, and report errors.
std::optional<Edited> edit_directly(const Edit& edit);
std::optional<Gradients> backward_directly(const Backward& backward);

}  // namespace reft::host
