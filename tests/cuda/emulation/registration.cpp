// Operators of the emulation, in addition to those of csrc/cuda/registration.cpp.
#include <stdlib.h>
#include <torch/csrc/stable/library.h>

#include <stdexcept>
#include <string>

#include "machine.h"

namespace {

int64_t emulated() { return emulation::kArch; }

int64_t launches() { return emulation::launches(); }

void schedule(std::string order, int64_t seed) {
  if (order == "forward")
    emulation::set_order(emulation::Order::kForward, 0);
  else if (order == "reverse")
    emulation::set_order(emulation::Order::kReverse, 0);
  else if (order == "random")
    emulation::set_order(emulation::Order::kRandom, unsigned(seed));
  else
    throw std::runtime_error("order: got '" + order + "', expected forward, reverse or random");
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(reft_kernels_cuda, m) {
  m.def("emulated() -> int");                    // compute capability times 100
  m.def("launches() -> int");                    // kernels launched by the process
  m.def("schedule(str order, int seed) -> ()");  // thread order: forward, reverse or random
  if (const char* order = getenv("REFT_EMULATION_ORDER")) schedule(order, 0);
}

STABLE_TORCH_LIBRARY_IMPL(reft_kernels_cuda, CompositeExplicitAutograd, m) {
  m.impl("emulated", TORCH_BOX(&emulated));
  m.impl("launches", TORCH_BOX(&launches));
  m.impl("schedule", TORCH_BOX(&schedule));
}
