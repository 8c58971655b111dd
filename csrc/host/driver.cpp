#include "driver.h"

#include <dlfcn.h>

#include <atomic>
#include <stdexcept>
#include <string>

namespace reft::host {
namespace {

// Functions of libcuda or libamdhip64. They are looked up, not linked, so that the library also
// loads without a GPU.
struct Driver {
  LaunchKernel launch = nullptr;
  int (*current_context)(void**) = nullptr;  // of CUDA; HIP makes its contexts current by itself
  int (*cuda_message)(int, const char**) = nullptr;
  const char* (*hip_message)(int) = nullptr;

  Driver() {
    if (void* cuda = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_LOCAL | RTLD_NOLOAD)) {
      find(cuda, "cuLaunchKernel", launch);
      find(cuda, "cuCtxGetCurrent", current_context);
      find(cuda, "cuGetErrorString", cuda_message);
      if (!current_context) launch = nullptr;
      return;
    }
    for (const char* name : {"libamdhip64.so", "libamdhip64.so.7", "libamdhip64.so.6"}) {
      void* hip = dlopen(name, RTLD_LAZY | RTLD_LOCAL | RTLD_NOLOAD);
      if (!hip) continue;
      find(hip, "hipModuleLaunchKernel", launch);
      find(hip, "hipGetErrorString", hip_message);
      return;
    }
  }

  std::string message(int error) const {
    const char* text = nullptr;
    if (cuda_message) cuda_message(error, &text);
    if (hip_message) text = hip_message(error);
    return text ? text : "no message";
  }

 private:
  template <class Function>
  static void find(void* library, const char* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
  }
};

// PyTorch has loaded the driver's library when the first kernel was compiled.
const Driver& driver() {
  static const Driver found;
  return found;
}

std::atomic<LaunchKernel> replacement{nullptr};
std::atomic<CurrentStream> stream_replacement{nullptr};

int nothing(void*, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, void*,
            void**, void**) {
  return 0;
}

void* no_stream(int64_t) { return nullptr; }

}  // namespace

void replace_driver(LaunchKernel function, CurrentStream stream) {
  replacement = function;
  stream_replacement = stream;
}

LaunchKernel launch_nothing() { return nothing; }
CurrentStream default_stream() { return no_stream; }
CurrentStream replaced_stream() { return stream_replacement.load(std::memory_order_relaxed); }

bool is_driver_ready() {
  if (replacement.load(std::memory_order_relaxed)) return true;
  if (!driver().launch) return false;
  void* context = nullptr;
  return !driver().current_context || (driver().current_context(&context) == 0 && context);
}

void launch(void* function, const uint32_t (&grid)[3], uint32_t threads, uint32_t shared,
            void* stream, void** parameters) {
  LaunchKernel run = replacement.load(std::memory_order_relaxed);
  if (!run) run = driver().launch;
  const int error = run(function, grid[0], grid[1], grid[2], threads, 1, 1, shared, stream,
                        parameters, nullptr);
  if (error)
    throw std::runtime_error("reft_kernels: the launch of a kernel failed: error " +
                             std::to_string(error) + ", " + driver().message(error));
}

}  // namespace reft::host
