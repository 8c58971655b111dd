// Small cache-line-aligned scratch blocks. Each thread caches freed blocks for its next call,
// because aligned allocation is slow and even a call on a few rows needs about a dozen blocks.
#pragma once

#include <stddef.h>

namespace reft {

// Returns an uninitialized, cache-line-aligned block of at least `bytes`, or null if out of memory.
void* scratch_take(size_t bytes);

// Releases a block from scratch_take(bytes); does nothing if null.
void scratch_give(void* block, size_t bytes);

}  // namespace reft
