// What the stand-ins of CUDA's half-precision types make of numbers: fp32 bit patterns on stdin, on
// stdout for each the bits of its bf16 and fp16, and then the fp32 bits of every bf16 and every
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
