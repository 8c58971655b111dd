// Small blocks of scratch memory, saved_input by the thread that lets go of them for its next call:
// a call on a few rows takes a dozen of them, and aligned ones are what malloc is slowest at.
#pragma once

#include <stddef.h>

namespace reft {

// A block of at least `bytes` at a whole cache line; null when the system gives none.
void* scratch_take(size_t bytes);

// Takes a block of scratch_take(bytes) back; null is nothing.
void scratch_give(void* block, size_t bytes);

}  // namespace reft
