// The GPU driver's function that launches a kernel, found in the loaded driver library.
#pragma once

#include <cstdint>

namespace reft::host {

// The signature that cuLaunchKernel and hipModuleLaunchKernel share.
using LaunchKernel = int (*)(void* function, unsigned grid_x, unsigned grid_y, unsigned grid_z,
                             unsigned block_x, unsigned block_y, unsigned block_z, unsigned shared,
                             void* stream, void** parameters, void** extra);

// Returns the current stream of a device.
using CurrentStream = void* (*)(int64_t device);

// Replaces the driver's function and the current stream, for tests and benchmarks without a GPU;
// null restores both.
void replace_driver(LaunchKernel function, CurrentStream stream);

// Functions that launch nothing and return the default stream, for benchmarks.
LaunchKernel launch_nothing();
CurrentStream default_stream();

// The function that replaces the current stream, or null.
CurrentStream replaced_stream();

// Whether kernels can be launched from this thread: the driver is found and has a current context.
bool is_driver_ready();

// Launches a kernel. Throws std::runtime_error with the driver's message if that fails.
void launch(void* function, const uint32_t (&grid)[3], uint32_t threads, uint32_t shared,
            void* stream, void** parameters);

}  // namespace reft::host
