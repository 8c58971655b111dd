// The kernels for callers in the same process that have checked their arguments: csrc/host.
#include "direct.h"

extern "C" __attribute__((visibility("default"))) const reft::Kernels* reft_kernels_cpu_direct(
    uint64_t layout) {
  return layout == reft::kDirectLayout ? &reft::kernels() : nullptr;
}
