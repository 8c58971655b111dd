// Selects the instruction set once, from the processor's features.
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

namespace reft {
namespace {

struct Choice {
  const Kernels* kernels;
  bool supported;
};

constexpr int kMaxChoices = 4;

// Lists the instruction sets in this build (REFT_HAS_...), widest first.
int choices(Choice* out) {
  int count = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  [[maybe_unused]] bool fma = __builtin_cpu_supports("fma") && __builtin_cpu_supports("avx2") &&
                              __builtin_cpu_supports("f16c");
  [[maybe_unused]] bool wide =
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#  if defined(REFT_HAS_avx512bf16)
  out[count++] = {&avx512bf16::kernels, fma && wide && __builtin_cpu_supports("avx512bf16")};
#  endif
#  if defined(REFT_HAS_avx512)
  out[count++] = {&avx512::kernels, fma && wide};
#  endif
#  if defined(REFT_HAS_avx2)
  out[count++] = {&avx2::kernels, fma};
#  endif
#endif
  out[count++] = {&portable::kernels, true};
  return count;
}

const Kernels& choose() {
  Choice all[kMaxChoices];
  int count = choices(all);
  const char* wanted = getenv("REFT_KERNELS_CPU_ISA");
  for (int i = 0; i < count; ++i)
    if (all[i].supported && (wanted == nullptr || strcmp(wanted, all[i].kernels->name) == 0))
      return *all[i].kernels;
  // An unsupported REFT_KERNELS_CPU_ISA is reported at load time, through unsupported_reason.
  return portable::kernels;
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& chosen = choose();
  return chosen;
}

const char* unsupported_reason(const char* isa) {
  Choice all[kMaxChoices];
  int count = choices(all);
  for (int i = 0; i < count; ++i)
    if (strcmp(all[i].kernels->name, isa) == 0)
      return all[i].supported ? nullptr : "this processor does not have it";
  return "it is not one of avx512bf16, avx512, avx2, portable";
}

}  // namespace reft
