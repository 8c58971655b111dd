// The emulated machine: CUDA threads are fibers of one CPU thread, which run until they wait or
// end.
//
// The blocks of a cluster and of a cooperative grid are resident together; other blocks run one
// after another. What waits is served depth first, in the order that `set_order` chooses. An error
// of the kernel ends the launch: it is said on stderr, and cudaGetErrorString repeats it.
#pragma once

#include "include/cuda_runtime_api.h"

namespace emulation {

// A place in the sources.
struct Site {
  const char* file;
  int line;
};

enum class Wait { kNothing, kBlock, kCluster, kGrid, kWarp, kEnded };

// The emulated device.
constexpr int kArch = REFT_EMULATED_ARCH;  // 800 or 900: compute capability 8.0 or 9.0
constexpr int kProcessors =
    16;  // few, so that a cooperative grid's threads stay below ThreadSanitizer's limit of fibers
constexpr int kMaxThreads = 1024, kMaxCluster = 8;
constexpr size_t kDefaultShared = 48 * 1024;
constexpr size_t kOptInShared =
    (kArch >= 900 ? 227 : 99) * 1024;  // of the smallest chip of each class

// ---- for kernels

void barrier(Wait kind, Site site);
void sync_warp(unsigned mask, Site site);
uint32_t shuffle_xor(unsigned mask, uint32_t bits, int lane_mask, Site site);
void* remote_shared(void* own, unsigned rank, Site site);

// ---- for the host

enum class Order { kForward, kReverse, kRandom };
void set_order(Order order, unsigned seed);
void set_fill(unsigned char byte);  // of shared memory when a block starts; 0xff: NaN
int64_t launches();                 // since the process started

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(const void*),
                   const void* arguments);

// ---- between runtime.cpp and machine.cpp

// A launch whose limits were checked: blocks that are resident together, in the order of
// blockIdx.x.
struct Grid {
  dim3 blocks, threads;
  size_t shared;
  int together;  // blocks of a cluster or of the cooperative grid, else 1
  bool cluster, cooperative;
  void (*body)(const void*);
  const void* arguments;
};

bool run(const Grid& grid);  // false: the kernel failed
void report(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace emulation
