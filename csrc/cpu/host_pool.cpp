// malloc maps large blocks (32 MiB and more) anew for each allocation, and the page faults of the
// first write cost several times as much as an edit. Reusing blocks avoids these faults.
#include "host_pool.h"

#include <stdlib.h>
#if defined(__linux__)
#  include <sys/mman.h>
#endif

#include <mutex>
#include <unordered_map>
#include <vector>

namespace reft {
namespace {

struct Block {
  void* data;
  size_t bytes;
};

constexpr size_t kMinPooledBytes = size_t(16) << 20;  // malloc reuses smaller blocks itself
constexpr size_t kHugePage = size_t(2) << 20;
// A cached block is reused only if at most 1/8 of it stays unused.
constexpr size_t kMaxWasteDivisor = 8;

void* map(size_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, kHugePage, bytes) != 0) return nullptr;
#if defined(__linux__)
  // Only a hint: without huge pages the first write is slower.
  madvise(data, bytes, MADV_HUGEPAGE);
#endif
  return data;
}

class Pool {
 public:
  void* take(size_t bytes) {
    bytes = (bytes + kHugePage - 1) / kHugePage * kHugePage;
    const std::lock_guard<std::mutex> guard(lock_);
    size_t best = kept_.size();
    for (size_t i = 0; i < kept_.size(); ++i) {
      const size_t has = kept_[i].bytes;
      // among equal sizes prefer the last one freed, which is most likely in cache
      if (has >= bytes && has - bytes <= has / kMaxWasteDivisor &&
          (best == kept_.size() || has <= kept_[best].bytes))
        best = i;
    }
    Block block{};
    if (best < kept_.size()) {
      block = kept_[best];
      kept_.erase(kept_.begin() + ptrdiff_t(best));
      kept_bytes_ -= block.bytes;
    } else {
      block = {map(bytes), bytes};
      if (block.data == nullptr) {  // out of memory: free the cached blocks and retry
        shrink(0);
        block.data = map(bytes);
      }
      if (block.data == nullptr) return nullptr;
    }
    used_[block.data] = block.bytes;
    used_bytes_ += block.bytes;
    return block.data;
  }

  void give(void* data) {
    const std::lock_guard<std::mutex> guard(lock_);
    const auto found = used_.find(data);
    const Block block{data, found->second};
    used_.erase(found);
    used_bytes_ -= block.bytes;
    if (block.bytes > limit_) {
      free(data);
      return;
    }
    shrink(limit_ - block.bytes);
    kept_.push_back(block);
    kept_bytes_ += block.bytes;
  }

  void limit(size_t bytes) {
    const std::lock_guard<std::mutex> guard(lock_);
    limit_ = bytes;
    shrink(bytes);
  }

  bool serves(size_t bytes) {
    if (bytes < kMinPooledBytes) return false;
    const std::lock_guard<std::mutex> guard(lock_);
    return limit_ > 0;
  }

  PoolBytes bytes() {
    const std::lock_guard<std::mutex> guard(lock_);
    return {used_bytes_, kept_bytes_};
  }

 private:
  void shrink(size_t most) {
    size_t freed = 0;
    for (; kept_bytes_ > most; ++freed) {
      free(kept_[freed].data);
      kept_bytes_ -= kept_[freed].bytes;
    }
    kept_.erase(kept_.begin(), kept_.begin() + ptrdiff_t(freed));
  }

  std::mutex lock_;
  std::vector<Block> kept_;  // oldest first
  std::unordered_map<void*, size_t> used_;
  size_t limit_ = 0, used_bytes_ = 0, kept_bytes_ = 0;
};

// Never destroyed, because tensors may release blocks after static destructors have run.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

}  // namespace

void* pool_take(size_t bytes) { return pool().take(bytes); }
void pool_give(void* block) { pool().give(block); }
bool pool_serves(size_t bytes) { return pool().serves(bytes); }
void pool_limit(size_t bytes) { pool().limit(bytes); }
PoolBytes pool_bytes() { return pool().bytes(); }

}  // namespace reft
