// Pool of large host memory blocks, reused for later outputs.
#pragma once

#include <stddef.h>
#include <stdint.h>

namespace reft {

// Returns an uninitialized block of at least `bytes`, or null if out of memory.
void* pool_take(size_t bytes);

// Returns a block to the pool, which caches it unless it exceeds the limit.
void pool_give(void* block);

// Whether an output of this size should be allocated from the pool: the pool is enabled and the
// size is one for which malloc would map new memory.
bool pool_serves(size_t bytes);

// Sets how many bytes may be cached, and frees the oldest cached blocks above it. 0 disables the
// pool.
void pool_limit(size_t bytes);

struct PoolBytes {
  size_t used, kept;  // used: held by tensors; kept: cached for reuse
};
PoolBytes pool_bytes();

}  // namespace reft
