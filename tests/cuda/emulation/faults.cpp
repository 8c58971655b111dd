// Kernels with one fault each, which the emulation or a sanitizer must report, and correct kernels,
// which they must not report.
//
//     faults CASE
//
// The exit code is 0 if the launch succeeded and the output is correct, 3 if the output is wrong,
// and 4 if the launch failed. Sanitizers have exit codes of their own.
#include <cooperative_groups.h>
#include <stdio.h>
#include <string.h>

#include <string>
#include <vector>

#include "common.cuh"

namespace {

using reft_cuda::dynamic_shared;

constexpr int kThreads = 64;

__device__ int thread() { return int(threadIdx.x); }

// out[i] = the index of the mirrored thread, read from shared memory
__global__ void sound(float* out) {
  float* shared = dynamic_shared<float>();
  shared[thread()] = float(thread());
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = shared[kThreads - 1 - thread()];
}

__global__ void missing_barrier(float* out) {
  float* shared = dynamic_shared<float>();
  shared[thread()] = float(thread());
  out[blockIdx.x * kThreads + threadIdx.x] = shared[kThreads - 1 - thread()];
}

// the second write to shared memory may happen before the first value is read
__global__ void missing_second_barrier(float* out) {
  float* shared = dynamic_shared<float>();
  for (int pass = 0; pass < 2; ++pass) {
    shared[thread()] = float(thread());
    __syncthreads();
    out[blockIdx.x * kThreads + threadIdx.x] = shared[kThreads - 1 - thread()];
  }
}

__global__ void shuffle_as_barrier(float* out) {
  float* shared = dynamic_shared<float>();
  shared[thread()] = float(thread());
  __shfl_xor_sync(0xffffffffu, 0.0f, 1);
  out[blockIdx.x * kThreads + threadIdx.x] = shared[thread() ^ 1];
}

__global__ void warp_barrier(float* out) {
  float* shared = dynamic_shared<float>();
  shared[thread()] = float(thread() ^ 1);
  __syncwarp();
  out[blockIdx.x * kThreads + threadIdx.x] =
      float(kThreads - 1 - thread()) + 0.0f * shared[thread() ^ 1];
}

__global__ void blocks_write_one_place(float* out) {
  out[blockIdx.x * kThreads + threadIdx.x] = float(kThreads - 1 - thread());
  if (thread() == 0) out[0] = float(kThreads - 1);
}

__global__ void divergent_barrier(float* out) {
  if (thread() < 40) __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = float(kThreads - 1 - thread());
}

__global__ void two_barriers(float* out) {
  if (thread() < 32)
    __syncthreads();
  else
    __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = float(kThreads - 1 - thread());
}

__global__ void partial_shuffle(float* out) {
  float value = float(kThreads - 1 - thread());
  if (thread() % 32 < 16) value = __shfl_xor_sync(0xffffffffu, value, 0);
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = value;
}

__global__ void overrun(float* out) {
  float* shared = dynamic_shared<float>();
  shared[thread() + 1] = float(thread());  // the last thread writes past the end
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = float(kThreads - 1 - thread());
}

__global__ void far_overrun(float* out) {
  float* shared = dynamic_shared<float>();
  shared[thread() + 4096] = float(thread());
  out[blockIdx.x * kThreads + threadIdx.x] = float(kThreads - 1 - thread());
}

__global__ void overrun_of_global_memory(float* out) {
  out[blockIdx.x * kThreads + threadIdx.x + 1] = 0.0f;
}

__global__ void uninitialised(float* out) {
  float* shared = dynamic_shared<float>();
  if (thread() != 5) shared[thread()] = float(thread());
  __syncthreads();
  out[blockIdx.x * kThreads + threadIdx.x] = shared[kThreads - 1 - thread()];
}

__global__ void misaligned(float* out) {
  float* shared = dynamic_shared<float>();
  float pair[2] = {0.0f, 0.0f};
  shared[thread()] = 0.0f;
  __syncthreads();
  if (thread() < 8) reft_cuda::load<float, 2>(shared + 1 + thread(), pair);
  out[blockIdx.x * kThreads + threadIdx.x] = float(kThreads - 1 - thread()) + pair[0];
}

template <bool SYNC_BEFORE, bool SYNC_AFTER>
__global__ void neighbour(float* out) {
  float* shared = dynamic_shared<float>();
  const auto cluster = cooperative_groups::this_cluster();
  shared[thread()] = float(thread());
  if (SYNC_BEFORE) cluster.sync();
  const float* other = cluster.map_shared_rank(shared, (blockIdx.x + 1) % 2);
  out[blockIdx.x * kThreads + threadIdx.x] = other[kThreads - 1 - thread()];
  if (SYNC_AFTER) cluster.sync();
}

template <bool WAIT>
__global__ void asynchronous_copy(float* out) {
  float* shared = dynamic_shared<float>();
  const int at = thread() / 4 * 4;
  float* mine = out + blockIdx.x * kThreads;
  mine[thread()] = float(kThreads - 1 - thread());
  __syncthreads();
  if (thread() % 4 == 0) reft_cuda::copy_async(shared + at, mine + at);
  reft_cuda::commit_copies();
  if (WAIT) reft_cuda::wait_copies<0>();
  __syncthreads();
  mine[thread()] = shared[thread()];
}

// out[i] = the index of the mirrored thread of the other block, sent by it
template <bool WAIT, int BYTES>
__global__ void transfer(float* out) {
  float* shared = dynamic_shared<float>();
  auto* arrived = reinterpret_cast<uint64_t*>(shared + kThreads);
  if (thread() == 0) reft_cuda::start_transfers(arrived);
  reft_cuda::sync_cluster();
  if (thread() == 0) reft_cuda::expect_transfers(arrived, BYTES);
  if (thread() % 4 == 0) {
    const float last = float(kThreads - 1 - thread());
    const float value[4] = {last, last - 1, last - 2, last - 3};
    reft_cuda::transfer(shared + thread(), value, arrived, (blockIdx.x + 1) % 2);
  }
  if (WAIT) reft_cuda::wait_transfers(arrived, 0);
  out[blockIdx.x * kThreads + threadIdx.x] = shared[thread()];
  reft_cuda::sync_cluster();
}

template <bool SYNC>
__global__ void over_the_grid(float* out) {
  float* mine = out + blockIdx.x * kThreads;
  mine[thread()] = float(kThreads - 1 - thread());
  if (SYNC) cooperative_groups::this_grid().sync();
  const float other = out[(blockIdx.x + 1) % gridDim.x * kThreads + threadIdx.x];
  if (SYNC) cooperative_groups::this_grid().sync();
  mine[thread()] = other;
}

enum Kind { kPlain, kCluster, kCooperative };

struct Case {
  const char* name;
  void (*kernel)(float*);
  Kind kind;
  int blocks = 2, threads = kThreads, together = 2;
  size_t shared = kThreads * sizeof(float);
};

const Case kCases[] = {
    {"sound", sound, kPlain},
    {"warp barrier", warp_barrier, kPlain},
    {"missing barrier", missing_barrier, kPlain},
    {"missing second barrier", missing_second_barrier, kPlain},
    {"shuffle as barrier", shuffle_as_barrier, kPlain},
    {"blocks write one place", blocks_write_one_place, kPlain},
    {"divergent barrier", divergent_barrier, kPlain},
    {"two barriers", two_barriers, kPlain},
    {"partial shuffle", partial_shuffle, kPlain},
    {"overrun", overrun, kPlain},
    {"overrun by a few bytes", sound, kPlain, 2, kThreads, 2, kThreads * sizeof(float) - 4},
    {"far overrun", far_overrun, kPlain},
    {"overrun of global memory", overrun_of_global_memory, kPlain},
    {"uninitialised", uninitialised, kPlain},
    {"misaligned", misaligned, kPlain},
    {"sound cluster", neighbour<true, true>, kCluster},
    {"cluster without a first barrier", neighbour<false, true>, kCluster},
    {"cluster without a last barrier", neighbour<true, false>, kCluster},
    {"sound copy", asynchronous_copy<true>, kPlain},
    {"copy without a wait", asynchronous_copy<false>, kPlain},
    {"sound transfer", transfer<true, 256>, kCluster, 2, kThreads, 2, 272},
    {"transfer without a wait", transfer<false, 256>, kCluster, 2, kThreads, 2, 272},
    {"transfer of too few bytes", transfer<true, 512>, kCluster, 2, kThreads, 2, 272},
    {"sound grid", over_the_grid<true>, kCooperative},
    {"grid without a barrier", over_the_grid<false>, kCooperative},
    {"grid barrier in a plain launch", over_the_grid<true>, kPlain},
    {"no threads", sound, kPlain, 2, 0},
    {"too many threads", sound, kPlain, 2, 1056},
    {"too much shared memory", sound, kPlain, 2, kThreads, 2, 49 * 1024},
    {"blocks that are no whole clusters", sound, kCluster, 3},
    {"a cluster of sixteen", sound, kCluster, 16, kThreads, 16},
    {"a cooperative grid that is not resident", sound, kCooperative, emulation::kProcessors + 1},
};

int run(const Case& chosen) {
  std::vector<float> out(size_t(chosen.blocks) * kThreads, NAN);
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(unsigned(chosen.blocks));
  config.blockDim = dim3(unsigned(chosen.threads));
  config.dynamicSmemBytes = chosen.shared;
  cudaLaunchAttribute attribute = {};
  if (chosen.kind == kCluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim = {unsigned(chosen.together), 1, 1};
  } else {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = 1;
  }
  config.attrs = &attribute;
  config.numAttrs = chosen.kind == kPlain ? 0 : 1;
  const cudaError_t error = cudaLaunchKernelEx(&config, chosen.kernel, out.data());
  if (error != cudaSuccess) {
    printf("failed: %s\n", cudaGetErrorString(error));
    return 4;
  }
  for (size_t k = 0; k < out.size(); ++k)
    if (out[k] != float(kThreads - 1 - int(k) % kThreads)) {
      printf("out[%zu] is %g\n", k, double(out[k]));
      return 3;
    }
  return 0;
}

}  // namespace

int main(int count, char** arguments) {
  const std::string order = count > 2 ? arguments[2] : "forward";
  emulation::set_order(order == "forward" ? emulation::Order::kForward : emulation::Order::kReverse,
                       0);
  for (const Case& each : kCases)
    if (count > 1 && strcmp(each.name, arguments[1]) == 0) return run(each);
  printf("no such case\n");
  return 2;
}
