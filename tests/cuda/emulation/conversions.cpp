// Conversions of the emulated half-precision types. Reads fp32 bit patterns from stdin and writes
// the bits of each as bf16 and fp16 to stdout, followed by the fp32 bits of every bf16 and every
// fp16.
#include <stdio.h>
#include <string.h>

#include "cuda_bf16.h"
#include "cuda_fp16.h"

namespace {

template <class T>
void put(T value) {
  fwrite(&value, sizeof value, 1, stdout);
}

}  // namespace

int main() {
  float value;
  while (fread(&value, sizeof value, 1, stdin) == 1) {
    put(__float2bfloat16(value).bits);
    put(__float2half(value).bits);
  }
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) put(__bfloat162float({uint16_t(bits)}));
  for (uint32_t bits = 0; bits < 1 << 16; ++bits) put(__half2float({uint16_t(bits)}));
  return 0;
}
