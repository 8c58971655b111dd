// malloc maps every block of 32 MiB and more anew, and each new page costs a fault when it is first
// written: together several times what an edit takes. Blocks that come back to a pool are mapped
// already.
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

constexpr size_t kSmallest = size_t(16) << 20;  // malloc keeps and reuses smaller blocks itself
constexpr size_t kHugePage = size_t(2) << 20;
constexpr size_t kMostWaste =
    8;  // a kept block serves when an eighth of it, at most, would lie idle

void* map(size_t bytes) {
  void* data = nullptr;
  if (posix_memalign(&data, kHugePage, bytes) != 0) return nullptr;
#if defined(__linux__)
  madvise(data, bytes,
          MADV_HUGEPAGE);  // advice: without huge pages the block is as good, its first use slower
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
      // the last of equals is the warmest
      if (has >= bytes && has - bytes <= has / kMostWaste &&
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
      if (block.data == nullptr) {  // what is kept may be what is missing
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
    if (bytes < kSmallest) return false;
    const std::lock_guard<std::mutex> guard(lock_);
    return limit_ > 0;
  }

  PoolBytes bytes() {
    const std::lock_guard<std::mutex> guard(lock_);
    return {used_bytes_, kept_bytes_};
  }

 private:
  void shrink(size_t most) {
    size_t gone = 0;
    for (; kept_bytes_ > most; ++gone) {
      free(kept_[gone].data);
      kept_bytes_ -= kept_[gone].bytes;
    }
    kept_.erase(kept_.begin(), kept_.begin() + ptrdiff_t(gone));
  }

  std::mutex lock_;
  std::vector<Block> kept_;  // the longest kept first
  std::unordered_map<void*, size_t> used_;
  size_t limit_ = 0, used_bytes_ = 0, kept_bytes_ = 0;
};

// Never destroyed: tensors may let go of their blocks after static destructors have run.
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
