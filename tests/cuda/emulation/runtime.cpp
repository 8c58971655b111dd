// Host functions of the emulated runtime: devices, attributes and launch limits.
#include <stdarg.h>
#include <stdio.h>

#include <map>
#include <string>

#include "machine.h"

namespace {

cudaError_t last_error = cudaSuccess;
std::string last_report;
std::map<const void*, size_t> granted;  // dynamic shared memory, by kernel
int64_t launched = 0;

cudaError_t remember(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

size_t shared_limit(const void* kernel) {
  const auto found = granted.find(kernel);
  return found == granted.end() ? emulation::kDefaultShared : found->second;
}

bool fits(const dim3& blocks, const dim3& threads) {
  const auto some = [](const dim3& size) { return size.x > 0 && size.y > 0 && size.z > 0; };
  const bool near =
      blocks.x <= 0x7fffffffu && blocks.y <= 65535 && blocks.z <= 65535 && threads.z <= 64;
  return some(blocks) && some(threads) && near &&
         uint64_t(threads.x) * threads.y * threads.z <= uint64_t(emulation::kMaxThreads);
}

}  // namespace

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  return remember(device == 0 ? cudaSuccess : cudaErrorInvalidValue);
}

cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    default:
      return last_report.c_str();
  }
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return remember(cudaErrorInvalidValue);
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = emulation::kProcessors;
      return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor:
      *value = emulation::kArch / 100;
      return cudaSuccess;
  }
  return remember(cudaErrorInvalidValue);
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel) {
  *attributes = {};
  attributes->ptxVersion = attributes->binaryVersion = emulation::kArch / 10;
  attributes->maxThreadsPerBlock = emulation::kMaxThreads;
  attributes->maxDynamicSharedSizeBytes = int(shared_limit(kernel));
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  const bool valid = attribute == cudaFuncAttributeMaxDynamicSharedMemorySize && value >= 0;
  if (!valid || size_t(value) > emulation::kOptInShared) return remember(cudaErrorInvalidValue);
  granted[kernel] = size_t(value);
  return cudaSuccess;
}

namespace emulation {

int64_t launches() { return launched; }

void report(const char* format, ...) {
  char text[1024];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  last_report = text;
  fprintf(stderr, "emulation: %s\n", text);
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*body)(const void*),
                   const void* arguments) {
  const auto refuse = [](cudaError_t error) { return remember(error); };
  Grid grid = {config.gridDim, config.blockDim, config.dynamicSmemBytes, 1, false, false,
               body,           arguments};
  dim3 cluster;
  for (unsigned k = 0; k < config.numAttrs; ++k) {
    const cudaLaunchAttribute& attribute = config.attrs[k];
    if (attribute.id == cudaLaunchAttributeCooperative) {
      grid.cooperative = attribute.val.cooperative != 0;
    } else {
      grid.cluster = true;
      cluster =
          dim3(attribute.val.clusterDim.x, attribute.val.clusterDim.y, attribute.val.clusterDim.z);
    }
  }
  if (!fits(grid.blocks, grid.threads)) {
    report("a launch of %u x %u x %u blocks of %u threads", grid.blocks.x, grid.blocks.y,
           grid.blocks.z, grid.threads.x);
    return refuse(cudaErrorInvalidConfiguration);
  }
  if (grid.shared > shared_limit(kernel)) {
    report("a launch with %zu bytes of dynamic shared memory, the kernel is granted %zu",
           grid.shared, shared_limit(kernel));
    return refuse(cudaErrorInvalidValue);
  }
  const bool valid = kArch >= 900 && cluster.x > 0 && cluster.x <= unsigned(kMaxCluster) &&
                     cluster.y == 1 && cluster.z == 1 && grid.blocks.x % cluster.x == 0;
  if (grid.cluster && !valid) {
    report("a launch of %u blocks in clusters of %u", grid.blocks.x, cluster.x);
    return refuse(cudaErrorInvalidConfiguration);
  }
  if (grid.cluster) grid.together = int(cluster.x);
  const uint64_t blocks = uint64_t(grid.blocks.x) * grid.blocks.y * grid.blocks.z;
  if (grid.cooperative &&
      blocks > uint64_t(kProcessors)) {  // one block per multiprocessor
    report("a cooperative launch of %llu blocks on %d processors",
           static_cast<unsigned long long>(blocks), kProcessors);
    return refuse(cudaErrorCooperativeLaunchTooLarge);
  }
  if (grid.cooperative) grid.together = int(blocks);
  ++launched;
  return run(grid) ? cudaSuccess : refuse(cudaErrorLaunchFailure);
}

}  // namespace emulation
