// Instructions without a CUDA C++ function that csrc/cuda uses, each with a branch for the
// emulation of the tests (tests/cuda/emulation), which is no CUDA compiler.
#pragma once

#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <stdint.h>

#include <type_traits>

namespace reft_cuda {

// Rounds two values to bf16 or fp16. The first is in the lower half of the result.
template <class T>
__device__ inline uint32_t round_pair(float low, float high) {
#ifdef __CUDACC__
  uint32_t both;
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
  return both;
#else
  if constexpr (std::is_same_v<T, __nv_bfloat16>)
    return __float2bfloat16(low).bits | uint32_t(__float2bfloat16(high).bits) << 16;
  else
    return __float2half(low).bits | uint32_t(__float2half(high).bits) << 16;
#endif
}

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

// Adds the product of a [16, 16] and b [16, 8] to the sums [16, 8] of a warp, on the tensor cores:
// m16n8k16, with elements T in the registers of a and b.
template <class T>
__device__ inline void multiply_add(float (&sum)[4], const uint32_t (&a)[4],
                                    const uint32_t (&b)[2]) {
  constexpr bool kBFloat16 = std::is_same_v<T, __nv_bfloat16>;
#ifdef __CUDACC__
  if constexpr (kBFloat16)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  emulation::multiply_add(sum, a, b, 16, kBFloat16, {__builtin_FILE(), __builtin_LINE()});
#endif
}

// The same with a [16, 8] and b [8, 8] in bf16: m16n8k8.
__device__ inline void multiply_add_half(float (&sum)[4], const uint32_t (&a)[2],
                                         const uint32_t (&b)[1]) {
#ifdef __CUDACC__
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
      : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
      : "r"(a[0]), "r"(a[1]), "r"(b[0]));
#else
  emulation::multiply_add(sum, a, b, 8, true, {__builtin_FILE(), __builtin_LINE()});
#endif
}

// ---- Transfers between the shared memory of the blocks of a cluster, from sm_90 (or emulated)

#if !defined(__CUDACC__) || __CUDA_ARCH__ >= 900
#  define REFT_HAS_CLUSTERS
#endif

__device__ inline void sync_cluster() {
#ifdef REFT_HAS_CLUSTERS
  cooperative_groups::this_cluster().sync();
#endif
}

// Makes `arrived` a barrier of which each phase ends when the expected bytes have arrived. Blocks of
// the cluster may send after sync_cluster().
__device__ inline void start_transfers(uint64_t* arrived) {
#if !defined(__CUDACC__)
  emulation::start_transfers(arrived);
#elif defined(REFT_HAS_CLUSTERS)
  asm volatile(
      "mbarrier.init.shared::cta.b64 [%0], 1;\n"
      "fence.mbarrier_init.release.cluster;" ::"r"(uint32_t(__cvta_generic_to_shared(arrived)))
      : "memory");
#endif
}

// Called by one thread in each phase.
__device__ inline void expect_transfers(uint64_t* arrived, unsigned bytes) {
#if !defined(__CUDACC__)
  emulation::expect_transfers(arrived, bytes);
#elif defined(REFT_HAS_CLUSTERS)
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(
                   uint32_t(__cvta_generic_to_shared(arrived))),
               "r"(bytes)
               : "memory");
#endif
}

// Writes four values to the place in the shared memory of block `to` that `place` is in this one,
// and counts them in its barrier `arrived`.
__device__ inline void transfer(float* place, const float (&value)[4], uint64_t* arrived, int to) {
#if !defined(__CUDACC__)
  emulation::transfer(place, value, arrived, unsigned(to), {__builtin_FILE(), __builtin_LINE()});
#elif defined(REFT_HAS_CLUSTERS)
  asm volatile(
      "{\n"
      ".reg .b32 place, arrived;\n"
      "mapa.shared::cluster.u32 place, %0, %2;\n"
      "mapa.shared::cluster.u32 arrived, %1, %2;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 "
      "[place], {%3, %4, %5, %6}, [arrived];\n"
      "}" ::"r"(uint32_t(__cvta_generic_to_shared(place))),
      "r"(uint32_t(__cvta_generic_to_shared(arrived))), "r"(to), "f"(value[0]), "f"(value[1]),
      "f"(value[2]), "f"(value[3])
      : "memory");
#endif
}

// Waits for the end of a phase of this block's barrier; `parity` is that of the number of phases
// before it.
__device__ inline void wait_transfers(uint64_t* arrived, unsigned parity) {
#if !defined(__CUDACC__)
  emulation::wait_transfers(arrived, parity, {__builtin_FILE(), __builtin_LINE()});
#elif defined(REFT_HAS_CLUSTERS)
  uint32_t done = 0;
  while (done == 0)
    asm volatile(
        "{\n"
        ".reg .pred done;\n"
        "mbarrier.try_wait.parity.shared::cta.b64 done, [%1], %2;\n"
        "selp.b32 %0, 1, 0, done;\n"
        "}"
        : "=r"(done)
        : "r"(uint32_t(__cvta_generic_to_shared(arrived))), "r"(parity)
        : "memory");
#endif
}

}  // namespace reft_cuda
