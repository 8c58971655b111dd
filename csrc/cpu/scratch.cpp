#include "scratch.h"

#include <stdlib.h>

namespace reft {
namespace {

constexpr size_t kCacheLine = 64;
// Size classes of cached blocks: 64 bytes, 128, ... 16 KiB. Larger blocks are not cached.
constexpr int kSizes = 9;
constexpr int kBlocks = 8;  // blocks cached per size class
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kCaches = false;  // AddressSanitizer needs blocks that are really freed
#else
constexpr bool kCaches = true;
#endif

// Index of the size class for `bytes`, or kSizes if such blocks are not cached.
int size_class(size_t bytes) {
  int index = 0;
  for (size_t size = kCacheLine; size < bytes; size *= 2)
    if (++index == kSizes) break;
  return kCaches ? index : kSizes;
}

struct BlockCache {
  void* blocks[kSizes][kBlocks];
  int count[kSizes];
  bool thread_exiting;  // the thread is exiting: blocks are freed, not cached
};
thread_local BlockCache cache;

// Frees a thread's cached blocks when it exits.
struct Owner {
  ~Owner() {
    cache.thread_exiting = true;
    for (int index = 0; index < kSizes; ++index)
      while (cache.count[index] > 0) free(cache.blocks[index][--cache.count[index]]);
  }
};

}  // namespace

void* scratch_take(size_t bytes) {
  const int index = size_class(bytes);
  if (index < kSizes) {
    if (cache.count[index] > 0) return cache.blocks[index][--cache.count[index]];
    bytes = kCacheLine << index;
  }
  void* block = nullptr;
  return posix_memalign(&block, kCacheLine, bytes) == 0 ? block : nullptr;
}

void scratch_give(void* block, size_t bytes) {
  if (block == nullptr) return;
  const int index = size_class(bytes);
  if (index < kSizes && cache.count[index] < kBlocks && !cache.thread_exiting) {
    static thread_local Owner owner;
    (void)owner;
    cache.blocks[index][cache.count[index]++] = block;
  } else {
    free(block);
  }
}

}  // namespace reft
