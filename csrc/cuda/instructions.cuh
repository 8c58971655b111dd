// Instructions without a CUDA C++ function that csrc/cuda uses, each with a branch for the
// emulation of the tests (tests/cuda/emulation), which is no CUDA compiler.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>

namespace reft_cuda {

// Stores 16 aligned bytes to global memory.
__device__ inline void store_global(uint4* to, uint4 value) {
#ifdef __CUDACC__
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(value.x), "r"(value.y),
               "r"(value.z), "r"(value.w)
               : "memory");
#else
  *to = value;
#endif
}

// Starts the copy of 16 aligned bytes from global to shared memory.
__device__ inline void copy_async(void* shared, const void* global) {
#ifdef __CUDACC__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(
                   uint32_t(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
#else
  emulation::copy_async(shared, global, 16);
#endif
}

// Ends a group of this thread's copies. A group may be empty.
__device__ inline void commit_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.commit_group;" ::: "memory");
#else
  emulation::commit_copies();
#endif
}

// Waits until at most GROUPS groups of this thread's copies are incomplete. Other threads see the
// copied bytes after a barrier.
template <int GROUPS>
__device__ inline void wait_copies() {
#ifdef __CUDACC__
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
#else
  emulation::wait_copies(GROUPS);
#endif
}

}  // namespace reft_cuda
