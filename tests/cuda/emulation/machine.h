// Emulation of a GPU. CUDA threads are fibers of one CPU thread, which run until they wait or end.
//
// The blocks of a cluster or a cooperative grid are resident together; other blocks run one after
// another. Waiting threads resume depth first, in the order selected by `set_order`. An error in a
// kernel ends the launch. Its message is printed to stderr and returned by cudaGetErrorString.
#pragma once

#include "include/cuda_runtime_api.h"

namespace emulation {

// A source location.
struct Site {
  const char* file;
  int line;
};

enum class Wait { kNothing, kBlock, kCluster, kGrid, kWarp, kTransfer, kEnded };

// The emulated device.
constexpr int kArch = REFT_EMULATED_ARCH;  // 800 or 900: compute capability 8.0 or 9.0
constexpr int kProcessors =
    16;  // small, because ThreadSanitizer limits the number of fibers
constexpr int kMaxThreads = 1024, kMaxCluster = 8;
constexpr size_t kDefaultShared = 48 * 1024;
constexpr size_t kOptInShared =
    (kArch >= 900 ? 227 : 99) * 1024;  // that of the smallest chip of each class

// functions for kernels

void barrier(Wait kind, Site site);
void sync_warp(unsigned mask, Site site);
uint32_t shuffle_xor(unsigned mask, uint32_t bits, int lane_mask, Site site);
uint32_t shuffle(unsigned mask, uint32_t bits, int lane, Site site);
// Asynchronous copies to shared memory. In forward order they take place when they are waited for,
// in reverse order when they start, in random order at either time.
void copy_async(void* to, const void* from, unsigned bytes);
void commit_copies();
void wait_copies(unsigned groups);
void* remote_shared(void* own, unsigned rank, Site site);
// Transfers between the blocks of a cluster: see csrc/cuda/instructions.cuh. The bytes arrive with
// the last ones of their phase, in reverse order when they are sent.
void start_transfers(uint64_t* arrived);
void expect_transfers(uint64_t* arrived, unsigned bytes);
void transfer(float* place, const float (&value)[4], uint64_t* arrived, unsigned to, Site site);
void wait_transfers(uint64_t* arrived, unsigned parity, Site site);
// Waits for the other lanes of the warp; then the last one calls `last` with the operands of each.
void with_lanes(void* operands, void (*last)(void* const* lanes), Site site);
// In tensor.cpp: sum += a b, with a [16, depth] and b [depth, 8] in bf16 or fp16, in the layout of
// mma.sync. The exact sum is rounded toward zero once.
void multiply_add(float (&sum)[4], const uint32_t* a, const uint32_t* b, int depth, bool bf16,
                  Site site);

// functions for the host

enum class Order { kForward, kReverse, kRandom };
void set_order(Order order, unsigned seed);
void set_fill(unsigned char byte);  // initial value of shared memory bytes; 0xff gives NaN
int64_t launches();                 // number of launches of the process

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(const void*),
                   const void* arguments);

// functions that runtime.cpp calls

// A launch whose limits have been checked. Blocks are in the order of blockIdx.x.
struct Grid {
  dim3 blocks, threads;
  size_t shared;
  int together;  // resident blocks: those of a cluster or cooperative grid, else 1
  bool cluster, cooperative;
  void (*body)(const void*);
  const void* arguments;
};

bool run(const Grid& grid);  // returns false if the kernel failed
void report(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emulation
