// Loops over PyTorch's own thread pool: torch.set_num_threads is obeyed. Defined where the library
// meets PyTorch.
#pragma once

#include <stdint.h>

namespace reft {

// Calls body(context, begin, end) over disjoint parts of [0, count), each of at least `grain`;
// returns when all are done. What a body throws first is thrown again then, on the calling thread.
void parallel_for(int64_t count, int64_t grain,
                  void (*body)(void* context, int64_t begin, int64_t end), void* context);

// The same for a callable f(begin, end). What a thread computes must not depend on how the range is
// cut: results are bit-identical for every number of threads because partial sums belong to fixed
// chunks, never to threads.
template <class F>
inline void parallel_chunks(int64_t count, int64_t grain, const F& f) {
  struct Call {
    static void run(void* context, int64_t begin, int64_t end) {
      (*static_cast<const F*>(context))(begin, end);
    }
  };
  parallel_for(count, grain, &Call::run, const_cast<F*>(&f));
}

// Throws std::bad_alloc; here, for no code of the standard library may be compiled for one
// instruction set.
[[noreturn]] void out_of_memory();

}  // namespace reft
