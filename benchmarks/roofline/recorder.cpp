// A CUDA runtime that records launches instead of making them. The host code of csrc/cuda, compiled
// by nvcc, is linked with it, so that grids, blocks, clusters, shared memory and arguments are those
// of a GPU. benchmarks/roofline/native_launches.py describes the GPU and reads the launches.
#include <cuda_runtime_api.h>
#include <stdint.h>

#include <map>
#include <string>
#include <vector>

namespace {

struct Launch {
  std::string kernel;
  dim3 grid, block, cluster;
  size_t shared;
};

// Returns the bytes of a kernel's arguments, one after another.
using Sizes = int (*)(const char* kernel, int* sizes);
using Occupancy = int (*)(const char* kernel, int threads, size_t shared, int cluster);

struct State {
  std::map<const void*, std::string> kernels;
  std::vector<Launch> launches;
  std::vector<std::vector<unsigned char>> bytes;
  int capability = 90, processors = 132;
  Sizes sizes = nullptr;
  Occupancy occupancy = nullptr;
};

State& state() {
  static State one;
  return one;
}

constexpr int kMostArguments = 16;

const std::string& name_of(const void* kernel) { return state().kernels.at(kernel); }

unsigned cluster_of(const cudaLaunchConfig_t* config) {
  for (unsigned k = 0; k < config->numAttrs; ++k)
    if (config->attrs[k].id == cudaLaunchAttributeClusterDimension)
      return config->attrs[k].val.clusterDim.x;
  return 1;
}

}  // namespace

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void roofline_device(int capability, int processors, Sizes sizes, Occupancy occupancy) {
  state().capability = capability;
  state().processors = processors;
  state().sizes = sizes;
  state().occupancy = occupancy;
}
EXPORT int roofline_launches() { return int(state().launches.size()); }
EXPORT void roofline_clear() {
  state().launches.clear();
  state().bytes.clear();
}
EXPORT const char* roofline_kernel(int launch) { return state().launches[launch].kernel.c_str(); }
// Writes the three axes of the grid, the threads, the cluster, the shared memory and the number of
// bytes of the arguments.
EXPORT void roofline_launch(int launch, int64_t* to) {
  const Launch& one = state().launches[launch];
  const int64_t values[] = {one.grid.x, one.grid.y, one.grid.z, one.block.x, one.cluster.x,
                            int64_t(one.shared), int64_t(state().bytes[launch].size())};
  for (int k = 0; k < 7; ++k) to[k] = values[k];
}
EXPORT const unsigned char* roofline_arguments(int launch) { return state().bytes[launch].data(); }

// ---- What nvcc's host code calls when it is loaded

extern "C" {

void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* device, int, uint3*,
                            uint3*, dim3*, dim3*, int*) {
  state().kernels[host] = device;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void*) { return 1; }  // no <<<>>> launches
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) {
  return cudaErrorNotSupported;
}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) {
  return cudaErrorNotSupported;
}

// ---- The runtime's functions that csrc/cuda calls

cudaError_t cudaGetLastError() { return cudaSuccess; }
const char* cudaGetErrorString(cudaError_t) { return "an error of the recorded launch"; }
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = state().processors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = state().capability / 10;
      return cudaSuccess;
    default:
      return cudaErrorNotSupported;
  }
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->ptxVersion = attributes->binaryVersion = state().capability;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveClusters(int* count, const void* kernel,
                                           const cudaLaunchConfig_t* config) {
  *count = state().occupancy(name_of(kernel).c_str(), int(config->blockDim.x),
                             config->dynamicSmemBytes, int(cluster_of(config)));
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void* kernel,
                                                                   int threads, size_t shared,
                                                                   unsigned) {
  *count = state().occupancy(name_of(kernel).c_str(), threads, shared, 0);
  return cudaSuccess;
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* kernel,
                                void** arguments) {
  State& s = state();
  const std::string& name = name_of(kernel);
  int sizes[kMostArguments];
  const int count = s.sizes(name.c_str(), sizes);
  std::vector<unsigned char> bytes;
  for (int k = 0; k < count; ++k) {
    const auto* from = static_cast<const unsigned char*>(arguments[k]);
    const size_t align = sizes[k] > 8 ? 8 : sizes[k];
    bytes.resize((bytes.size() + align - 1) / align * align);
    bytes.insert(bytes.end(), from, from + sizes[k]);
  }
  s.bytes.push_back(bytes);
  s.launches.push_back({name, config->gridDim, config->blockDim,
                        dim3(cluster_of(config)), config->dynamicSmemBytes});
  return cudaSuccess;
}

}  // extern "C"
