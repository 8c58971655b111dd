// Large blocks of host memory that are kept for the next output when a tensor lets go of them.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace reft {

// A block of at least `bytes`, uninitialised; null when the system gives none.
void* pool_take(size_t bytes);

// Takes a block back: kept while all that is kept stays within the limit, else it goes to the
// system.
void pool_give(void* block);

// Whether an output of so many bytes is to come from the pool: there is one, and malloc would map
// the block anew.
bool pool_serves(size_t bytes);

// How much may be kept; what is over it goes to the system, the longest kept first. 0 keeps
// nothing.
void pool_limit(size_t bytes);

struct PoolBytes {
  size_t used, kept;  // held by tensors, and waiting for the next one
};
PoolBytes pool_bytes();

}  // namespace reft
