// Parallel loops on PyTorch's thread pool, which follow torch.set_num_threads. Implemented in
// registration.cpp.
#pragma once

#include <stdint.h>

namespace reft {

// Calls body(context, begin, end) on disjoint parts of [0, count) of at least `grain` and waits for
// all of them. Rethrows the first exception on the calling thread.
void parallel_for(int64_t count, int64_t grain,
                  void (*body)(void* context, int64_t begin, int64_t end), void* context);

// Same for a callable f(begin, end). Results must not depend on how the range is split: partial
// sums belong to fixed chunks, so results are bit-identical for every number of threads.
template <class F>
inline void parallel_chunks(int64_t count, int64_t grain, const F& f) {
  struct Call {
    static void run(void* context, int64_t begin, int64_t end) {
      (*static_cast<const F*>(context))(begin, end);
    }
  };
  parallel_for(count, grain, &Call::run, const_cast<F*>(&f));
}

// Throws std::bad_alloc. Not inline, because no standard library code may be compiled with the
// flags of one instruction set.
[[noreturn]] void out_of_memory();

}  // namespace reft
