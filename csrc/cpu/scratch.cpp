#include "scratch.h"

#include <stdlib.h>

namespace reft {
namespace {

constexpr size_t kLine = 64;
constexpr int kSizes = 9;   // blocks of 64 bytes, 128, ... 16 KiB are saved_input; larger ones are
                            // what a call of many rows takes
constexpr int kBlocks = 8;  // of each size
#if defined(__SANITIZE_ADDRESS__)
constexpr bool kKeeps = false;  // a saved_input block would hide what is read of it after its end
#else
constexpr bool kKeeps = true;
#endif

// The size's number, or kSizes when blocks of it are not saved_input.
int number_of(size_t bytes) {
  int number = 0;
  for (size_t size = kLine; size < bytes; size *= 2)
    if (++number == kSizes) break;
  return kKeeps ? number : kSizes;
}

struct Kept {
  void* blocks[kSizes][kBlocks];
  int count[kSizes];
  bool over;  // the thread is ending: what comes now goes to the system
};
thread_local Kept saved_input;

// Gives a thread's blocks back when it ends.
struct Owner {
  ~Owner() {
    saved_input.over = true;
    for (int number = 0; number < kSizes; ++number)
      while (saved_input.count[number] > 0)
        free(saved_input.blocks[number][--saved_input.count[number]]);
  }
};

}  // namespace

void* scratch_take(size_t bytes) {
  const int number = number_of(bytes);
  if (number < kSizes) {
    if (saved_input.count[number] > 0)
      return saved_input.blocks[number][--saved_input.count[number]];
    bytes = kLine << number;
  }
  void* block = nullptr;
  return posix_memalign(&block, kLine, bytes) == 0 ? block : nullptr;
}

void scratch_give(void* block, size_t bytes) {
  if (block == nullptr) return;
  const int number = number_of(bytes);
  if (number < kSizes && saved_input.count[number] < kBlocks && !saved_input.over) {
    static thread_local Owner owner;
    (void)owner;
    saved_input.blocks[number][saved_input.count[number]++] = block;
  } else {
    free(block);
  }
}

}  // namespace reft
