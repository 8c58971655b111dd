// Device and stream of a launch, and error handling.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

#include <stdexcept>
#include <string>

// Dispatch key of the kernels' tensors. The emulation in the tests runs on the CPU.
#ifdef REFT_CUDA_EMULATED
#  define REFT_DISPATCH_KEY CPU
#else
#  define REFT_DISPATCH_KEY CUDA
#endif

namespace reft_cuda {

[[noreturn]] inline void fail(const char* name, const std::string& what) {
  throw std::runtime_error(std::string("reft_kernels_cuda::") + name + ": " + what);
}

// Throws if the launch or a preceding operation failed.
inline void check_launch(const char* name, cudaError_t error) {
  const cudaError_t last = cudaGetLastError();
  if (error == cudaSuccess) error = last;
  if (error != cudaSuccess) fail(name, cudaGetErrorString(error));
}

#ifdef REFT_CUDA_EMULATED

class Device {
 public:
  Device(const char*, const torch::stable::Tensor&) {}
  cudaStream_t stream() const { return nullptr; }
};

#else

using CurrentStream = AOTITorchError (*)(int32_t device_index, void** stream);

// Finds aoti_torch_get_current_cuda_stream of the stable C API at run time. It is defined in
// libtorch_cuda.so, which a CPU build of PyTorch lacks; this library links and loads without it.
inline CurrentStream find_current_stream() {
  void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  return library == nullptr ? nullptr
                            : reinterpret_cast<CurrentStream>(
                                  dlsym(library, "aoti_torch_get_current_cuda_stream"));
}

// Makes the tensor's device current during the lifetime of this object.
class Device {
 public:
  Device(const char* name, const torch::stable::Tensor& tensor)
      : guard_(tensor.get_device_index()) {
    // This library links its own CUDA runtime, which may not know the guard's device in a new
    // thread
    check_launch(name, cudaSetDevice(tensor.get_device_index()));
    static const CurrentStream current_stream = find_current_stream();
    void* stream = nullptr;
    if (current_stream == nullptr ||
        current_stream(tensor.get_device_index(), &stream) != AOTI_TORCH_SUCCESS)
      fail(name, "this PyTorch gives no current CUDA stream");
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

#endif

}  // namespace reft_cuda
